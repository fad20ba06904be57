"""Prefill chunks on the CPU: many query rows of one sequence, through the C kernel.

What the kernel needs beside the tensors (which keys, turned by what, seen by which rows) is the same for all layers of
a rotary group, so it is worked out once a step. See `kernels/c/prefill.c` for runs, passes and reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.cache.cpu.decode import DTYPES, MAX_DIM
from prerope.cache.cpu.tables import key_table, query_table
from prerope.cache.kernels.build import library
from prerope.rope.reading import UNBOUNDED, AngleMap, Part, Reading
from prerope.rope.rotation import Table
from torch import Tensor

TILE_ROWS = 96  # rows × query heads of a KV head that the kernel takes at once
ROWS = 6  # of its products; a tile is filled up to a multiple


def can_prefill(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel is there and takes these shapes and dtypes."""
    return (
        library() is not None
        and keys.dtype in DTYPES
        and query.dtype in DTYPES
        and max(keys.shape[3], values.shape[3]) <= MAX_DIM
        and query.shape[1] // keys.shape[2] <= TILE_ROWS
    )


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("query_heads", "kv_heads", "head_dim", "value_dim", "rotary_dim")),
        *((name, ctypes.c_int64) for name in ("block_size", "start", "query_dtype", "dtype", "interleaved")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_passes", "num_runs", "num_tiles")),
        *((name, ctypes.c_void_p) for name in ("low", "high", "key_cos", "key_sin", "reads")),
        *((name, ctypes.c_void_p) for name in ("first_key", "stop_key", "d_min", "d_max", "query_cos", "query_sin")),
        *((name, ctypes.c_void_p) for name in ("run_first", "tile_run", "tile_first", "tile_stop", "tile_state")),
        *((name, ctypes.c_void_p) for name in ("row_scale", "blocks")),
    ]


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """One sequence of a step, read by one rotary group. `owned` holds what `plan` points to."""

    plan: _Plan
    owned: list[Any]
    rotary_dim: int
    interleaved: bool


@dataclass(slots=True)
class _Read:
    """What the rows of one run see of a pass."""

    run: int
    part: Part | None  # None: a layer without positions
    table: Table | None
    reach: int

    def edges(self) -> tuple[int, int, int, int]:
        if self.part is None:
            return 0, UNBOUNDED, 0, self.reach
        return self.part.edges(self.reach)


@dataclass(slots=True)
class _Pass:
    """Keys [low, high) turned in one way, and who reads them."""

    low: int
    high: int
    part: Part | None
    reading: Reading | None
    reads: list[_Read] = field(default_factory=list)


def prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequence: SequenceRows,
    metadata: AttentionMetadata,
    options: AttentionOptions,
) -> Tensor:
    """[R, Hq, Dv] fp32: attention of the rows of one sequence, query [R, Hq, D]; the rest as in `paged_attention`."""
    kernel = library()
    assert kernel is not None
    query = query.contiguous()
    group_size = query.shape[1] // keys.shape[2]
    key = ("prefill", sequence.first, options.group, options.sliding_window, group_size)
    plan = metadata.plans.get(key)
    if plan is None:
        plan = metadata.plans[key] = _plan(sequence, options, group_size)
    shape = _Shape(
        query.shape[1], keys.shape[2], keys.shape[3], values.shape[3], plan.rotary_dim,
        metadata.block_size, sequence.start, DTYPES[query.dtype], DTYPES[keys.dtype], plan.interleaved,
        options.scale, options.softcap or 0.0,
    )  # fmt: skip
    needed = kernel.prerope_prefill_scratch(ctypes.byref(shape), ctypes.byref(plan.plan))
    scratch = metadata.plans.get("prefill scratch")
    if scratch is None or scratch.numel() < needed:
        scratch = metadata.plans["prefill scratch"] = torch.empty(needed)
    out = torch.empty(query.shape[0], query.shape[1], values.shape[3])
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    pointers = [
        None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
        for tensor in (query, keys, values, sinks, scratch, out)
    ]
    kernel.prerope_prefill(ctypes.byref(shape), ctypes.byref(plan.plan), *pointers)
    return out


def _plan(sequence: SequenceRows, options: AttentionOptions, group_size: int) -> PrefillPlan:
    method = options.method(sequence)
    positions = torch.arange(sequence.start, sequence.length)
    scale = None if method is None else method.query_scale(positions)
    runs, passes = _passes(sequence, options)
    tiles = _tiles(runs, group_size)
    tables = [None if p.reading is None else _key_table(p, sequence.start) for p in passes]
    reads = [read for p in passes for read in p.reads]
    counts = [sum(read.run == run for read in p.reads) for p in passes for run in range(len(runs))]
    scales = None if scale is None else scale.float().contiguous()
    arrays = [
        *_int64([(p.low, p.high) for p in passes]),
        *_pointers(tables),
        np.cumsum([0, *counts], dtype=np.int64),
        *_int64([read.edges() for read in reads]),
        *_pointers([read.table for read in reads]),
        *_int64([(first,) for first, _ in runs]),
        *_int64([tile[:3] for tile in tiles]),
        np.cumsum([0, *(tile[3] for tile in tiles)], dtype=np.int64),
        np.zeros(0) if scales is None else scales.numpy(),
        sequence.block_table.numpy().astype(np.int32),
    ]
    addresses = [array.ctypes.data if array.size else None for array in arrays]
    return PrefillPlan(
        plan=_Plan(len(passes), len(runs), len(tiles), *addresses),
        owned=[arrays, scales, tables, reads],
        rotary_dim=0 if method is None else method.rotary.dim,
        interleaved=method is not None and method.rotary.interleaved,
    )


def _passes(sequence: SequenceRows, options: AttentionOptions) -> tuple[list[tuple[int, int]], list[_Pass]]:
    """Runs [first, stop) in rows of the chunk; and the passes, their reads ordered by run."""
    method, start = options.method(sequence), sequence.start
    reach = UNBOUNDED if options.sliding_window is None else options.sliding_window
    if method is None:
        low = max(0, start - reach + 1)
        return [(0, sequence.count)], [_Pass(low, sequence.length, None, None, [_Read(0, None, None, reach)])]
    runs, passes = [], dict[AngleMap | None, _Pass]()
    for run, (first, stop, reading) in enumerate(method.runs(start, sequence.length)):
        runs.append((first - start, stop - start))
        for part in reading.parts:
            low, high = part.keys(first, stop, reach)
            if low >= high:
                continue
            own = passes.setdefault(None if part.key.still else part.key, _Pass(low, high, part, reading))
            own.low, own.high = min(own.low, low), max(own.high, high)
            own.reads.append(_Read(run, part, query_table(reading, part, first, stop, start), reach))
    return runs, list(passes.values())


def _key_table(keys: _Pass, origin: int) -> Table | None:
    assert keys.part is not None
    assert keys.reading is not None
    return key_table(keys.reading, keys.part, keys.low, keys.high, origin)


def _tiles(runs: Sequence[tuple[int, int]], group_size: int) -> list[tuple[int, int, int, int]]:
    """(run, first row, stop row, rows × heads as the kernel keeps them)."""
    size = TILE_ROWS // group_size
    tiles = []
    for run, (first, stop) in enumerate(runs):
        for begin in range(first, stop, size):
            end = min(begin + size, stop)
            tiles.append((run, begin, end, -(-(end - begin) * group_size // ROWS) * ROWS))
    return tiles


def _int64(rows: Sequence[Sequence[int]]) -> list[Any]:
    """Each column as a contiguous array."""
    return [np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)]


def _pointers(tables: Sequence[Table | None]) -> list[Any]:
    """Addresses of cos and of sin; 0 where nothing turns."""
    pairs = [(0, 0) if table is None else (table.cos.data_ptr(), table.sin.data_ptr()) for table in tables]
    return [np.array(column, dtype=np.uint64) for column in zip(*pairs, strict=True)]
