"""Values of a config that no model has, told before anything is made of them: lengths, sizes, factors of rotation.

transformers refuses some in words about its own classes, and takes others: then what is built from them is NaN, or more
than any machine holds. A size is bounded by what is stored, whose numbers take a bit each at least.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MOST = 2**31 - 1

NUMBERS_A_BYTE = {"vocab_size": 8, "intermediate_size": 64}
"""An embedding is always stored, a bit a number at least; the other may be a default that a family has no use for."""

LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")
COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MAX_FACTOR = 65_536
ROPE = ("rope_parameters", "rope_scaling")
REMEDY = "download it again, or correct it"


@dataclass(frozen=True, slots=True)
class Stored:
    """What the files of a model hold."""

    num_tensors: int
    num_bytes: int


def wrong_in(config: Mapping[str, Any], stored: Stored | None = None) -> str | None:
    """The first value that cannot be, and what to do about it; None where there is none."""
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, Mapping) else {}):
        wrong = next(_complaints(values, stored), None)
        if wrong is not None:
            return wrong
    return None


def _complaints(values: Mapping[str, Any], stored: Stored | None) -> Iterator[str]:
    turns = any(name in values for name in (*ROPE, "rope_theta"))
    for name in LENGTHS:
        known = name in values and (values[name] is not None or (turns and name == LENGTHS[0]))
        if known and not _is_count(values[name]):
            yield f"'{name}' is {shown(values[name])}, and a model's length is a number of tokens: {REMEDY}"
    for name in COUNTS:  # a few families have none of some, or one a layer
        if isinstance(values.get(name), int | float | str) and not _is_count(values[name]):
            yield f"'{name}' is {shown(values[name])}, and it is a whole number from 1 up: {REMEDY}"
    for name in ROPE:
        yield from _of_rotation(name, values.get(name))
    if "rope_theta" in values:
        yield from _of_rotation("", {"rope_theta": values["rope_theta"]})
    if stored is not None:
        yield from _more_than_stored(values, stored)


def _of_rotation(where: str, said: Any) -> Iterator[str]:
    """Of one dictionary, or of one for each kind of layers."""
    if said is None:
        return
    if not isinstance(said, Mapping):
        yield f"'{where}' is {shown(said)}, and it is an object: {REMEDY}"
        return
    for name, value in said.items():
        path = f"{where}.{name}" if where else name
        if isinstance(value, Mapping):
            yield from _of_rotation(path, value)
        elif name in LENGTHS and value is not None and not _is_count(value):
            yield f"'{path}' is {shown(value)}, and a model's length is a number of tokens: {REMEDY}"
        elif name == "factor" and _is_positive(value) and value > MAX_FACTOR:
            yield f"'{path}' is {shown(value)}, and positions are stretched by {MAX_FACTOR} at most: {REMEDY}"
        elif name in ("rope_theta", "factor") and value is not None and not _is_positive(value):
            yield f"'{path}' is {shown(value)}, and it is a number above 0: {REMEDY}"


def _more_than_stored(values: Mapping[str, Any], stored: Stored) -> Iterator[str]:
    layers, width = values.get("num_hidden_layers"), values.get("hidden_size")
    if isinstance(layers, int) and layers > stored.num_tensors:
        yield f"'num_hidden_layers' is {shown(layers)}, and {stored.num_tensors} weights are stored: {REMEDY}"
    for name, most in NUMBERS_A_BYTE.items():
        size = values.get(name)
        if isinstance(size, int) and isinstance(width, int) and size * width > most * stored.num_bytes:
            yield (
                f"'{name}' is {shown(size)} and 'hidden_size' {shown(width)}, more numbers than the "
                f"{stored.num_bytes} bytes of weights hold: {REMEDY}"
            )


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST


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
