"""The cache beside the largest steps: the arithmetic on recorded memory, and the order in which it is read."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock, call, patch

import pytest
import torch
from prerope.cache.storage import KVStorage
from prerope.rope.spec import RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.engine.memory import sizing
from prerope.server.engine.memory.sizing import (
    CONTEXT_BYTES,
    LEAST_STATES,
    MARGIN_BYTES,
    MARGIN_SHARE,
    WARM_UP_BLOCKS,
    DeviceMemory,
    MemoryReading,
    size_cache,
)
from prerope.server.errors import ConfigurationError
from prerope.server.machine.allowance import Bound
from prerope.server.models.model import Model

from tests.engine.models.model_types import tiny_of_type

GIB = 2**30
TOKEN_BYTES = 4 * 2 * (16 + 16) * 4  # layers, KV heads, dims of key and value, fp32
BLOCK = 16 * TOKEN_BYTES


class RecordedMemory(DeviceMemory):
    """A device whose readings are given; peak: of the length of the last warm-up."""

    def __init__(self, reading: MemoryReading, peak: Callable[[int], int]) -> None:
        self.reading, self.peak_of = reading, peak
        self.calls: list[Any] = []

    def release(self) -> None:
        self.calls.append("release")

    def now(self) -> MemoryReading:
        self.calls.append("now")
        return self.reading

    def peak(self) -> int:
        self.calls.append("peak")
        (length,) = [one for one in self.calls if isinstance(one, int)][-1:]
        return self.peak_of(length)

    def warm_up(self, _model: Model, _config: EngineConfig, length: int, storage: KVStorage, _report: Any) -> None:
        self.calls.append(length)
        assert [tuple(keys.shape) for keys in storage.keys] == [(WARM_UP_BLOCKS, 16, 2, 16)] * 4
        if self.peak_of(length) > self.reading.held + self.reading.free:
            raise torch.OutOfMemoryError

    def lengths(self) -> list[int]:
        return [one for one in self.calls if isinstance(one, int)]


@pytest.fixture
def sized(model: Model) -> Callable[..., Any]:
    def size(memory: RecordedMemory, **settings: Any) -> Any:
        with patch("prerope.server.engine.memory.sizing.warm_up", memory.warm_up):
            return size_cache(model, EngineConfig(**{"max_num_seqs": 10**6} | settings), memory=memory)

    return size


def reading(total: float = 8, free: float = 6, held: float = 1) -> MemoryReading:
    return MemoryReading(int(total * GIB), int(free * GIB), int(held * GIB))


@pytest.mark.parametrize(
    ("found", "utilization", "room"),
    [
        (reading(), 0.9, 8 * 0.9 * GIB - CONTEXT_BYTES - 2 * GIB),
        (reading(), 0.5, 8 * 0.5 * GIB - CONTEXT_BYTES - 2 * GIB),
        (reading(free=3), 0.9, (1 + 3 - 2) * GIB),  # another process has the rest
        (reading(total=80, free=60), 1.0, (1 + 60 - 2) * GIB),
    ],
)
def test_the_cache_gets_what_the_largest_steps_leave(
    sized: Callable[..., Any], found: MemoryReading, utilization: float, room: float
) -> None:
    memory = RecordedMemory(found, lambda _: 2 * GIB)
    size = sized(memory, max_model_len=4096, gpu_memory_utilization=utilization)
    expected = int(room) - MARGIN_BYTES - int(found.total * MARGIN_SHARE)
    assert size.num_blocks == expected // BLOCK
    assert size.num_bytes == size.num_blocks * BLOCK
    assert size.max_model_len == 4096
    assert memory.calls == ["release", 4096, "peak", "now", "release"], "what the steps left behind goes to the cache"


def test_no_more_than_every_sequence_at_full_length_uses(sized: Callable[..., Any]) -> None:
    size = sized(RecordedMemory(reading(), lambda _: GIB), max_model_len=1000, max_num_seqs=3)
    assert size.num_blocks == 3 * 63


def test_a_given_length_that_does_not_fit_is_refused_with_numbers(sized: Callable[..., Any]) -> None:
    memory = RecordedMemory(reading(), lambda _: 5 * GIB)
    room = int(8 * 0.9 * GIB) - CONTEXT_BYTES - 5 * GIB - MARGIN_BYTES - int(8 * GIB * MARGIN_SHARE)
    fits = room // BLOCK * 16
    assert sized(memory, max_model_len=fits).max_model_len == fits
    message = (
        rf"MAX_MODEL_LEN is {fits + 1} tokens, but the KV cache holds {fits} .*8\.00 GiB, of which 6\.00 GiB are free.*"
        r"largest step take 5\.00 GiB; lower MAX_MODEL_LEN, .*GPU_MEMORY_UTILIZATION \(0\.9\)"
    )
    with pytest.raises(ConfigurationError, match=message):
        sized(memory, max_model_len=fits + 1)


def test_steps_that_do_not_fit_at_all(sized: Callable[..., Any]) -> None:
    memory = RecordedMemory(reading(), lambda _: 100 * GIB)
    with pytest.raises(ConfigurationError, match=r"largest steps at 4096 tokens do not fit .* 7\.00 GiB .*: lower MAX"):
        sized(memory, max_model_len=4096)
    assert memory.lengths() == [4096]
    with pytest.raises(ConfigurationError, match=r"largest steps at 16 tokens do not fit"):
        sized(memory, rope=RopeSpec(method="auto"))
    assert memory.lengths()[1:] == [256, 128, 64, 32, 16]


@pytest.mark.parametrize("seed", range(30))
def test_a_derived_length_works_and_twice_as_long_would_not(sized: Callable[..., Any], seed: int) -> None:
    """Whatever a step takes at a length, as long as it is no less at a longer one."""
    choose = random.Random(seed)
    fixed, slope = choose.uniform(0.1, 5.5) * GIB, choose.choice([0, 1, 30, 1000, 20000]) * 2 ** choose.uniform(0, 10)
    wanted = choose.choice([64, 1000, 10**5, 10**6])

    def peak(length: int) -> int:
        return int(fixed + slope * length)

    def holds(length: int) -> bool:
        room = int(8 * GIB * 0.9) - CONTEXT_BYTES - peak(length) - MARGIN_BYTES - int(8 * GIB * MARGIN_SHARE)
        return room // BLOCK * 16 >= length

    memory = RecordedMemory(reading(), peak)
    size = sized(memory, rope=RopeSpec(method="rope", factor=wanted / 64))
    longest = int(64 * (wanted / 64))  # as the method's length is derived
    assert holds(size.max_model_len)
    assert size.max_model_len == longest or not holds(min(longest, 2 * size.max_model_len))
    assert memory.lengths()[0] == longest
    assert memory.lengths()[-1] == size.max_model_len, "what is served has been run"
    assert size.num_blocks * 16 >= size.max_model_len


def test_what_did_fit_is_the_next_length(sized: Callable[..., Any]) -> None:
    """Where it is more than half: nothing is given away if the largest steps take as much at any length."""
    memory = RecordedMemory(reading(), lambda _: 4 * GIB)
    room = int(8 * GIB * 0.9) - CONTEXT_BYTES - 4 * GIB - MARGIN_BYTES - int(8 * GIB * MARGIN_SHARE)
    fits = room // BLOCK * 16
    size = sized(memory, rope=RopeSpec(method="rope", factor=1.5 * fits / 64))
    assert size.max_model_len == fits
    assert len(memory.lengths()) == 2


def test_memory_that_is_asked_for_needs_no_margin_but_has_to_fit(sized: Callable[..., Any]) -> None:
    memory = RecordedMemory(reading(), lambda _: 5 * GIB)
    size = sized(memory, kv_cache_memory=2 * GIB, max_model_len=4096)
    assert size.num_bytes == 2 * GIB
    assert memory.calls == ["release", 4096, "peak", "now", "release"]
    message = rf"KV_CACHE_MEMORY: .* {2 * GIB + BLOCK} bytes, but of {7 * GIB} .* take {5 * GIB}: lower it to {2 * GIB}"
    with pytest.raises(ConfigurationError, match=message):
        sized(memory, kv_cache_memory=2 * GIB + BLOCK, max_model_len=4096)
    with pytest.raises(ConfigurationError, match=r"MAX_MODEL_LEN is 4096 .* holds 1024 .*raise KV_CACHE_MEMORY"):
        sized(memory, kv_cache_memory=64 * BLOCK, max_model_len=4096)
    assert sized(memory, kv_cache_memory=4 * BLOCK, rope=RopeSpec(method="auto")).max_model_len == 64
    assert memory.lengths()[-1] == 64


def test_states_of_recurrent_layers_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cache, for which a quarter may be states, and not with the steps beside which it is sized as well."""
    hybrid = Model(tiny_of_type("lfm2", max_position_embeddings=256))
    state = sum(one.num_bytes for one in hybrid.states)
    num_seqs, room = 64, 300 * state
    memory = RecordedMemory(reading(), lambda _: GIB + held[-1])
    held: list[int] = []

    def warm_up(_model: Model, _config: EngineConfig, length: int, storage: KVStorage, _report: Any) -> None:
        memory.calls.append(length)
        held.append(sum(tensor.nbytes for layer in storage.states for tensor in layer))

    monkeypatch.setattr("prerope.server.engine.memory.sizing.warm_up", warm_up)
    memory.reading = MemoryReading(8 * GIB, GIB + MARGIN_BYTES + int(8 * GIB * MARGIN_SHARE) + room, 0)
    size = size_cache(hybrid, EngineConfig(max_num_seqs=num_seqs, max_model_len=256), memory=memory)
    assert held == [LEAST_STATES * state]
    assert size.num_states == (room - held[0]) // 4 // state > num_seqs
    used = size.num_bytes + size.state_bytes + held[0]
    block = size.num_bytes // size.num_blocks
    assert room - block < used <= room


def test_the_steps_are_run_for_real(model: Model) -> None:
    """On this machine's CPU, in place of a GPU whose memory is recorded."""
    memory = RecordedMemory(reading(), lambda _: GIB)
    lines: list[str] = []
    config = EngineConfig(rope=RopeSpec(method="auto"), max_num_seqs=4, max_batched_tokens=64)
    real, memory.calls = model.forward, [256]
    with patch.object(model, "forward", side_effect=real) as forward:
        size = size_cache(model, config, lines.append, memory)
    assert (size.max_model_len, size.num_blocks) == (256, 4 * 16)
    assert lines[0] == "measuring the memory of the largest steps at 256 tokens"
    assert len(lines) == 1 + forward.call_count > 3


def test_on_a_cpu_nothing_is_run(model: Model) -> None:
    config = EngineConfig(max_model_len=256)
    with patch("prerope.server.engine.memory.sizing.warm_up", side_effect=AssertionError):
        size = size_cache(model, config)
        assert size_cache(model, replace(config, gpu_memory_utilization=0.01)) == size


def test_a_gpu_is_read_when_its_work_is_done() -> None:
    """What is released counts from an idle device; the peak is read when all steps have run."""
    cuda = Mock()
    cuda.mem_get_info.return_value = (6, 8)
    cuda.memory_reserved.return_value = 1
    cuda.max_memory_allocated.return_value = 2
    device = torch.device("cuda")
    with patch("prerope.server.engine.memory.sizing.torch.cuda", cuda):
        memory = DeviceMemory(device)
        memory.release()
        assert cuda.mock_calls == [
            call.synchronize(device), call.empty_cache(), call.reset_peak_memory_stats(device)
        ]  # fmt: skip
        assert memory.now() == MemoryReading(total=8, free=6, held=1)
        cuda.mock_calls.clear()
        assert memory.peak() == 2
        assert cuda.mock_calls == [call.synchronize(device), call.max_memory_allocated(device)]


# --- on a CPU ---------------------------------------------------------------------------------------------------------


def test_on_a_cpu_the_cache_is_of_what_is_free_for_this_process(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that was asked for and is more is refused before it is touched, with whose limit it is."""
    monkeypatch.setattr(sizing, "free_memory", lambda: Bound(BLOCK * 100, "memory.max of /sys/fs/cgroup"))
    said: list[str] = []
    many = EngineConfig(max_num_seqs=10**6, max_model_len=64)
    assert size_cache(model, many, said.append).num_blocks == int(100 * sizing.CPU_SHARE)
    assert "memory.max of /sys/fs/cgroup" in said[-1]
    assert size_cache(model, replace(many, kv_cache_memory=BLOCK * 100)).num_blocks == 100
    with pytest.raises(ConfigurationError, match=r"KV_CACHE_MEMORY.*are free \(memory.max of /sys/fs/cgroup\)"):
        size_cache(model, replace(many, kv_cache_memory=BLOCK * 101))
    few = replace(many, kv_cache_memory=BLOCK * 10**6, max_num_seqs=20)
    assert size_cache(model, few).num_blocks == 80, "what is never used is not asked for"
