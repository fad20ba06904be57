"""Decode steps on the CPU: one query row a sequence, through the C kernel.

What the kernel needs beside the tensors (which keys, turned by what) is the same for all layers of a rotary group, so
it is worked out once a step. See `kernels/c/decode.c` for segments, turns and tables.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.cache.kernels.build import library
from prerope.rope.reading import AngleMap, Part, PositionMethod, Reading
from torch import Tensor

TILE = 64
ITEM_SEGMENTS = 8  # a work item reads about this many tiles, 512 keys
MAX_GROUP, MAX_DIM = 16, 256
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RAW = -1

Ints = NDArray[np.signedinteger[Any]]


def can_decode(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel is there and takes these shapes and dtypes."""
    return (
        library() is not None
        and keys.shape == values.shape
        and keys.dtype in DTYPES
        and keys.shape[3] <= MAX_DIM
        and query.shape[1] // keys.shape[2] <= MAX_GROUP
    )


class DecodeShape(ctypes.Structure):
    """`Shape` of kernels/c/parts.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("query_heads", "kv_heads", "head_dim", "rotary_dim", "block_size")),
        *((name, ctypes.c_int64) for name in ("max_blocks", "dtype", "interleaved")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


class KernelPlan(ctypes.Structure):
    """`Plan` of kernels/c/parts.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("start", "stop", "turn", "table", "turns", "tables")),
        *((name, ctypes.c_void_p) for name in ("item_row", "item_begin", "item_end", "row_items", "blocks")),
    ]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One step of one rotary group. `arrays` own what `plan` points to; scale is c_i, [rows, 1, 1] or None."""

    plan: KernelPlan
    arrays: list[NDArray[np.int32] | NDArray[np.float32]]
    rows: Tensor
    num_items: int
    max_blocks: int
    rotary_dim: int
    interleaved: bool
    scale: Tensor | None

    @property
    def num_rows(self) -> int:
        return self.rows.shape[0]

    def shape(self, query_heads: int, keys: Tensor, options: AttentionOptions) -> DecodeShape:
        """For the kernel; keys [num_blocks, block_size, Hkv, D]."""
        return DecodeShape(
            query_heads, keys.shape[2], keys.shape[3], self.rotary_dim, keys.shape[1], self.max_blocks,
            DTYPES[keys.dtype], self.interleaved, options.scale, options.softcap or 0.0,
        )  # fmt: skip

    def scratch(self, query_heads: int, head_dim: int) -> Tensor:
        """What the kernel wants, fp32."""
        return torch.empty(self.num_items * query_heads * (3 * head_dim + 2))


def plan_step(metadata: AttentionMetadata, options: AttentionOptions) -> DecodePlan | None:
    """The plan of the single rows of a step, for all layers with these options; None where it has none."""
    key = ("decode", options.group, options.sliding_window)
    if key not in metadata.plans:
        single = [sequence for sequence in metadata.sequences if sequence.count == 1]
        metadata.plans[key] = _plan(single, options) if single else None
    plan: DecodePlan | None = metadata.plans[key]
    return plan


def decode(plan: DecodePlan, rows: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions) -> Tensor:
    """Attention of the plan's query rows [R, Hq, D] fp32, in its order → the same shape; keys as in `Attention`."""
    kernel = library()
    assert kernel is not None
    if plan.scale is not None:
        rows = rows * plan.scale
    rows = rows.contiguous()
    shape, scratch = plan.shape(rows.shape[1], keys, options), plan.scratch(rows.shape[1], rows.shape[2])
    out = torch.empty_like(rows)
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    pointers = [
        None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
        for tensor in (rows, keys, values, sinks, scratch, out)
    ]
    kernel.prerope_decode(ctypes.byref(shape), ctypes.byref(plan.plan), ctypes.c_int64(rows.shape[0]), *pointers)
    return out


class _Builder:
    """Collects segments, turns and tables of a step.

    A key at j = base + n of a tile is turned by κ(j) − κ(base), from a table that all tiles at the same place in κ's
    cycle share; the query by φ(i) − κ(base), once a tile.
    """

    def __init__(self, rotary_dim: int) -> None:
        self.rotary_dim = rotary_dim
        self.segments: list[Ints] = []  # each [4, segments]: start, stop, turn, table
        self.turns: list[Tensor] = []
        self.num_turns = 0
        self.tables: list[Tensor] = []
        self._table_of: dict[tuple[int, int], int] = {}

    def add(self, method: PositionMethod | None, position: int, reach: int) -> int:
        """The segments of the row at `position` that reads `reach` keys back; returns how many they are."""
        before = len(self.segments)
        if method is None:
            self._segments(max(0, position - reach + 1), position + 1, RAW, RAW)
        else:
            reading = method.reading_of(position)
            for part in reading.parts:
                low, stop = part.keys(position, position + 1, reach)
                if low < stop:
                    self._part(reading, part, position, low, stop)
        return sum(len(part[0]) for part in self.segments[before:])

    def _part(self, reading: Reading, part: Part, position: int, low: int, stop: int) -> None:
        angles = part.query.angles(torch.tensor([position]))
        if part.key.still:
            self._segments(low, stop, self._turn(angles, reading, None), RAW)
            return
        bases = _bases(low, stop)
        angles = angles - part.key.angles(torch.from_numpy(bases))
        turns = self._turn(angles, reading, torch.from_numpy(position - bases))
        tables = [self._table(reading, part.key, int(base) % part.key.cycle) for base in bases]
        self._segments(low, stop, turns + np.arange(len(bases)), tables)

    def _segments(self, low: int, stop: int, turn: int | Ints, table: int | list[int]) -> None:
        bases = _bases(low, stop)
        columns = np.maximum(bases, low), np.minimum(bases + TILE, stop), turn, table
        self.segments.append(np.stack([np.broadcast_to(column, len(bases)) for column in columns]).astype(np.int32))

    def _turn(self, angles: Tensor, reading: Reading, distance: Tensor | None) -> int:
        """Queries at these angles [n, D/2]; returns the number of the first. Both attention factors are on them."""
        first, factor = self.num_turns, reading.attention_factor**2
        self.turns.append(_cos_sin(angles, reading, distance) * factor)
        self.num_turns += len(angles)
        return first

    def _table(self, reading: Reading, angles: AngleMap, phase: int) -> int:
        """The keys of a tile, from its base on; `phase` is where in its cycle the tile begins."""
        key = (id(angles), phase)
        if key not in self._table_of:
            places = angles.angles(torch.arange(phase, phase + TILE))
            self._table_of[key] = len(self.tables)
            self.tables.append(_cos_sin(places - places[:1], reading, -torch.arange(TILE)))
        return self._table_of[key]


def _cos_sin(angles: Tensor, reading: Reading, distance: Tensor | None) -> Tensor:
    """[n, 2, D/2], faded over [n] tokens where the reading fades."""
    turned = torch.stack([angles.cos(), angles.sin()], dim=1)
    if reading.decay is None or distance is None:
        return turned
    return turned * torch.exp(distance.double()[:, None] * reading.decay)[:, None]


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
        plan=KernelPlan(*(array.ctypes.data for array in arrays)),
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
