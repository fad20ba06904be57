"""What a deployment or a request asks of the position method, before a model is known. A leaf: not even torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

METHOD_NAMES: tuple[str, ...] = (
    "auto",
    "model",
    "rope",
    "linear",
    "dynamic_linear",
    "ntk",
    "ntk_fixed",
    "ntk_mixed",
    "ntk_by_parts",
    "dynamic_ntk",
    "yarn",
    "dynamic_yarn",
    "longrope",
    "llama3",
    "proportional",
    "xpos",
    "rerope",
    "jagged_rerope",
    "leaky_rerope",
    "dynamic_leaky",
    "dynamic_rerope",
    "self_extend",
    "dpe",
    "dual_chunk",
    "string",
    "streaming",
)
"""Every name that ROPE_METHOD takes, beside the aliases. `rope.methods` has one entry for each but the first two."""

ALIASES: dict[str, str] = {"offset": "rope", "pi": "linear", "leaky": "leaky_rerope", "dca": "dual_chunk"}

MAX_GROUP = 65_536
"""Tokens that may share a far position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """A method by name and the parameters given for it; None is the method's default.

    Attributes:
        method: one of `METHOD_NAMES` or `ALIASES`.
        factor: target length ÷ trained length (s), or dynamic_ntk's f.
        window: w, in tokens: keys nearer than this are read at their exact distance.
        leak: k, tokens past the window that count as one position (1/k is Leaky ReRoPE's slope).
        group: tokens that share a far position (Self-Extend's G), or that are near or far together (jagged ReRoPE's B).
        sinks: the first tokens of a prompt, which every row reads (StreamingLLM's S).
        logn: scale row i's query by max(1, ln(i+1) / ln L).
        select: far tokens that a row of a reply reads, chosen by its query; None reads all.
        train_length: L, in tokens; None takes the model config's.
        groups: tokens that share a far position, of each of as many equal shares of the pairs, the fastest first (DPE).
    """

    method: str = "auto"
    factor: float | None = None
    window: int | None = None
    leak: float | None = None
    group: int | None = None
    sinks: int | None = None
    select: int | None = None
    logn: bool = False
    train_length: int | None = None
    groups: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> RopeSpec:
        """NAME, or NAME:parameter=value:…:logn, as in `rerope:window=2048:logn`. ValueError says what is allowed."""
        name, *parameters = text.strip().split(":")
        if name not in METHOD_NAMES and name not in ALIASES:
            raise ValueError(f"{name!r} is no position method; there are {', '.join(METHOD_NAMES)}")
        fields: dict[str, Any] = {}
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if parameter == "logn":
                fields["logn"] = True
                continue
            try:
                fields[key] = PARAMETERS[key](value)
            except (KeyError, ValueError):
                allowed = ", ".join(f"{name}=…" for name in PARAMETERS)
                raise ValueError(f"{parameter!r} in {text!r}: a method takes {allowed} and logn") from None
        return replace(cls(method=name), **fields)

    def written(self) -> dict[str, str]:
        """The numbers that are given, as `parse` reads them."""
        given = {name: getattr(self, name) for name in PARAMETERS}
        return {
            name: "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
            for name, value in given.items()
            if value is not None
        }


LayerMethods = Mapping[str, RopeSpec]
"""Layers, as `layer_numbers` reads them → the method that `auto` is there."""


def parse_layers(text: str) -> LayerMethods:
    """LAYERS=METHOD,…, as in 5-9+12=rerope:window=2048,20-29=streaming. ValueError says what is wrong."""
    found: dict[str, RopeSpec] = {}
    taken: set[int] = set()
    for one in filter(None, (part.strip() for part in text.split(","))):
        layers, _, method = one.partition("=")
        numbers = layer_numbers(layers)
        spec = RopeSpec.parse(method)
        if spec.method == "auto" or spec.select is not None:
            raise ValueError(f"{method!r} for layers {layers}: auto and select are for all layers")
        if taken & numbers:
            raise ValueError(f"layer {min(taken & numbers)} is named twice in {text!r}")
        taken |= numbers
        found[layers] = spec
    return found


def layer_numbers(text: str) -> frozenset[int]:
    """Numbers and spans with both ends between plus signs, as in 5-9+12. ValueError where it is something else."""
    numbers: set[int] = set()
    for part in text.split("+"):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if first > last:
            raise ValueError(f"{text!r} are no layers: they are written as in 5-9+12")
        numbers |= set(range(first, last + 1))
    return frozenset(numbers)


def parse_groups(text: str) -> tuple[int, ...]:
    """Numbers between hyphens, as in 2-8-32."""
    return tuple(int(number) for number in text.split("-"))


PARAMETERS: dict[str, Callable[[str], Any]] = {
    "factor": float,
    "window": int,
    "leak": float,
    "group": int,
    "sinks": int,
    "select": int,
    "train_length": int,
    "groups": parse_groups,
}
"""Fields of a `RopeSpec` that take a number or several."""
