"""Weights and the cache in huge pages: asked for from the system, and nothing that is read from them differs."""

from __future__ import annotations

import mmap
import platform
import struct
import threading
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch
from prerope.cache import huge_pages
from prerope.cache.storage import KVStorage, LayerShape
from prerope.server.machine.allowance import Bound
from prerope.server.models.cpu import settle as settling
from prerope.server.models.cpu.settle import settle
from prerope.server.models.quantized.int8 import quantize
from transformers import AutoModelForCausalLM

from tests.engine.tiny_models import tiny

SMAPS = Path("/proc/self/smaps")


def flags_at(address: int) -> set[str]:
    """Of the mapping that holds this address, as Linux abbreviates them."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and rest.count(" ") >= 3:
            low, high = (int(edge, 16) for edge in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return set(rest.split())
    raise AssertionError("no mapping has this address")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_huge_pages_are_asked_for() -> None:
    memory = huge_pages.zeros(8 << 20)
    assert "hg" in flags_at(memory.data_ptr())


def test_memory_is_zeros_on_a_page_and_taken_when_it_is_written_to() -> None:
    before = psutil.Process().memory_info().rss
    memory = huge_pages.zeros(1 << 30)
    assert psutil.Process().memory_info().rss < before + (64 << 20)
    assert memory.data_ptr() % 4096 == 0
    assert memory.dtype == torch.uint8
    memory[5] = 7
    assert memory[:4096].sum() == 7
    assert huge_pages.zeros(0).shape == (0,)


def resident(tensor: torch.Tensor) -> list[bool]:
    """Of each of its pages of 4 KiB, whether the system has given it."""
    size = mmap.PAGESIZE
    first, num_pages = tensor.data_ptr() // size, -(-tensor.nbytes // size)
    with Path("/proc/self/pagemap").open("rb") as pages:
        pages.seek(8 * first)
        return [entry >> 63 == 1 for (entry,) in struct.iter_unpack("Q", pages.read(8 * num_pages))]


def wait_until_asked() -> None:
    for thread in threading.enumerate():
        if thread.name == "pages ahead":
            thread.join(60)


@pytest.mark.skipif(
    tuple(map(int, platform.release().split(".")[:2])) < (5, 14), reason="a kernel without MADV_POPULATE_WRITE"
)
def test_the_cache_is_there_before_it_is_written_to() -> None:
    """What is in use, and half a page of 2 MiB more, of each tensor; nothing of what lies far behind it."""
    storage = KVStorage([LayerShape(1, 128, 64)], 1500, 16, torch.float32, torch.device("cpu"))
    tensors, page = [*storage.keys, *storage.values], huge_pages.PAGE_BYTES // mmap.PAGESIZE
    for used in (0, 200, 201, 700):
        for tensor in tensors:
            tensor[:used].fill_(used)
        storage.expect(used)
        wait_until_asked()
        for tensor in tensors:
            there, needed = resident(tensor), used * tensor[0].nbytes // mmap.PAGESIZE
            assert all(there[: needed + page // 2])
            assert not any(there[needed + 3 * page :])
            assert bool((tensor[:used] == used).all())
            assert not tensor[used : used + 20].any()


def test_where_no_thread_can_begin_steps_go_on_and_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a limit of processes: an error was the engine's death."""
    tried = list[threading.Thread]()

    def start(thread: threading.Thread) -> None:
        tried.append(thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    storage = KVStorage([LayerShape(1, 128, 64)], 1500, 16, torch.float32, torch.device("cpu"))
    for used in (0, 700):
        storage.expect(used)
    assert len(tried) == 2


def test_asking_ahead_changes_nothing_that_is_written_meanwhile() -> None:
    storage = KVStorage([LayerShape(1, 128, 64)], 1500, 16, torch.float32, torch.device("cpu"))
    for used in range(0, 1500, 50):
        storage.expect(used)
        for tensor in (*storage.keys, *storage.values):
            tensor[used : used + 50].fill_(used + 1)
    wait_until_asked()
    expected = torch.arange(0, 1500, 50).repeat_interleave(50) + 1
    for tensor in (*storage.keys, *storage.values):
        assert torch.equal(tensor.flatten(1)[:, [0, -1]], expected[:, None].expand(-1, 2).float())


def test_what_has_no_room_for_its_addresses_is_want_of_memory() -> None:
    with pytest.raises(MemoryError):
        huge_pages.zeros(1 << 60)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_model_is_the_same_after_its_weights_have_moved(kind: str) -> None:
    model = tiny("llama", tie_word_embeddings=True).to(getattr(torch, "bfloat16" if kind == "int8" else kind))
    if kind == "int8":
        quantize(model)
    ids = torch.arange(40)[None] % 50
    before = model(ids).logits
    places = {name: value.data_ptr() for name, value in model.named_parameters() if kind != "int8"}
    assert settle(model, least_bytes=0)
    assert torch.equal(model(ids).logits, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(model.get_parameter(name).data_ptr() != place for name, place in places.items())
    assert all(value.data_ptr() % settling.EDGE == 0 for value in model.parameters() if kind != "int8")


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
def test_the_checkpoints_file_is_let_go(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in SMAPS.read_text()
    assert settle(model, least_bytes=0)
    assert str(tmp_path) not in SMAPS.read_text()


@pytest.mark.parametrize("free", [0, 2])
def test_weights_stay_where_a_copy_would_take_half_of_what_is_free(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    size = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(settling, "free_memory", lambda: Bound(free * size * 0.9, "the test"))
    place = model.lm_head.weight.data_ptr()
    assert not settle(model, least_bytes=0)
    assert model.lm_head.weight.data_ptr() == place


def test_weights_stay_where_there_are_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages.mmap, "mmap", Mock(side_effect=OSError(12, "Cannot allocate memory")))
    assert not settle(tiny("llama"), least_bytes=0)


def test_small_models_stay() -> None:
    assert not settle(tiny("llama"))
