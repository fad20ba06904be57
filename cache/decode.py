"""Decode steps on the CPU: one query row a sequence, through the C kernel.

What the kernel needs beside the tensors (which keys, turned by what) is the same for all layers of a rotary group, so
it is worked out once a step. See `kernels/decode.c` for segments, turns and tables.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.attention import AttentionMetadata, AttentionOptions, SequenceRows
from cache.native import library
from rope.reading import PositionMethod, Reading

TILE = 64
ITEM_SEGMENTS = 8  # a work item reads about this many tiles, 512 keys
MAX_GROUP, MAX_DIM = 16, 256
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RAW = -1

Ints = NDArray[np.int32]


def can_decode(query: Tensor, keys: Tensor) -> bool:
    """Whether the kernel is there and takes these shapes and dtypes."""
    return (
        library() is not None
        and keys.dtype in DTYPES
        and keys.shape[3] <= MAX_DIM
        and query.shape[1] // keys.shape[2] <= MAX_GROUP
    )


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("query_heads", "kv_heads", "head_dim", "rotary_dim", "block_size")),
        *((name, ctypes.c_int64) for name in ("max_blocks", "dtype", "interleaved")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("start", "stop", "turn", "table", "turns", "tables")),
        *((name, ctypes.c_void_p) for name in ("item_row", "item_begin", "item_end", "row_items", "blocks")),
    ]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One step of one rotary group. `arrays` own what `plan` points to; scale is c_i, [rows, 1, 1] or None."""

    plan: _Plan
    arrays: list[NDArray[np.int32] | NDArray[np.float32]]
    rows: Tensor
    num_items: int
    max_blocks: int
    rotary_dim: int
    interleaved: bool
    scale: Tensor | None


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Sequence[SequenceRows],
    metadata: AttentionMetadata,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """(packed rows [R], out [R, Hq, D] fp32) of `sequences`, each of one row; arguments as in `paged_attention`."""
    key = ("decode", options.group, options.sliding_window)
    plan = metadata.plans.get(key)
    if plan is None:
        plan = metadata.plans[key] = _plan(sequences, options)
    kernel = library()
    assert kernel is not None
    rows = query[plan.rows].float()
    if plan.scale is not None:
        rows = rows * plan.scale
    rows = rows.contiguous()
    heads, dim = rows.shape[1], rows.shape[2]
    shape = _Shape(
        heads, keys.shape[2], dim, plan.rotary_dim, metadata.block_size, plan.max_blocks,
        DTYPES[keys.dtype], plan.interleaved, options.scale, options.softcap or 0.0,
    )  # fmt: skip
    scratch = torch.empty(plan.num_items * heads * (3 * dim + 2))
    out = torch.empty_like(rows)
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    pointers = [
        None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
        for tensor in (rows, keys, values, sinks, scratch, out)
    ]
    kernel.prerope_decode(ctypes.byref(shape), ctypes.byref(plan.plan), ctypes.c_int64(len(rows)), *pointers)
    return plan.rows, out


class _Builder:
    """Collects segments, turns and tables of a step."""

    def __init__(self, rotary_dim: int) -> None:
        self.rotary_dim = rotary_dim
        self.segments: list[Ints] = []  # each [4, segments]: start, stop, turn, table
        self.turns: list[Tensor] = []
        self.num_turns = 0
        self.tables: list[Tensor] = []
        self._table_of: dict[tuple[int, bool, int], int] = {}

    def add(self, method: PositionMethod | None, position: int, reach: int) -> int:
        """The segments of the row at `position` that reads `reach` keys back; returns how many they are."""
        low = max(0, position - reach + 1)
        before = len(self.segments)
        if method is None:
            self._part(low, position + 1, None, RAW)
        else:
            reading = method.reading(method.row_length(position))
            near = low if reading.window is None else max(low, position - reading.window + 1)
            if low < near:
                self._far(reading, position, low, near)
            self._near(reading, position, near)
        return sum(len(part[0]) for part in self.segments[before:])

    def _near(self, reading: Reading, position: int, low: int) -> None:
        bases = _bases(low, position + 1)
        # (i − t0)·θ is small for near tiles whatever i is, and exact in fp64.
        angles = torch.from_numpy(position - bases).double()[:, None] * reading.theta
        self._part(low, position + 1, (angles, reading), self._table(reading, far=False))

    def _far(self, reading: Reading, position: int, low: int, stop: int) -> None:
        assert reading.theta_far is not None
        angle = reading.far_query_angles(torch.tensor([position]))
        if reading.far_keys_raw:
            self._part(low, stop, (angle, reading), RAW)
            return
        bases = _bases(low, stop)
        tables = [self._table(reading, far=True, phase=int(base) % reading.group) for base in bases]
        self._part(low, stop, (angle - reading.far_key_angles(torch.from_numpy(bases)), reading), tables)

    def _part(self, low: int, stop: int, turn: tuple[Tensor, Reading] | None, table: int | list[int]) -> None:
        bases = _bases(low, stop)
        starts, stops = np.maximum(bases, low), np.minimum(bases + TILE, stop)
        if turn is None:
            turns = np.full(len(bases), RAW)
        else:
            angles, reading = turn
            turns = self.num_turns + (np.arange(len(bases)) if len(angles) > 1 else np.zeros(len(bases)))
            factor = reading.attention_factor**2  # of q and of k, both on the query
            self.turns.append(torch.stack([angles.cos(), angles.sin()], dim=1) * factor)
            self.num_turns += len(angles)
        self.segments.append(np.stack([starts, stops, turns, np.broadcast_to(table, len(bases))]).astype(np.int32))

    def _table(self, reading: Reading, *, far: bool, phase: int = 0) -> int:
        """The angles of a tile's keys past its base's; `phase` is where in a group of far keys the tile begins."""
        key = (id(reading), far, phase)
        if key not in self._table_of:
            places = torch.arange(phase, phase + TILE)
            angles = reading.far_key_angles(places) if far else reading.near_angles(places)
            self._table_of[key] = len(self.tables)
            self.tables.append(torch.stack([angles.cos(), angles.sin()], dim=1))
        return self._table_of[key]


def _bases(low: int, stop: int) -> NDArray[np.int64]:
    """First positions of the tiles that [low, stop) touches."""
    return np.arange(low // TILE, -(-stop // TILE), dtype=np.int64) * TILE


def _plan(sequences: Sequence[SequenceRows], options: AttentionOptions) -> DecodePlan:
    methods = [options.method(sequence) for sequence in sequences]
    rotary = next((method.rotary for method in methods if method is not None), None)
    builder = _Builder(rotary.dim if rotary else 0)
    item_row, item_begin, item_end, row_items, num_segments = [], [], [], [0], 0
    for row, (sequence, method) in enumerate(zip(sequences, methods, strict=True)):
        count = builder.add(method, sequence.start, options.sliding_window or sequence.start + 1)
        for begin in range(num_segments, num_segments + count, ITEM_SEGMENTS):
            item_row.append(row)
            item_begin.append(begin)
            item_end.append(min(begin + ITEM_SEGMENTS, num_segments + count))
        num_segments += count
        row_items.append(len(item_row))
    max_blocks = max(len(sequence.block_table) for sequence in sequences)
    blocks = np.zeros((len(sequences), max_blocks), dtype=np.int32)
    for row, sequence in enumerate(sequences):
        blocks[row, : len(sequence.block_table)] = sequence.block_table.numpy()
    segments = np.ascontiguousarray(np.concatenate(builder.segments, axis=1))
    arrays: list[NDArray[np.int32] | NDArray[np.float32]] = [
        *segments,
        _floats(builder.turns),
        _floats(builder.tables),
        *(np.array(part, dtype=np.int32) for part in (item_row, item_begin, item_end, row_items)),
        blocks,
    ]
    return DecodePlan(
        plan=_Plan(*(array.ctypes.data for array in arrays)),
        arrays=arrays,
        rows=torch.tensor([sequence.first for sequence in sequences]),
        num_items=len(item_row),
        max_blocks=max_blocks,
        rotary_dim=builder.rotary_dim,
        interleaved=bool(rotary and rotary.interleaved),
        scale=_query_scale(sequences, methods),
    )


def _floats(parts: list[Tensor]) -> NDArray[np.float32]:
    floats: NDArray[np.float32] = torch.cat(parts).float().contiguous().numpy() if parts else np.zeros(0, np.float32)
    return floats


def _query_scale(sequences: Sequence[SequenceRows], methods: Sequence[PositionMethod | None]) -> Tensor | None:
    scales = [
        None if method is None else method.query_scale(torch.tensor([sequence.start]))
        for sequence, method in zip(sequences, methods, strict=True)
    ]
    if all(scale is None for scale in scales):
        return None
    return torch.tensor([1.0 if scale is None else float(scale) for scale in scales])[:, None, None]
