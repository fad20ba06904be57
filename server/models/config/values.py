"""Values of a config that no model has, told before anything is made of them: lengths, sizes, factors of rotation.

transformers refuses some in words about its own classes, and takes others: then what is built from them is NaN, or more
than any machine holds. A size is bounded by what is stored, whose numbers take a bit each at least.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MOST = 2**31 - 1

NUMBERS_A_BYTE = {"vocab_size": 8, "intermediate_size": 64, "head_dim": 64}
"""An embedding is always stored, a bit a number at least; the other may be a default that a family has no use for."""

A_LENGTH = f"a model's length is a number of tokens from 1 to {MOST}"
LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")
COUNTS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size"),
)
MAX_FACTOR = 65_536
MAX_BASE = 1e20
PARTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"),
    "num_labels",
)
"""What transformers makes lists of as long as these say, before it looks at any other value."""
MAX_PARTS = 65_536
MAX_LAYERS = 1024
"""A model may share its layers' weights; beyond so many layers, each has some of its own or there are none."""

POSITIVE = ("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
OF_ROTATION = (
    *LENGTHS,
    *POSITIVE,
    "rope_theta",
    "partial_rotary_factor",
    "short_factor",
    "long_factor",
    "rope_type",
    "mrope_section",
)
NEEDED = {
    "linear": ("rope_theta", "factor"),
    "dynamic": ("rope_theta", "factor"),
    "yarn": ("rope_theta",),
    "longrope": ("rope_theta", "short_factor", "long_factor", LENGTHS[1]),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", LENGTHS[1]),
}
"""What null is no value for, by rope_type."""

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
"""Of weights, as configs name them; those of 8 bits and fewer are a scheme's."""

ALIASES = ("half", "float", "double")

DUAL_CHUNK = "dual_chunk_attention_config"
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
ROPE = ("rope_parameters", "rope_scaling")
REMEDY = "download it again, or correct it"


@dataclass(frozen=True, slots=True)
class Stored:
    """What the files of a model hold."""

    num_tensors: int
    num_bytes: int
    embedding: tuple[int, ...] = ()
    """The shape of the table of its tokens, [vocabulary, width], where one has a usual name."""


def wrong_in(config: Mapping[str, Any], stored: Stored | None = None) -> str | None:
    """The first value that cannot be, and what to do about it; None where there is none."""
    config = whole_numbers(config)
    inner = config.get("text_config")
    if inner is not None and not isinstance(inner, Mapping):
        return f"'text_config' is {shown(inner)}, and it is an object: {REMEDY}"
    if isinstance(inner, Mapping) and not isinstance(inner.get("model_type", ""), str):
        return f"'text_config.model_type' is {shown(inner['model_type'])}, and it is a name: {REMEDY}"
    for values in (config, inner if isinstance(inner, Mapping) else {}):
        kinds = values.get("layer_types")
        if kinds is not None and not isinstance(kinds, list | tuple):
            return f"'layer_types' is {shown(kinds)}, and it is a list: {REMEDY}"
        wrong = next(_complaints(values, stored), None)
        if wrong is not None:
            return wrong
    return next(_too_many_parts(config), None)


def _too_many_parts(values: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _too_many_parts(value, f"{where}{name}.")
        elif name in PARTS and isinstance(value, int | float) and value > MAX_PARTS:
            yield f"'{where}{name}' is {shown(value)}, and no model has more than {MAX_PARTS}: {REMEDY}"


def _complaints(values: Mapping[str, Any], stored: Stored | None) -> Iterator[str]:
    turns = any(name in values for name in (*ROPE, "rope_theta"))
    for name in LENGTHS:
        known = name in values and (values[name] is not None or (turns and name == LENGTHS[0]))
        if known and not _is_count(values[name]):
            yield f"'{name}' is {shown(values[name])}, and {A_LENGTH}: {REMEDY}"
    for name in COUNTS:  # a few families have none of some, or one a layer
        if isinstance(values.get(name), int | float | str) and not _is_count(values[name]):
            yield f"'{name}' is {shown(values[name])}, and {_wanted_of_count(name, values[name], stored)}: {REMEDY}"
    for name in ROPE:
        yield from _of_rotation(name, values.get(name))
    yield from _of_rotation("", {name: values.get(name) for name in ("rope_theta", "partial_rotary_factor")})
    yield from _not_finite("", values)
    yield from _of_other_kinds(values)
    for name, value in values.items():
        if type(value) not in (int, float):
            continue
        if str(name).endswith(("_eps", "epsilon")) and not 0 < value <= 1:
            yield f"'{name}' is {shown(value)}, and what keeps a norm from dividing by zero lies above 0: {REMEDY}"
        if name in CAPS and value <= 0:
            yield f"'{name}' is {shown(value)}, and scores are capped at a number above 0, or not at all: {REMEDY}"
    if stored is not None:
        yield from _more_than_stored(values, stored)


def _of_other_kinds(values: Mapping[str, Any]) -> Iterator[str]:
    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        if isinstance(value, int | float | list) or (
            isinstance(value, str) and _bare(value) not in (*DTYPES, *ALIASES)
        ):
            yield f"'{name}' is {shown(value)}, and weights are of {', '.join(DTYPES[1:])}: {REMEDY}"
    if "auto_map" in values and not isinstance(values["auto_map"], Mapping):
        yield f"'auto_map' is {shown(values['auto_map'])}, and it is an object: {REMEDY}"
    heads, key_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(key_heads, int) and key_heads > heads > 0:
        yield f"'num_key_value_heads' is {key_heads}, more than the {heads} of num_attention_heads: {REMEDY}"
    chosen = values.get("num_experts_per_tok")
    for name in EXPERTS:
        experts = values.get(name)
        if type(chosen) is int and type(experts) is int and experts > 0 and not 0 <= chosen <= experts:
            yield f"'num_experts_per_tok' is {chosen}, and '{name}' {experts}: {REMEDY}"
    window, chunks = values.get("sliding_window"), values.get(DUAL_CHUNK)
    if isinstance(window, int | float) and abs(window) > MOST:
        yield f"'sliding_window' is {shown(window)}, and a window is a number of tokens, {MOST} at most: {REMEDY}"
    if chunks is not None and not isinstance(chunks, Mapping):
        yield f"'{DUAL_CHUNK}' is {shown(chunks)}, and it is an object: {REMEDY}"
    yield from _of_dual_chunk(chunks if isinstance(chunks, Mapping) else None)


def _of_dual_chunk(chunks: Mapping[str, Any] | None) -> Iterator[str]:
    if chunks is None:
        return
    for name in ("chunk_size", "local_size"):
        if name not in chunks:
            yield f"'{DUAL_CHUNK}' has no '{name}', a number of tokens: {REMEDY}"
    for name, value in chunks.items():
        if name in ("chunk_size", "local_size", LENGTHS[1]) and not _is_count(value):
            yield f"'{DUAL_CHUNK}.{name}' is {shown(value)}, and it is a number of tokens from 1 to {MOST}: {REMEDY}"
    if not chunks["local_size"] < chunks["chunk_size"]:
        sizes = f"{shown(chunks['local_size'])}, and its 'chunk_size' {shown(chunks['chunk_size'])}"
        yield f"'{DUAL_CHUNK}.local_size' is {sizes}, of which it is a part: {REMEDY}"


def _bare(dtype: str) -> str:
    return dtype.removeprefix("torch.")


def _of_rotation(where: str, rotation: Any) -> Iterator[str]:
    """The faults of one dictionary of rotation, or of one for each kind of layer."""
    if rotation is None:
        return
    if not isinstance(rotation, Mapping):
        yield f"'{where}' is {shown(rotation)}, and it is an object: {REMEDY}"
        return
    for name, value in rotation.items():
        path = f"{where}.{name}" if where else name
        if isinstance(value, Mapping) and name not in OF_ROTATION:
            yield from _of_rotation(path, value)
        elif (wanted := _wanted_of_rotation(name, value)) is not None:
            yield f"'{path}' is {shown(value)}, and {wanted}: {REMEDY}"
    yield from _not_finite(f"{where}." if where else "", rotation)
    for name in NEEDED.get(str(rotation.get("rope_type", rotation.get("type"))), ()):
        if name in rotation and rotation[name] is None:
            yield f"'{where}.{name}' is null, and this rope_type needs it: {REMEDY}"
    low, high = rotation.get("low_freq_factor"), rotation.get("high_freq_factor")
    if isinstance(low, int | float) and isinstance(high, int | float) and 0 < high <= low:
        yield f"'{where}.high_freq_factor' is {shown(high)}, and it lies above low_freq_factor, {shown(low)}: {REMEDY}"


def _wanted_of_rotation(name: str, value: Any) -> str | None:
    """What a value of this name must be, where it is not; null leaves what is usual."""
    if value is None:
        return None
    if name in LENGTHS:
        return None if _is_count(value) else A_LENGTH
    if name in ("factor", "attention_factor") and _is_positive(value) and value > MAX_FACTOR:
        return f"positions and scores are stretched by {MAX_FACTOR} at most"
    if name in POSITIVE:
        return None if _is_positive(value) else "it is a number above 0"
    if name == "rope_theta":
        if not _is_positive(value):
            return "it is a number above 0"
        return None if 1 < value <= MAX_BASE else f"the base of a rotation lies above 1, up to {MAX_BASE:.0e}"
    if name == "partial_rotary_factor":
        return None if _is_positive(value) and value <= 1 else "it is a share of a head's dims, above 0 and up to 1"
    if name in ("short_factor", "long_factor"):
        whole = isinstance(value, list) and value and all(map(_is_positive, value))
        return None if whole else "it is a list of numbers above 0"
    if name == "mrope_section":
        whole = isinstance(value, list) and all(type(part) is int and part >= 0 for part in value)
        return None if whole else "it is a list of whole numbers"
    if name == "rope_type":
        return None if isinstance(value, str) else "it is a name"
    return None


def _not_finite(prefix: str, values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"'{prefix}{name}' is {shown(value)}, and it is a finite number: {REMEDY}"


def _more_than_stored(values: Mapping[str, Any], stored: Stored) -> Iterator[str]:
    layers, width = values.get("num_hidden_layers"), values.get("hidden_size")
    if isinstance(layers, int) and layers > max(stored.num_tensors, MAX_LAYERS):
        yield f"'num_hidden_layers' is {shown(layers)}, and {stored.num_tensors} weights are stored: {REMEDY}"
    for name, most in NUMBERS_A_BYTE.items():
        size = values.get(name)
        if isinstance(size, int) and isinstance(width, int) and size * width > most * stored.num_bytes:
            yield (
                f"'{name}' is {shown(size)} and 'hidden_size' {shown(width)}, more numbers than the "
                f"{stored.num_bytes} bytes of weights hold{_as_stored(name, stored)}: {REMEDY}"
            )


def _wanted_of_count(name: str, value: Any, stored: Stored | None) -> str:
    """What a count must be, and what the weights show where they do."""
    if type(value) in (int, float) and value > MOST:
        return f"no model has more than {MOST}{_as_stored(name, stored)}"
    return "it is a whole number from 1 up"


def _as_stored(name: str, stored: Stored | None) -> str:
    if stored is None or len(stored.embedding) != 2 or name not in ("vocab_size", "hidden_size"):
        return ""
    tokens, width = stored.embedding
    return f" (the stored table of tokens has {tokens} of {width} numbers)"


def whole_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with counts and lengths that are whole, but written as 2048.0, as the integers that they are.

    And with dtypes by the names that transformers knows, where they are written as torch prints them.
    """
    return {name: _whole(name, value) for name, value in config.items()}


def _whole(name: str, value: Any) -> Any:
    if name in ("text_config", *ROPE) and isinstance(value, Mapping):
        return whole_numbers(value)
    if name in ("dtype", "torch_dtype") and isinstance(value, str):
        return _bare(value)
    counted = name in (*LENGTHS, *COUNTS) and isinstance(value, float) and value.is_integer() and abs(value) <= MOST
    return int(value) if counted else value


def _is_count(value: Any) -> bool:
    whole = type(value) is int or (type(value) is float and value.is_integer())
    return whole and 1 <= value <= MOST


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def shown(value: Any) -> str:
    """A value as JSON has it, cut short."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the text '{value[:32]}'"
        case list():
            return "a list"
        case Mapping():
            return "an object"
    return repr(value) if isinstance(value, float) or abs(value) < 10**20 else "beyond 20 digits"
