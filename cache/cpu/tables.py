"""Readings as the C kernels take them: what keys of each tile and queries of each row are turned by.

A key at j = t0 + n, in the tile that begins at t0, is turned by κ(j) − κ(t0), from a table of one tile that all tiles
alike share, and the query by the rest: φ(i) − κ(t0). Tiles are alike where positions grow alike inside them: most tiles
of any method, not those in which a period ends. So a map of keys costs a row of angles a tile of the context, once, and
a step costs the angles of its own rows. What was used last is kept, up to a number of bytes.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from prerope.cache.kernels.build import kernels
from prerope.rope.reading import UNBOUNDED, AngleMap, PositionMethod, Reading
from torch import Tensor

TILE = 64
"""KEYS of kernels/c/attend.h."""
_MIN_TILES = 64


class KernelTurns(ctypes.Structure):
    """`Turns` of kernels/c/attend.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("bases", "table", "tables", "fades")]


class _KernelMap(ctypes.Structure):
    """`AngleMap` of kernels/c/attend.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("theta", "offset", "groups")),
        *((name, ctypes.c_int64) for name in ("period", "group", "shift", "cap")),
    ]


class _KernelPart(ctypes.Structure):
    """`ReadingPart` of kernels/c/attend.h."""

    _fields_ = [
        ("query", _KernelMap),
        ("turns", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first_key", "stop_key", "d_min", "d_max")),
    ]


class _KernelReading(ctypes.Structure):
    """`Reading` of kernels/c/attend.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_parts", "rotary_dim")),
        ("parts", ctypes.c_void_p),
        ("factor", ctypes.c_double),
        ("decay", ctypes.c_void_p),
    ]


class KeyTurns:
    """One map of keys. `kernel` points to what is held here, and grows with the longest context asked for."""

    def __init__(self, angles: AngleMap | None, decay: Tensor | None) -> None:
        """angles None: keys are read as they lie."""
        assert angles is None or angles.cap is None
        self.kernel = KernelTurns()
        self.num_tiles = 0
        self._angles, self._decay = angles, None if decay is None else decay.numpy()
        self._given = decay  # so that its id stays its own
        self._held: list[NDArray[Any]] = []

    @property
    def grows(self) -> bool:
        return self._angles is not None

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self._held)

    def cover(self, length: int) -> None:
        """From now on the tiles of positions 0 … length − 1 are there. What was there moves: not during a step."""
        assert self._angles is not None
        self.num_tiles = max(_MIN_TILES, 2 ** (-(-length // TILE) - 1).bit_length())
        bases = torch.arange(self.num_tiles) * TILE
        angles = self._angles.angles(bases).numpy()
        of_tile, steps = _alike(self._angles, bases.numpy())
        tables = _cos_sin(self._angles.turned(torch.from_numpy(steps)).numpy())
        self._held = [_cos_sin(-angles).astype(np.float32), of_tile.astype(np.int32)]
        if self._decay is None:
            self._held.append(tables.astype(np.float32))
        else:
            grown = np.exp(-np.arange(TILE)[:, None] * self._decay)
            fades = np.exp(TILE * np.arange(self.num_tiles)[:, None] * self._decay)
            self._held += [(tables * np.tile(grown, 2)).astype(np.float32), fades.astype(np.float32)]
        self.kernel.bases, self.kernel.table, self.kernel.tables = (array.ctypes.data for array in self._held[:3])
        self.kernel.fades = None if self._decay is None else self._held[3].ctypes.data


def _cos_sin(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """[…, D/2] → […, D]: cos, then sin."""
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def _alike(angles: AngleMap, bases: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tiles that begin at `bases` → (number of what each is like, [kinds, TILE] positions from the first key's on)."""
    firsts = bases % angles.period if angles.period is not None else bases
    kind = np.minimum(angles.group - firsts % angles.group, TILE)  # where in its group a tile begins
    if angles.period is not None:
        kind = np.where(firsts + TILE > angles.period, TILE + 1 + firsts, kind)  # a period ends in it
    _, examples, of_tile = np.unique(kind, return_index=True, return_inverse=True)
    places = firsts[examples][:, None] + np.arange(TILE)
    if angles.period is not None:
        places = places % angles.period
    positions = places // angles.group
    return of_tile, positions - positions[:, :1]


class KernelReading:
    """One `Reading` for rows of one rotary embedding; None: a layer without positions.

    `kernel` points to what is held here.
    """

    def __init__(self, reading: Reading | None, rotary_dim: int) -> None:
        self.reading, self.rotary_dim = reading, rotary_dim
        decay = None if reading is None else reading.decay
        parts = () if reading is None else reading.parts
        self.turns = [_turns_of(part.key, decay) for part in parts] or [KeyTurns(None, None)]
        self.edges = [part.edges() for part in parts]
        self.edges = self.edges or [(0, UNBOUNDED, 0, UNBOUNDED)]
        self._growing = [turns for turns in self.turns if turns.grows]
        self._parts = (_KernelPart * len(self.turns))(
            *(
                _KernelPart(query, ctypes.addressof(turns.kernel), *edges)
                for query, turns, edges in zip(
                    [_kernel_map(part.query) for part in parts] or [_KernelMap()], self.turns, self.edges, strict=True
                )
            )
        )
        self.kernel = _KernelReading(
            len(self.turns),
            rotary_dim,
            ctypes.addressof(self._parts),
            1.0 if reading is None else reading.attention_factor**2,
            None if decay is None else decay.data_ptr(),
        )
        self.address = ctypes.addressof(self.kernel)

    def cover(self, length: int) -> bool:
        """Rows up to position length − 1 may be read from now on. Whether that took more memory."""
        grew = False
        for turns in self._growing:
            if turns.num_tiles * TILE < length:
                turns.cover(length)
                grew = True
        return grew


def _kernel_map(angles: AngleMap) -> _KernelMap:
    tensors = (None if tensor is None else tensor.data_ptr() for tensor in (angles.theta, angles.offset, angles.groups))
    cap = UNBOUNDED if angles.cap is None else angles.cap
    return _KernelMap(*tensors, angles.period or 0, angles.group, angles.shift, cap)


_turns: WeakValueDictionary[Hashable, KeyTurns] = WeakValueDictionary()
"""Tables of cos and sin by angle map: maps that share a frequency vector share one. Readings keep them alive."""


def _turns_of(angles: AngleMap, decay: Tensor | None) -> KeyTurns:
    unrotated = angles.unrotated
    key = None if unrotated else (id(angles.theta), angles.period, angles.group, id(angles.groups), id(decay))
    found = _turns.get(key)
    if found is None:
        found = _turns[key] = KeyTurns(None if unrotated else angles, decay)
    return found


class Readings:
    """The most recently used readings, while what their maps keep is within `max_bytes`, and never fewer than one."""

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[int, KernelReading] = OrderedDict()

    def of(self, method: PositionMethod | None, position: int) -> KernelReading:
        """The reading of the row at this position, with tables for all keys up to the row."""
        if method is None:
            return NO_POSITIONS
        return self.kept(method.reading_of(position), method.rotary.dim, position + 1)

    def kept(self, reading: Reading, rotary_dim: int, length: int) -> KernelReading:
        """The kernel's form of a reading, with tables for rows up to length − 1."""
        found = self._kept.get(id(reading))
        if found is None:
            found = self._kept[id(reading)] = KernelReading(reading, rotary_dim)
        else:
            self._kept.move_to_end(id(reading))
        if found.cover(length):
            self._shrink()
        return found

    @property
    def num_bytes(self) -> int:
        """The bytes of all tables. May be called by any thread."""
        maps = {id(turns): turns for kept in list(self._kept.values()) for turns in kept.turns}
        return sum(turns.num_bytes for turns in maps.values())

    def _shrink(self) -> None:
        while len(self._kept) > 1 and self.num_bytes > self._max_bytes:
            self._kept.popitem(last=False)


NO_POSITIONS = KernelReading(None, 0)
READINGS = Readings()


def query_turns(reading: KernelReading, part: int, start: int, count: int) -> Tensor | None:
    """cos|sin [count, D] of the rows from `start` on, as queries of a part; None: they stay as they are."""
    if reading.reading is None:
        return None
    turns = torch.empty(count, reading.rotary_dim)
    arguments = (ctypes.c_int64(number) for number in (part, start, count))
    kernels.query_turns(ctypes.byref(reading.kernel), *arguments, ctypes.c_void_p(turns.data_ptr()))
    return turns
