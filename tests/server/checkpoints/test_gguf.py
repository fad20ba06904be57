"""GGUF files: parsed once, joined, converted with progress and resumed, their rotation honoured or refused by name."""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from prerope.rope.frequencies import Rotary, llama3, plain
from prerope.rope.methods import resolve
from prerope.rope.spec import RopeSpec
from prerope.server.errors import ConfigurationError
from prerope.server.models import checkpoint
from prerope.server.models.checkpoint import Checkpoint, resolve_checkpoint
from prerope.server.models.checks.probe import probe
from prerope.server.models.gguf import header
from prerope.server.models.gguf import tensors as gguf_tensors
from prerope.server.models.gguf.convert import set_sizes_of_heads
from prerope.server.models.gguf.faults import read_as
from prerope.server.models.gguf.rope import set_rope
from prerope.server.models.model import load_model
from prerope.server.tokenizer import Tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, Gemma2Config, Gemma3TextConfig, StableLmConfig

from tests.server.checkpoints.test_checkpoint import write_gguf

Values = Callable[[Any], None]


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """The converted copy of a file."""
    return lambda file: Path(resolve_checkpoint(str(file), None, lambda _: None, cache_dir=tmp_path / "cache").source)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def refusal(copy_of: Callable[[Path], Path], file: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        copy_of(file)
    assert "\n" not in str(caught.value)
    assert not re.search(r"\w+(Error|Exception)\b", str(caught.value))
    return str(caught.value)


# --- rotation ---


def yarn(writer: Any) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(128)


def linear(writer: Any) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


STRETCHED = np.array([1.0, 1.5, 2.0, 7.0], dtype=np.float32)
LLAMA3 = (plain(8, 10000.0) / llama3(8, 10000.0, 8.0, 8192)).float().numpy()
SHORT, LONG = np.array([1.0, 1.1, 1.2, 1.3], dtype=np.float32), np.array([1.0, 2.0, 4.0, 8.0], dtype=np.float32)


def longrope(writer: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(64)
    writer.add_rope_scaling_attn_factors(1.25)


@pytest.mark.parametrize(
    ("values", "tensors", "kind", "length", "theta", "attention", "reach"),
    [
        (lambda _: None, {}, "default", 100, plain(8, 10000.0), 1.0, 128),
        (yarn, {}, "yarn", 100, None, 0.1 * math.log(4) + 1, 512),
        (linear, {}, "linear", 100, plain(8, 10000.0) / 2, 1.0, 128),
        (lambda _: None, {"rope_freqs.weight": LLAMA3}, "llama3", 100, llama3(8, 10000.0, 8.0, 8192), 1.0, 128),
        (
            lambda _: None,
            {"rope_freqs.weight": STRETCHED},
            "longrope",
            100,
            plain(8, 10000.0).numpy() / STRETCHED,
            1.0,
            128,
        ),
        (
            longrope,
            {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG},
            "longrope",
            65,
            plain(8, 10000.0).numpy() / LONG,
            1.25,
            128,
        ),
    ],
)
def test_what_the_converter_writes_of_rotation_is_honoured(
    copy_of: Callable[[Path], Path],
    tmp_path: Path,
    values: Values,
    tensors: dict[str, Any],
    kind: str,
    length: int,
    theta: Any,
    attention: float,
    reach: int,
) -> None:
    file = write_gguf(tmp_path / "model.gguf", values=values, tensors=lambda t: t | tensors)
    rotary = Rotary.from_config(AutoConfig.from_pretrained(copy_of(file)))
    assert (rotary.rope_type, rotary.max_length) == (kind, reach)
    reading = resolve(RopeSpec(method="model"), rotary).reading_of(length - 1)
    assert reading.attention_factor == pytest.approx(attention, rel=1e-6)
    if theta is not None:
        np.testing.assert_allclose(reading.theta, torch.as_tensor(theta), rtol=2e-6)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (lambda w: w.add_float32("llama.rope.scaling.alpha", 1000.0), "rope.scaling.alpha"),
        (lambda w: w.add_float32("llama.rope.scaling.yarn_log_multiplier", 0.1), "rope.scaling.yarn_log_multiplier"),
        (lambda w: w.add_float32("llama.attention.temperature_scale", 0.1), "attention.temperature_scale"),
        (lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "rope.scaling.type is 'longrope'"),
    ],
)
def test_rotation_that_no_config_can_say_is_refused_by_name(
    copy_of: Callable[[Path], Path], tmp_path: Path, values: Values, said: str
) -> None:
    assert said in refusal(copy_of, write_gguf(tmp_path / "model.gguf", values=values))


@pytest.mark.parametrize(("count", "width"), [(4, 4), (8, 8), (16, 16)])
def test_the_width_of_the_rotation_is_the_file_s(count: int, width: int) -> None:
    config = StableLmConfig(hidden_size=64, num_attention_heads=4, partial_rotary_factor=0.25)
    values = {
        "general.architecture": "stablelm",
        "stablelm.rope.dimension_count": count,
        "stablelm.rope.freq_base": 5e4,
    }
    set_rope(config, header.Header(Path("model.gguf"), values, {}, ()), {})
    rotary = Rotary.from_config(config)
    assert (rotary.head_dim, rotary.dim, rotary.base) == (16, width, 5e4)


def test_only_full_attention_is_scaled_where_layers_are_of_two_kinds() -> None:
    config = Gemma3TextConfig(head_dim=16)
    values = {
        "general.architecture": "gemma3",
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 2e4,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }
    set_rope(config, header.Header(Path("model.gguf"), values, {}, ()), {})
    full, sliding = (Rotary.from_config(config, kind) for kind in ("full_attention", "sliding_attention"))
    assert (full.rope_type, full.base, full.parameters["factor"]) == ("linear", 1e6, 8.0)
    assert (sliding.rope_type, sliding.base) == ("default", 2e4)


# --- what it states ---


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (lambda w: w.add_sliding_window(16), "it states attention.sliding_window 16, which transformers leaves unread"),
        (lambda w: w.add_attn_logit_softcapping(10.0), "attn_logit_softcapping 10, which transformers leaves unread"),
        (lambda w: w.add_logit_scale(0.5), "logit_scale 0.5, which"),
        (lambda w: w.add_attention_scale(0.9), "attention.scale 0.9, which"),
        (lambda w: w.add_max_alibi_bias(8.5), "attention.max_alibi_bias 8.5, which"),
        (lambda w: w.add_clamp_kqv(0.5), "attention.clamp_kqv 0.5, which"),
        (lambda w: w.add_residual_scale(0.3), "residual_scale 0.3, which"),
        (lambda w: w.add_embedding_scale(12.0), "embedding_scale 12, which"),
        (lambda w: w.add_causal_attention(False), "its tokens read what follows them, too"),
        (lambda w: w.add_type("adapter"), "it is an adapter: merge it"),
        (lambda w: w.add_type("mmproj"), "it is the part of a model that sees or hears"),
    ],
)
def test_what_changes_the_maths_and_is_left_unread_is_refused(
    copy_of: Callable[[Path], Path], tmp_path: Path, values: Values, said: str
) -> None:
    assert said in refusal(copy_of, write_gguf(tmp_path / "m.gguf", values=values))


@pytest.mark.parametrize(
    "values",
    [
        lambda w: w.add_sliding_window(262144),
        lambda w: w.add_logit_scale(1.0),
        lambda w: w.add_attention_scale(8**-0.5),
        lambda w: w.add_causal_attention(True),
        lambda w: w.add_type("model"),
    ],
)
def test_what_changes_nothing_is_served(copy_of: Callable[[Path], Path], tmp_path: Path, values: Values) -> None:
    copy_of(write_gguf(tmp_path / "m.gguf", values=values))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.context_length", None, "does not state llama.context_length: it is damaged"),
        ("llama.attention.layer_norm_rms_epsilon", None, "llama.attention.layer_norm_rms_epsilon"),
        ("llama.attention.head_count", None, "does not state llama.attention.head_count"),
        ("tokenizer.ggml.merges", None, "does not state tokenizer.ggml.merges"),
        ("tokenizer.ggml.model", None, "does not state tokenizer.ggml.model"),
        ("tokenizer.ggml.eos_token_id", 99, "its eos_token_id is 99, and it has 8 tokens"),
    ],
)
def test_what_must_be_there_is_named(
    copy_of: Callable[[Path], Path], tmp_path: Path, key: str, value: int | None, said: str
) -> None:
    def change(writer: Any) -> None:
        writer.kv_data[0].pop(key)
        if value is not None:
            writer.add_uint32(key, value)

    assert said in refusal(copy_of, write_gguf(tmp_path / "m.gguf", values=change))


def typed(name: str, dtype: type) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: tensors | {name: tensors[name].astype(dtype)}


def placed(name: str, array: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: tensors | {name: np.asarray(array, dtype=np.float32)}


def stated(key: str, add: Callable[[Any], Any]) -> Values:
    """In place of what the file states."""

    def change(writer: Any) -> None:
        writer.kv_data[0].pop(key, None)
        add(writer)

    return change


def nothing(_: Any) -> None:
    """Beside what every file here states."""


FAULTS: list[tuple[Values, Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (nothing, typed("token_embd.weight", np.float64), "its tensor token_embd.weight is stored as F64, and weights"),
    (nothing, typed("blk.0.attn_q.weight", np.int8), "its tensor blk.0.attn_q.weight is stored as I8"),
    (nothing, placed("rope_freqs.weight", np.ones(16)), "has 16 numbers, and it is one for each of 4 pairs"),
    (nothing, placed("rope_freqs.weight", np.ones((2, 2))), "has 2 by 2 numbers"),
    (nothing, placed("rope_freqs.weight", [1, math.nan, 1, 1]), "rope_freqs.weight has numbers that are not above 0"),
    (
        nothing,
        lambda t: t | {"blk.0.ffn_up.weight": t["blk.0.ffn_up.weight"].T.copy()},
        "its tensor blk.0.ffn_up.weight is [32, 64], and does not fit what the file states of sizes and heads "
        "(llama.*), which make it [64, 32]",
    ),
    (
        nothing,
        lambda t: t | {"blk.0.attn_q.weight": t["blk.0.attn_q.weight"][:30]},
        "blk.0.attn_q.weight is [30, 32]",
    ),
    (lambda w: w.add_rope_dimension_count(4), dict, "4 of the 8 dims of a head turn (rope.dimension_count), and in"),
    (lambda w: (w.add_rope_dimension_count(4), w.add_key_length(8)), dict, "4 of the 8 dims of a head turn"),
    (lambda w: w.add_rope_dimension_count(3), dict, "rope.dimension_count is 3, and a head has 8 dims"),
    (lambda w: w.add_string("llama.rope.scaling.factor", "x"), dict, "its rope.scaling.factor is the text 'x'"),
    (stated("llama.attention.head_count", lambda w: w.add_head_count(0)), dict, "its attention.head_count is 0"),
    (stated("tokenizer.ggml.model", lambda w: w.add_tokenizer_model("rwkv")), dict, "its tokenizer is of kind 'rwkv'"),
    (stated("tokenizer.ggml.tokens", lambda w: w.add_token_list(["a", "b"])), dict, "its merges make the token 'Ċ'"),
    (stated("tokenizer.ggml.merges", lambda w: w.add_token_merges(["x", "y z w"])), dict, "its tokens do not fit each"),
]


@pytest.mark.parametrize(("values", "tensors", "said"), FAULTS, ids=[said[:40] for *_, said in FAULTS])
def test_a_fault_is_told_in_words_of_the_file(
    copy_of: Callable[[Path], Path],
    tmp_path: Path,
    values: Values,
    tensors: Callable[[dict[str, Any]], dict[str, Any]],
    said: str,
) -> None:
    told = refusal(copy_of, write_gguf(tmp_path / "m.gguf", values=values, tensors=tensors))
    assert said in told
    assert "download it again" in told or "in safetensors" in told


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("deepseek2", "transformers reads no GGUF files of architecture 'deepseek2' (but of bloom,"),
        ("gemma4", "its layers have heads of several sizes"),
        ("clip", "it is the part of a model that sees or hears"),
        ("imatrix", "it is a table of importances"),
        ("t5", "it has an encoder"),
        ("qwen35", "it does not state qwen35.attention.key_length"),
        ("lfm2", "what it states of its model fits none of that architecture that transformers knows: download it"),
        ("phi3", "(Padding_idx must be within num_embeddings)"),
        ("mamba", "holds blk.0.ffn_norm.weight, for which transformers has no place in a mamba model"),
        ("falcon", "holds blk.0.ffn_norm.weight, for which transformers has no place in a falcon model"),
    ],
)
def test_an_architecture_is_refused_in_words_of_the_file(
    copy_of: Callable[[Path], Path], tmp_path: Path, architecture: str, said: str
) -> None:
    told = refusal(copy_of, write_gguf(tmp_path / "m.gguf", architecture=architecture))
    assert said in told


def test_a_family_whose_scaling_transformers_fails_on_is_refused_for_its_weights(
    copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    told = refusal(copy_of, write_gguf(tmp_path / "m.gguf", architecture="gpt-oss", values=yarn))
    assert "for which transformers has no place in a gpt-oss model" in told


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**58), lambda: np.empty(2**58)], ids=["torch", "numpy"])
def test_a_want_of_memory_is_not_laid_on_the_file(allocate: Callable[[], object]) -> None:
    file = header.Header(Path("model.gguf"), {"general.architecture": "llama"}, {}, ())
    with pytest.raises((RuntimeError, MemoryError), match="allocate"), read_as(file, "it is damaged"):
        allocate()


@pytest.mark.parametrize(
    ("architecture", "layers", "scalar"),
    [("gemma3", 18, 16), ("gemma3", 62, 8), ("gemma2", 42, 16), ("gemma2", 46, 8)],
)
def test_the_largest_gemmas_scale_scores_by_their_width(architecture: str, layers: int, scalar: int) -> None:
    """As llama.cpp does, by the number of layers: no key says it, and the class's default is another model's."""
    config = (Gemma3TextConfig if architecture == "gemma3" else Gemma2Config)(
        head_dim=16, num_attention_heads=4, query_pre_attn_scalar=256
    )
    own = {"block_count": layers, "embedding_length": 32, "attention.key_length": 16}
    values = {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in own.items()}
    set_sizes_of_heads(config, header.Header(Path("model.gguf"), values, {}, ()))
    assert config.query_pre_attn_scalar == scalar


@pytest.mark.parametrize("add", ["add_layer_norm_eps", "add_layer_norm_rms_eps"])
def test_either_name_of_what_keeps_a_norm_from_zero_is_heard(
    copy_of: Callable[[Path], Path], tmp_path: Path, add: str
) -> None:
    change = stated("llama.attention.layer_norm_rms_epsilon", lambda writer: getattr(writer, add)(1e-3))
    config = AutoConfig.from_pretrained(copy_of(write_gguf(tmp_path / "m.gguf", values=change)))
    assert config.rms_norm_eps == pytest.approx(1e-3)


# --- tokens ---


@pytest.mark.parametrize(
    ("pre", "text", "cut"),
    [
        ("smollm", "a\n\n12", ["a", "ĊĊ", "1", "2"]),
        ("llama-bpe", "a\n\n1234", ["a", "ĊĊ", "123", "4"]),
        ("chatglm-bpe", "a\n\n1234", ["a", "ĊĊ", "123", "4"]),
        ("stablelm2", "a\n\n12", ["a", "ĊĊ", "1", "2"]),
        ("gpt-2", "a\n\n12", ["a", "Ċ", "Ċ", "12"]),
    ],
)
def test_text_is_cut_as_the_file_names_it(tmp_path: Path, pre: str, text: str, cut: list[str]) -> None:
    lines: list[str] = []
    file = write_gguf(tmp_path / "model.gguf", pre=pre)
    checkpoint = resolve_checkpoint(str(file), None, lines.append, cache_dir=tmp_path / "cache")
    backend = Tokenizer.load(checkpoint).hf.backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == cut
    assert not [line for line in lines if "warning" in line]


@pytest.mark.parametrize(
    ("pre", "said"), [("poro-chat", "'poro-chat', which is not known here"), ("default", "nothing")]
)
def test_a_way_to_cut_text_that_is_not_known_is_told(tmp_path: Path, pre: str, said: str) -> None:
    lines: list[str] = []
    resolve_checkpoint(str(write_gguf(tmp_path / "m.gguf", pre=pre)), None, lines.append, cache_dir=tmp_path / "cache")
    assert [line for line in lines if line.startswith("warning") and f"m.gguf says {said}" in line]


# --- whole, in parts, damaged ---


def test_split_files_are_joined_by_the_name_of_any_part(copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    whole = weights(copy_of(write_gguf(tmp_path / "whole.gguf", layers=2)))
    (tmp_path / "split").mkdir()
    write_gguf(tmp_path / "split" / "model.gguf", layers=2, split_max_tensors=8)
    parts = sorted((tmp_path / "split").iterdir())
    assert len(parts) == 3
    for given in (parts[1], tmp_path / "split"):
        joined = weights(copy_of(given))
        assert joined.keys() == whole.keys()
        assert all(torch.equal(joined[name], whole[name]) for name in whole)
    parts[1].rename(tmp_path / "other.gguf")
    assert f"2 of 3 parts of model are there and {parts[1].name} is missing" in refusal(copy_of, parts[0])
    assert "one of 3 parts of a split model, under another name" in refusal(copy_of, tmp_path / "other.gguf")


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def test_weights_that_are_missing_or_have_no_place_are_refused_by_name(
    copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    lacking = write_gguf(tmp_path / "lacking.gguf", tensors=without("blk.0.attn_k.weight"))
    assert "lacks 1 weights of a llama model: model.layers.0.self_attn.k_proj.weight" in refusal(copy_of, lacking)
    bias = {"blk.0.attn_q.bias": np.ones(32, dtype=np.float32)}
    strange = write_gguf(tmp_path / "strange.gguf", tensors=lambda tensors: tensors | bias)
    assert "holds blk.0.attn_q.bias, for which transformers has no place" in refusal(copy_of, strange)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.2, 0.99])
def test_a_file_cut_short_says_so(copy_of: Callable[[Path], Path], tmp_path: Path, share: float) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    said = refusal(copy_of, file)
    assert "is cut short" in said or "is no GGUF file" in said


def patched(content: bytes, after: bytes, skip: int, new: bytes) -> bytes:
    """Other bytes some way behind a name."""
    place = content.index(after) + len(after) + skip
    return content[:place] + new + content[place + len(new) :]


MANY = (2**60).to_bytes(8, "little")
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "tensors": (lambda c: c[:8] + MANY + c[16:], "cut short"),
    "values": (lambda c: c[:16] + MANY + c[24:], "cut short"),
    "strings of a list": (lambda c: patched(c, b"tokenizer.ggml.tokens", 8, MANY), "cut short"),
    "numbers of a list": (lambda c: patched(c, b"tokenizer.ggml.token_type", 8, MANY), "cut short"),
    "length of a name": (lambda c: patched(c, b"llama.block_count", 8, MANY), "cut short"),
    "no such type": (lambda c: patched(c, b"llama.block_count", 0, b"\x63"), "is damaged"),
    "a float for a count": (lambda c: patched(c, b"llama.block_count", 0, b"\x06"), "block_count is"),
    "more layers than tensors": (
        lambda c: patched(c, b"llama.block_count", 4, b"\xff\xff\xff\x7f"),
        "block_count is 2147",
    ),
    "an architecture that is no text": (
        lambda c: patched(c, b"general.architecture", 0, b"\x06\0\0\0" + b"\0" * 4 + b"\0" * 5),
        "is",
    ),
    "a key twice": (lambda c: c.replace(b"ggml.bos_token_id", b"ggml.eos_token_id"), "is said twice"),
    "a tensor twice": (lambda c: c.replace(b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"), "two tensors named"),
    "tensors over each other": (lambda c: patched(c, b"blk.0.attn_q.weight", 24, b"\0" * 8), "lie over each other"),
    "a tensor far away": (lambda c: patched(c, b"blk.0.attn_q.weight", 24, MANY), "cut short"),
    "a tensor of any size": (lambda c: patched(c, b"blk.0.attn_q.weight", 4, MANY), "lie over each other"),
}


def test_no_header_ends_in_a_traceback_or_takes_more_than_its_file(tmp_path: Path) -> None:
    """Cut at any byte, and with what a count, a type or a place should not be."""
    file = write_gguf(tmp_path / "model.gguf")
    whole = file.read_bytes()
    tensors = header.read_header(file).tensors
    end = min(tensor.offset for tensor in tensors)
    tracemalloc.start()
    for content, said in (
        *((whole[:length], "") for length in range(0, end, 7)),
        *((damage(whole), said) for damage, said in DAMAGES.values()),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigurationError) as caught:
            header.read_header(file)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    tracemalloc.stop()


def test_values_that_no_model_has_are_refused_by_name(copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    file.write_bytes(patched(file.read_bytes(), b"llama.context_length", 4, b"\0\0\0\0"))
    assert "'max_position_embeddings' is 0, and a model's length is a number of tokens" in refusal(copy_of, file)


@pytest.mark.parametrize("change", [np.zeros_like, lambda array: np.full_like(array, 0.5)])
def test_weights_that_are_all_the_same_are_the_file_s_fault(
    tmp_path: Path, change: Callable[[Any], Any], copy_of: Callable[[Path], Path]
) -> None:
    file = write_gguf(tmp_path / "m.gguf", tensors=lambda tensors: {n: change(array) for n, array in tensors.items()})
    with pytest.raises(ConfigurationError, match="tables of weights hold one number throughout"):
        load_model(Checkpoint(str(copy_of(file)), "m"), "auto", "cpu", lambda _: None)


def test_a_number_of_heads_for_each_layer_is_told(copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    def each(writer: Any) -> None:
        writer.kv_data[0].pop("llama.attention.head_count_kv")
        writer.add_array("llama.attention.head_count_kv", [2, 1])

    said = refusal(copy_of, write_gguf(tmp_path / "m.gguf", layers=2, values=each))
    assert "its num_key_value_heads is of another kind than a model of this architecture has" in said


@pytest.mark.parametrize("value", [0.0, -1e-5, math.nan, math.inf, 1e30])
@pytest.mark.parametrize(
    ("key", "name"),
    [("attention.layer_norm_rms_epsilon", "rms_norm_eps"), ("rope.freq_base", "rope_parameters.rope_theta")],
)
def test_numbers_that_no_norm_and_no_rotation_has(
    copy_of: Callable[[Path], Path], tmp_path: Path, key: str, name: str, value: float
) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    content = patched(file.read_bytes(), f"llama.{key}".encode(), 4, struct.pack("<f", value))
    file.write_bytes(content)
    assert f"'{name}' is {np.float32(value).item()!r}, and" in refusal(copy_of, file)


def test_a_git_lfs_pointer_is_told(copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    assert "git lfs pull" in refusal(copy_of, file)


def test_a_blob_without_a_suffix_is_known_by_its_first_bytes(copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    blob = write_gguf(tmp_path / "model.gguf").rename(tmp_path / "sha256-4d7a")
    assert (copy_of(blob) / "config.json").is_file()


def test_every_end_that_the_file_names_ends_a_reply(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", values=lambda writer: writer.add_eot_token_id(6))
    checkpoint = resolve_checkpoint(str(file), None, lambda _: None, cache_dir=tmp_path / "cache")
    assert Tokenizer.load(checkpoint).end_tokens == {1: "generation config", 6: "generation config", 0: "chat format"}


# --- the conversion itself ---


def test_it_is_parsed_once_and_tells_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Path] = []
    read_file = header._read_file
    monkeypatch.setattr(header, "_read_file", lambda file: parsed.append(file) or read_file(file))
    monkeypatch.setattr(gguf, "GGUFReader", lambda *_: pytest.fail("parsed by another reader"))
    monkeypatch.setattr(gguf_tensors, "REPORT_EVERY_S", 0.0)
    lines: list[str] = []
    resolve_checkpoint(str(write_gguf(tmp_path / "model.gguf")), None, lines.append, cache_dir=tmp_path / "cache")
    assert len(parsed) == 1
    assert any("model.gguf: 100 %" in line for line in lines)


def test_a_killed_conversion_goes_on_where_it_was(
    copy_of: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "model.gguf", layers=4)
    whole = weights(copy_of(file))
    again = write_gguf(tmp_path / "again.gguf", layers=4)
    monkeypatch.setattr(gguf_tensors, "PART_BYTES", 1)
    save_file, saved = gguf_tensors.save_file, []

    def killed_at_the_third(tensors: Any, part: Path, metadata: Any) -> None:
        if len(saved) == 2:
            Path(part).write_bytes(b"half")
            raise KeyboardInterrupt
        saved.append(part)
        save_file(tensors, part, metadata)

    monkeypatch.setattr(gguf_tensors, "save_file", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        copy_of(again)
    partial = next((tmp_path / "cache").glob("again*.partial"))
    assert len(list(partial.glob("*.safetensors"))) == 2
    (partial / "stale").touch()
    monkeypatch.setattr(
        gguf_tensors, "save_file", lambda *arguments: saved.append(arguments[1]) or save_file(*arguments)
    )
    resumed = copy_of(again)
    parts = set(json.loads((resumed / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(saved) == len(parts), "no part was made twice"
    assert not (resumed / "stale").exists()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(resumed).items())
    assert weights(resumed).keys() == whole.keys()


def test_a_part_is_on_the_disk_before_it_has_its_name(
    copy_of: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a power cut leaves one that is there and holds zeros, and a conversion that goes on takes it for whole."""
    written: set[int] = set()
    named: list[Path] = []
    fsync, rename = os.fsync, os.replace

    def replaced(aside: Path, part: Path) -> None:
        if Path(part).suffix == ".safetensors":
            assert Path(aside).stat().st_ino in written
            named.append(part)
        rename(aside, part)

    monkeypatch.setattr(gguf_tensors, "PART_BYTES", 1)
    monkeypatch.setattr(os, "fsync", lambda number: written.add(os.fstat(number).st_ino) or fsync(number))
    monkeypatch.setattr(os, "replace", replaced)
    copy_of(write_gguf(tmp_path / "model.gguf", layers=2))
    assert len(named) > 2


def test_copies_of_other_versions_are_named(
    copy_of: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    files = [write_gguf(tmp_path / f"{name}.gguf") for name in ("one", "two")]
    old, other = map(copy_of, files)
    monkeypatch.setattr(checkpoint, "CONVERSION_VERSION", checkpoint.CONVERSION_VERSION + 1)
    resolve_checkpoint(str(files[0]), None, said.append, cache_dir=tmp_path / "cache")
    assert [line for line in said if old.name in line]
    assert not [line for line in said if other.name in line]
    assert old.is_dir()


def test_a_disk_that_takes_no_more_is_no_fault_of_the_file(copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", layers=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, hard))
    try:
        with pytest.raises(ConfigurationError, match=r"CACHE_DIR=.* cannot hold the converted model: File too large"):
            copy_of(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert copy_of(file).is_dir()


@pytest.mark.parametrize("seed", range(20))
def test_no_damage_ends_in_a_traceback(copy_of: Callable[[Path], Path], tmp_path: Path, seed: int) -> None:
    """Bytes of the header replaced at random: what is not refused in one line is converted."""
    draw = random.Random(seed)
    file = write_gguf(tmp_path / "model.gguf")
    content = bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 6)):
        content[draw.randrange(1800)] = draw.randrange(256)
    file.write_bytes(content)
    refused = ""
    try:
        copy_of(file)
    except ConfigurationError as error:
        refused = str(error)
    assert "\n" not in refused


def test_what_a_family_states_of_its_experts_is_read(copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    file = tmp_path / "moe.gguf"
    hidden, width, experts = 32, 48, 4

    def values(writer: Any) -> None:
        writer.add_key_length(16)
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(width)

    def tensors(dense: dict[str, Any]) -> dict[str, Any]:
        shapes = {
            "attn_q": (64, hidden),
            "attn_k": (32, hidden),
            "attn_v": (32, hidden),
            "attn_output": (hidden, 64),
            "attn_q_norm": (16,),
            "attn_k_norm": (16,),
            "ffn_gate_inp": (experts, hidden),
            "ffn_gate_exps": (experts, width, hidden),
            "ffn_up_exps": (experts, width, hidden),
            "ffn_down_exps": (experts, hidden, width),
        }
        kept = {name: tensor for name, tensor in dense.items() if "attn_" not in name and "ffn_" not in name}
        norms = {f"blk.0.{name}_norm.weight": np.ones(hidden, dtype=np.float32) for name in ("attn", "ffn")}
        drawn = np.random.default_rng(1)
        return (
            kept | norms | {f"blk.0.{n}.weight": drawn.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
        )

    folder = copy_of(write_gguf(file, architecture="qwen3moe", values=values, tensors=tensors))
    model = load_model(Checkpoint(str(folder), "moe"), "float32", "cpu", lambda _: None)
    probe(model)
    loaded = model.raw.model.state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in weights(folder).items())
