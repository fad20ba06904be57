"""Prefill chunks on the CPU: many query rows of one sequence, through the C kernel.

Chunks of one sequence that stand side by side in a step (its documents are reread at many places) are read together, so
that its keys are turned once. What the kernel needs beside the tensors (which keys, turned by what, seen by which rows)
is the same for all layers of a rotary group, so it is worked out once a step. See kernels/c/chunk.c for runs, passes
and reads.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.cache.cpu.decode import MAX_ROWS, kernel_shape
from prerope.cache.cpu.tables import NO_POSITIONS, READINGS, KernelReading, KeyTurns, query_turns
from prerope.cache.kernels.build import kernels
from prerope.rope.reading import UNBOUNDED, PositionMethod
from torch import Tensor


class _KernelRead(ctypes.Structure):
    """`Read` of kernels/c/attend.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("turns", "query")),
        *((name, ctypes.c_int64) for name in ("first_key", "stop_key", "d_min", "d_max")),
    ]


class _KernelPlan(ctypes.Structure):
    """`Plan` of kernels/c/chunk.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_passes", "num_runs", "num_tiles")),
        *(
            (name, ctypes.c_void_p)
            for name in ("low", "high", "turns", "first_read", "reads", "run_first", "run_start")
        ),
        *((name, ctypes.c_void_p) for name in ("tile_run", "tile_first", "tile_stop", "row_scale", "blocks")),
    ]


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """One sequence of a step, read by one rotary group. `held` owns what `plan` points to."""

    plan: _KernelPlan
    held: tuple[Any, ...]
    method: PositionMethod | None


class _Run(NamedTuple):
    """Rows first … stop − 1 of a plan, which share a reading; row n is at position `start` + n."""

    first: int
    stop: int
    start: int
    reading: KernelReading


@dataclass(slots=True)
class _Read:
    """What the rows of one run see of a pass, and what their queries are turned by."""

    run: int
    edges: tuple[int, int, int, int]  # as in the kernel
    turns: Tensor | None


@dataclass(slots=True)
class _Pass:
    """Keys [low, high) turned in one way, and who reads them."""

    turns: KeyTurns
    low: int
    high: int
    reads: list[_Read] = field(default_factory=list)


def prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    chunks: Sequence[SequenceRows],
    metadata: AttentionMetadata,
    options: AttentionOptions,
) -> Tensor:
    """[R, Hq, Dv]: attention of the rows of one sequence, query [R, Hq, D]; the rest as in `paged_attention`.

    chunks: one after the other in the step, and in the order of their positions; the last one's blocks are all of it.
    """
    query = query.contiguous()
    group_size = query.shape[1] // keys.shape[2]
    key = ("prefill", chunks[0].first, len(query), options.group, options.sliding_window, group_size)
    plan = metadata.plans.get(key)
    if plan is None:
        plan = metadata.plans[key] = _plan(chunks, options, group_size)
    asked = ("shape", key, query.dtype, keys.dtype, keys.shape, values.shape[3], options)
    shape = metadata.plans.get(asked)
    if shape is None:
        shape = metadata.plans[asked] = kernel_shape(query.shape[1], query.dtype, keys, values, plan.method, options)
    needed = kernels.chunk_scratch(ctypes.byref(shape), ctypes.byref(plan.plan))
    scratch = metadata.plans.get("prefill scratch")
    if scratch is None or scratch.numel() < needed:
        scratch = metadata.plans["prefill scratch"] = torch.empty(needed)
    out = query.new_empty(*query.shape[:2], values.shape[3])
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    sinks_at = None if sinks is None else sinks.data_ptr()
    addresses = (query.data_ptr(), keys.data_ptr(), values.data_ptr(), sinks_at, scratch.data_ptr(), out.data_ptr())
    kernels.chunk(ctypes.byref(shape), ctypes.byref(plan.plan), *map(ctypes.c_void_p, addresses))
    return out


def _plan(chunks: Sequence[SequenceRows], options: AttentionOptions, group_size: int) -> PrefillPlan:
    method = options.method(chunks[0])
    positions = torch.cat([torch.arange(chunk.start, chunk.length) for chunk in chunks])
    scale = None if method is None else method.query_scale(positions)
    scale = None if scale is None else scale.float().contiguous()
    runs = [run for chunk in chunks for run in _runs(method, chunk, chunk.first - chunks[0].first)]
    passes = _passes(runs, options.sliding_window or UNBOUNDED)
    counts = [sum(read.run == run for read in p.reads) for p in passes for run in range(len(runs))]
    reads = [(p, read) for p in passes for read in p.reads]
    arrays = [
        *_int64([(p.low, p.high, ctypes.addressof(p.turns.kernel)) for p in passes]),
        np.cumsum([0, *counts], dtype=np.int64),
        *_int64([(run.first, run.start) for run in runs]),
        *_int64(_tiles(runs, MAX_ROWS // group_size, torch.get_num_threads())),
    ]
    low, high, turns, first_read, run_first, run_start, *tiles = (array.ctypes.data for array in arrays)
    kernel_reads = (_KernelRead * len(reads))(
        *(_KernelRead(ctypes.addressof(p.turns.kernel), _address(read.turns), *read.edges) for p, read in reads)
    )
    return PrefillPlan(
        plan=_KernelPlan(
            len(passes), len(runs), len(arrays[-1]),
            low, high, turns, first_read, ctypes.addressof(kernel_reads), run_first, run_start,
            *tiles, _address(scale), chunks[-1].block_table.data_ptr(),
        ),
        held=(arrays, kernel_reads, passes, runs, scale, chunks),
        method=method,
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _runs(method: PositionMethod | None, chunk: SequenceRows, row: int) -> list[_Run]:
    """The runs of a chunk whose first row is this row of the plan."""
    start = chunk.start - row
    if method is None:
        return [_Run(row, row + chunk.count, start, NO_POSITIONS)]
    return [
        _Run(first - start, stop - start, start, READINGS.kept(reading, method.rotary.dim, stop))
        for first, stop, reading in method.runs(chunk.start, chunk.length)
    ]


def _passes(runs: Sequence[_Run], reach: int) -> list[_Pass]:
    """Passes over the keys, reads ordered by run. A row reads its parts in order, those of one map span by span."""
    passes: list[_Pass] = []
    for run, (first, stop, start, reading) in enumerate(runs):
        before, last, least = None, -1, 0
        for part, (turns, edges) in enumerate(zip(reading.turns, reading.edges, strict=True)):
            if turns is not before:  # whether or not anything is read of the parts between two of one map
                before, least = turns, last + 1
            first_key, stop_key, d_min, d_max = *edges[:3], min(edges[3], reach)
            low, high = max(first_key, start + first - d_max + 1, 0), min(stop_key, start + stop - d_min)
            if low >= high:
                continue
            last = next((n for n in range(least, len(passes)) if passes[n].turns is turns), len(passes))
            if last == len(passes):
                passes.append(_Pass(turns, low, high))
            own = passes[last]
            own.low, own.high = min(own.low, low), max(own.high, high)
            queries = query_turns(reading, part, start + first, stop - first)
            own.reads.append(_Read(run, (first_key, stop_key, d_min, d_max), queries))
    return passes


def _tiles(runs: Sequence[_Run], most_rows: int, threads: int) -> list[tuple[int, int, int]]:
    """(run, first row, stop row): of much the same size, and as many as the threads can share out without one waiting.

    Five of 96 rows × heads take two threads as long as six would.
    """
    rows = sum(run.stop - run.first for run in runs)
    wanted = -(-rows // (most_rows * threads)) * threads
    tiles = []
    for number, run in enumerate(runs):
        count = run.stop - run.first
        share = max(-(-count // most_rows), min(count, wanted * count // max(1, rows)))
        edges = [run.first + count * n // max(1, share) for n in range(share + 1)]
        tiles += [(number, begin, end) for begin, end in itertools.pairwise(edges)]
    return tiles


def _int64(rows: Sequence[Sequence[int]]) -> list[Any]:
    """Each column as a contiguous array."""
    return [np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)]
