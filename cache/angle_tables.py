"""Angles on a device: made there in fp64 once, rounded to fp32, and kept in slots across steps.

Two tables a key map, in tiles of n keys: κ(base) of each tile, and κ(base + n) − κ(base), which all tiles share. So a
map of a length-dependent method costs rows for a tile's n keys and for every n-th key, not for every key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.transfer import send
from rope.reading import AngleMap

Held = TypeVar("Held")

LONGEST = 2**30
"""Positions and distances are int32 in kernels; nothing is longer."""


class Slots(Generic[Held]):
    """Rows of preallocated tensors by key, least recently used first to go. What a key stands for is held with it."""

    def __init__(self, allocate: Callable[[int], None], fill: Callable[[int, Held], None]) -> None:
        self._allocate, self._fill = allocate, fill
        self._capacity = 0
        self._held: OrderedDict[Hashable, tuple[int, Held]] = OrderedDict()

    def forget(self) -> None:
        self._held.clear()
        self._capacity = 0

    def find(self, wanted: Mapping[Hashable, Held]) -> dict[Hashable, int]:
        """The slot of each key, all filled."""
        if len(wanted) > self._capacity:
            self.forget()
            self._capacity = max(8, 1 << (2 * len(wanted) - 1).bit_length())
            self._allocate(self._capacity)
        for key in wanted.keys() & self._held.keys():
            self._held.move_to_end(key)
        for key in wanted.keys() - self._held.keys():
            full = len(self._held) == self._capacity
            slot = self._held.popitem(last=False)[1][0] if full else len(self._held)
            self._held[key] = slot, wanted[key]
            self._fill(slot, wanted[key])
        return {key: self._held[key][0] for key in wanted}


class KeyTables:
    """Tables of key maps. The maps' `cap` must be None: a key's position never stops growing inside its cycle.

    Attributes:
        base_turns: [slots, rows, 2, D/2] fp32, cos and sin of κ at the first key of each tile of a cycle.
        key_turns: [slots, tile, 2, D/2] fp32, of n steps.
        decay: [slots, D/2] fp32, zeros where nothing fades.
    """

    base_turns: Tensor
    key_turns: Tensor
    decay: Tensor

    def __init__(self, pairs: int, tile: int, device: torch.device) -> None:
        self._pairs, self._tile, self._device = pairs, tile, device
        self._rows = 64
        self._slots = Slots[tuple[AngleMap, Tensor | None]](self._allocate, self._fill)
        self._slots.find({(): (AngleMap(torch.zeros(pairs, dtype=torch.float64)), None)})  # never without tensors

    def find(self, wanted: Mapping[Hashable, tuple[AngleMap, Tensor | None]], length: int) -> dict[Hashable, int]:
        """The slots of maps and decays; length: keys of the longest sequence."""
        rows = -(-length // self._tile)
        if rows > self._rows:
            self._rows = 1 << (rows - 1).bit_length()
            self._slots.forget()
        return self._slots.find(wanted)

    def _allocate(self, capacity: int) -> None:
        """New tensors, not resized ones: a step that still runs keeps those that it was planned with."""
        self.base_turns = torch.zeros(capacity, self._rows, 2, self._pairs, device=self._device)
        self.key_turns = torch.zeros(capacity, self._tile, 2, self._pairs, device=self._device)
        self.decay = torch.zeros(capacity, self._pairs, device=self._device)

    def _fill(self, slot: int, held: tuple[AngleMap, Tensor | None]) -> None:
        angles, decay = held
        assert angles.cap is None, "a key map has no cap"
        own = on_device(angles, self._device)
        tiles = min(self._rows, -(-(angles.period or LONGEST) // self._tile))
        bases = torch.arange(tiles, device=self._device) * self._tile
        steps = torch.arange(self._tile, device=self._device, dtype=torch.float64)
        self.base_turns[slot, :tiles] = cos_sin(own.angles(bases))
        self.key_turns[slot] = cos_sin(steps[:, None] * own.theta)
        self.decay[slot] = 0.0 if decay is None else send(decay.float(), self._device)


class QueryAngles:
    """Frequencies and offsets of query maps, [slots, D/2] fp64: a step's few rows are turned anew."""

    theta: Tensor
    offset: Tensor

    def __init__(self, pairs: int, device: torch.device) -> None:
        self._pairs, self._device = pairs, device
        self._slots = Slots[AngleMap](self._allocate, self._fill)

    def find(self, wanted: Mapping[Hashable, AngleMap]) -> dict[Hashable, int]:
        return self._slots.find(wanted)

    def turns(self, places: Tensor, slots: Tensor, factors: Tensor) -> Tensor:
        """[N] positions within the maps, slots and factors fp32 → [N, 2, D/2] fp32."""
        angles = places[:, None].double() * self.theta[slots] + self.offset[slots]
        return cos_sin(angles) * factors[:, None, None]

    def _allocate(self, capacity: int) -> None:
        self.theta = torch.zeros(capacity, self._pairs, dtype=torch.float64, device=self._device)
        self.offset = torch.zeros_like(self.theta)

    def _fill(self, slot: int, angles: AngleMap) -> None:
        self.theta[slot] = send(angles.theta, self._device)
        self.offset[slot] = 0.0 if angles.offset is None else send(angles.offset, self._device)


def on_device(angles: AngleMap, device: torch.device) -> AngleMap:
    offset = None if angles.offset is None else send(angles.offset, device)
    return replace(angles, theta=send(angles.theta, device), offset=offset)


def cos_sin(angles: Tensor) -> Tensor:
    """[n, D/2] fp64 → [n, 2, D/2] fp32."""
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def places_of(angles: AngleMap, first: int, stop: int) -> NDArray[np.int64]:
    """Positions within the map: what it multiplies θ by."""
    positions = np.arange(first, stop, dtype=np.int64)
    if angles.period is not None:
        positions %= angles.period
    positions = positions // angles.group + angles.shift
    return positions if angles.cap is None else np.minimum(positions, angles.cap)
