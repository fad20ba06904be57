"""What one model is offered: which methods it takes and how they resolve, why it does not take the others; and a
method's map, small enough for a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from prerope.rope.frequencies import Rotary
from prerope.rope.model import ModelPositions, resolve_model
from prerope.rope.reading import MethodError
from prerope.rope.registry import METHODS
from prerope.rope.show import seen
from prerope.rope.spec import METHOD_NAMES, RopeSpec

CHOICES = {
    "auto": ("As the model says within its trained length, and the best row-consistent method past it.", ("window",)),
    "model": ("As the model's config says.", ()),
}
"""Summary and parameters of the names that stand for other methods."""

MAP_SIZE = 96
"""Rows and keys of a map, at most."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A method and one model: how it resolves, or why it is refused.

    Attributes:
        takes: parameters that it reads.
    """

    name: str
    summary: str
    use: str
    takes: tuple[str, ...]
    positions: ModelPositions | None
    refusal: str | None = None


def offers(rotaries: Mapping[str, Rotary], max_model_len: int | None) -> list[Offer]:
    """Every method for a model with these rotary groups, read to `max_model_len`, in the order of `METHOD_NAMES`."""
    return [_offer(name, rotaries, max_model_len) for name in METHOD_NAMES]


def _offer(name: str, rotaries: Mapping[str, Rotary], max_model_len: int | None) -> Offer:
    entry = METHODS.get(name)
    summary, takes = CHOICES[name] if entry is None else (entry.summary, entry.takes)
    use = "" if entry is None else entry.use
    try:
        positions = resolve_model(RopeSpec(method=name), rotaries, max_model_len)
    except MethodError as error:
        return Offer(name, summary, use, takes, None, str(error))
    return Offer(name, summary, use, takes, positions)


def rotaries_of(positions: ModelPositions) -> dict[str, Rotary]:
    """The rotary groups of the model that these positions were resolved for."""
    return {group: method.rotary for group, method in positions.methods.items()}


def distance_map(positions: ModelPositions, length: int) -> dict[str, Any]:
    """The distance at which each query sees each key, of `MAP_SIZE` positions spread over a prompt of `length` tokens.

    JSON-ready: `rows` has for each of `positions` the distances of the keys up to it, in tokens as trained, −1 where a
    key is not read; `farthest` is the largest of the last row's. The work does not depend on the length.
    """
    method = positions.methods[positions.main]
    method = replace(method, _readings={})  # what only a map looks at is not kept
    size = min(MAP_SIZE, length)
    places = torch.arange(size) * (length - 1) // (size - 1)
    distances = seen(method, places, places)
    rows = [[round(distance, 1) for distance in row[: place + 1].tolist()] for place, row in enumerate(distances)]
    return {
        "positions": places.tolist(),
        "rows": rows,
        "farthest": max(rows[-1]),
        "train_length": method.train_length,
        "rope": positions.described,
        "warning": " ".join(positions.warnings()) or None,
    }
