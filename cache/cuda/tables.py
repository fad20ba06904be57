"""Angles on a device: made there in fp64 once, rounded to fp32, and kept in slots across steps.

Two tables a key map, in tiles of n keys: κ(base) of each tile, and κ(base + n) − κ(base), which all tiles share. So a
map of a length-dependent method costs rows for a tile's n keys and for every n-th key, not for every key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from prerope.cache.transfer import send
from prerope.rope.reading import AngleMap
from torch import Tensor

Held = TypeVar("Held", bound=Hashable)

KeyMap = tuple[AngleMap, Tensor | None]
"""A part's map of keys to angles, and how fast its pairs fade; both are compared by identity."""

LONGEST = 2**30
"""Positions and distances are int32 in kernels; nothing is longer."""


class Slots(Generic[Held]):
    """Rows of preallocated tensors by what they are made from, least recently used first to go.

    What one step looked up stays until the next: where there is no room for all of it, new tensors are made.
    """

    def __init__(self, allocate: Callable[[int], None], fill: Callable[[int, Held], None]) -> None:
        self._allocate, self._fill = allocate, fill
        self._held: OrderedDict[Held, int] = OrderedDict()
        self._step: object = None
        self._used = set[Held]()  # in this step
        self._capacity = 0
        self.version = 0  # of the tensors

    def reserve(self, count: int) -> None:
        """Make room for `count` at once. Tensors that are too small are made anew, and all slots filled anew."""
        if count > self._capacity:
            self._capacity = max(8, count)
            self.clear()

    def clear(self) -> None:
        """Make the tensors anew."""
        self._held.clear()
        self._used.clear()
        self.version += 1
        self._allocate(self._capacity)

    def find(self, wanted: Iterable[Held], step: object) -> dict[Held, int]:
        """The slot of each wanted item, filled."""
        if step is not self._step:
            self._step = step
            self._used.clear()
        wanted = set(wanted)
        needed = len(self._used | wanted)
        if needed > self._capacity:
            self.reserve(1 << needed.bit_length())
        self._used |= wanted
        for held in wanted & self._held.keys():
            self._held.move_to_end(held)
        for held in wanted - self._held.keys():
            full = len(self._held) == self._capacity
            slot = self._held.popitem(last=False)[1] if full else len(self._held)
            self._held[held] = slot
            self._fill(slot, held)
        return {held: self._held[held] for held in wanted}


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
        self._slots = Slots[KeyMap](self._allocate, self._fill)
        self._slots.reserve(1)  # never without tensors

    def find(self, wanted: Iterable[KeyMap], length: int, step: object) -> dict[KeyMap, int]:
        """The slots of these maps; length: keys of the longest sequence."""
        self.reserve(1, length)
        return self._slots.find(wanted, step)

    def reserve(self, count: int, length: int) -> None:
        """Make room for `count` maps at once, of `length` keys each."""
        rows = -(-length // self._tile)
        if rows > self._rows:
            self._rows = 1 << (rows - 1).bit_length()
            self._slots.clear()
        self._slots.reserve(count)

    @property
    def version(self) -> int:
        return self._slots.version

    @property
    def num_bytes(self) -> int:
        return self.base_turns.nbytes + self.key_turns.nbytes + self.decay.nbytes

    @torch.inference_mode(False)
    def _allocate(self, capacity: int) -> None:
        """New tensors, not resized ones: a step that still runs keeps those that it was planned with."""
        self.base_turns = torch.zeros(capacity, self._rows, 2, self._pairs, device=self._device)
        self.key_turns = torch.zeros(capacity, self._tile, 2, self._pairs, device=self._device)
        self.decay = torch.zeros(capacity, self._pairs, device=self._device)

    def _fill(self, slot: int, held: KeyMap) -> None:
        angles, decay = held
        assert angles.cap is None, "a key map has no cap"
        own = on_device(angles, self._device)
        tiles = min(self._rows, -(-(angles.period or LONGEST) // self._tile))
        bases = torch.arange(tiles, device=self._device) * self._tile
        steps = torch.arange(self._tile, device=self._device)
        self.base_turns[slot, :tiles] = cos_sin(own.angles(bases))
        self.key_turns[slot] = cos_sin(own.turned(steps))
        self.decay[slot] = 0.0 if decay is None else send(decay.float(), self._device)


class QueryAngles:
    """Query maps, [slots, 3, D/2] fp64: θ, offsets, and 1/groups. A step's few rows are turned anew."""

    maps: Tensor

    def __init__(self, pairs: int, device: torch.device) -> None:
        self._pairs, self._device = pairs, device
        self._slots = Slots[AngleMap](self._allocate, self._fill)

    def find(self, wanted: Iterable[AngleMap], step: object) -> dict[AngleMap, int]:
        return self._slots.find(wanted, step)

    def reserve(self, count: int) -> None:
        self._slots.reserve(count)

    @property
    def version(self) -> int:
        return self._slots.version

    def turns(self, places: Tensor, slots: Tensor, factors: Tensor) -> Tensor:
        """[N] positions within the maps, slots and factors fp32 → [N, 2, D/2] fp32."""
        theta, offset, share = self.maps[slots].unbind(1)
        angles = (places[:, None] * share).floor_() * theta + offset
        return cos_sin(angles) * factors[:, None, None]

    @torch.inference_mode(False)
    def _allocate(self, capacity: int) -> None:
        self.maps = torch.zeros(capacity, 3, self._pairs, dtype=torch.float64, device=self._device)

    def _fill(self, slot: int, angles: AngleMap) -> None:
        theta = angles.theta
        offset = torch.zeros_like(theta) if angles.offset is None else angles.offset
        share = torch.ones_like(theta) if angles.groups is None else 1 / angles.groups.double()  # exact: powers of two
        self.maps[slot] = send(torch.stack([theta, offset, share]), self._device)


def on_device(angles: AngleMap, device: torch.device) -> AngleMap:
    offset, groups = (None if tensor is None else send(tensor, device) for tensor in (angles.offset, angles.groups))
    return replace(angles, theta=send(angles.theta, device), offset=offset, groups=groups)


def cos_sin(angles: Tensor) -> Tensor:
    """[n, D/2] fp64 → [n, 2, D/2] fp32."""
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def places_of(angles: AngleMap, positions: NDArray[np.int32]) -> NDArray[np.int32]:
    """Positions within the map: the numbers that it multiplies θ by, once each pair's groups are counted."""
    if angles.period is not None:
        positions = positions % angles.period
    positions = positions // angles.group + angles.shift
    return positions if angles.cap is None else np.minimum(positions, angles.cap)
