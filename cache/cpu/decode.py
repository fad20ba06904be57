"""Few query rows of a sequence on the CPU, through the C kernel: decode steps, drafts, the ends of prompts.

What the kernel needs beside the tensors is the same for all layers of a rotary group, so it is worked out once a step,
in C. See kernels/c/rows.c.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from prerope.cache.attention.selection import UNIT, far_units, units_of
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.cache.cpu.bounds import KeyBounds
from prerope.cache.cpu.tables import READINGS
from prerope.cache.kernels.build import DTYPES, kernels, multiplies_pairs, reads
from prerope.rope.reading import UNBOUNDED, PositionMethod
from torch import Tensor

SPAN = 512
"""Keys that are summed by themselves, of kernels/c/attend.h."""
FEW_ROWS = 32
"""The most rows of a sequence in a step that are planned here; more are a chunk (`cache.cpu.prefill`)."""
MAX_SPANS = 1024
"""Rows times spans that they read, of a sequence with more than one row: what each finds is kept until the end."""
MAX_ROWS, MAX_DIM = 96, 256
"""Limits of kernels/c/attend.h: rows × query heads of a KV head, and dims of a head."""


def can_attend(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernels are there and take these shapes and dtypes."""
    return (
        reads(keys.dtype)
        and reads(query.dtype)
        and max(keys.shape[3], values.shape[3]) <= MAX_DIM
        and query.shape[1] // keys.shape[2] <= MAX_ROWS
    )


class KernelShape(ctypes.Structure):
    """`Shape` of kernels/c/rows.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("query_heads", "kv_heads", "head_dim", "value_dim", "rotary_dim")),
        *((name, ctypes.c_int64) for name in ("block_size", "query_dtype", "dtype", "interleaved", "dots")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("slopes", ctypes.c_void_p),
    ]


def kernel_shape(
    query_heads: int,
    query_dtype: torch.dtype,
    keys: Tensor,
    values: Tensor,
    method: PositionMethod | None,
    options: AttentionOptions,
) -> KernelShape:
    """keys, values: [num_blocks, block_size, Hkv, D or Dv]; method: any of the rotary group's."""
    rotary = None if method is None else method.rotary
    return KernelShape(
        query_heads, keys.shape[2], keys.shape[3], values.shape[3], rotary.dim if rotary else 0,
        keys.shape[1], DTYPES[query_dtype], DTYPES[keys.dtype], bool(rotary and rotary.interleaved),
        keys.dtype == torch.bfloat16 and multiplies_pairs(), options.scale, options.softcap or 0.0,
        None if options.slopes is None else options.slopes.data_ptr(),
    )  # fmt: skip


class _Row(ctypes.Structure):
    """`Row` of kernels/c/rows.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("reading", "blocks")),
        *((name, ctypes.c_int64) for name in ("position", "far_count", "far_first", "far_stop")),
        *((name, ctypes.c_int64) for name in ("units_before", "chosen_before")),
    ]


class KernelPlan(ctypes.Structure):
    """`RowPlan` of kernels/c/rows.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_rows", "num_items", "most_parts", "reach")),
        *((name, ctypes.c_int64) for name in ("num_found", "num_units", "num_chosen")),
        *((name, ctypes.c_void_p) for name in ("rows", "scales", "turns", "items", "row_items")),
    ]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One step of one rotary group. `held` owns what `plan` points to.

    Attributes:
        rows: the packed rows.
    """

    plan: KernelPlan
    held: tuple[Any, ...]
    rows: list[int]
    method: PositionMethod | None

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def selects(self) -> bool:
        """Whether any row leaves far keys out."""
        return bool(self.plan.num_chosen)

    def scratch_size(self, shape: KernelShape) -> int:
        """The size of the scratch buffer that the kernel wants, in fp32 numbers."""
        return int(kernels.rows_scratch(ctypes.byref(shape), ctypes.byref(self.plan)))


def few_rows(sequences: Sequence[SequenceRows]) -> list[SequenceRows]:
    """The sequences that are planned here: those of few rows, unless a neighbour is a piece of the same sequence.

    And all rows that leave far keys out, however many.
    """
    return [
        one
        for place, one in enumerate(sequences)
        if one.count == 1
        or one.start >= one.selects_from
        or (
            one.count <= FEW_ROWS
            and one.count * (one.length // SPAN + 1) <= MAX_SPANS
            and not any(
                map(one.same_sequence, (*sequences[max(0, place - 1) : place], *sequences[place + 1 : place + 2]))
            )
        )
    ]


def split(sequences: Sequence[SequenceRows], options: AttentionOptions) -> Sequence[SequenceRows]:
    """Cut sequences with both kinds of rows in two: rows that read all keys, then rows that choose."""
    if all(one.selected(options) is None for one in sequences):
        return sequences
    parts: list[SequenceRows] = []
    for one in sequences:
        before = one.selects_from - one.start
        if one.selected(options) is None or before <= 0:
            parts.append(one)
            continue
        parts.append(replace(one, count=before))
        parts.append(replace(one, first=one.first + before, start=one.start + before, count=one.count - before))
    return parts


def plan_step(metadata: AttentionMetadata, options: AttentionOptions) -> DecodePlan | None:
    """The plan of a step's sequences of few rows, for all layers with these options; None where there are none."""
    key = ("decode", options.group, options.sliding_window)
    if key not in metadata.plans:
        few = few_rows(split(metadata.sequences, options))
        metadata.plans[key] = _plan(few, options) if few else None
    plan: DecodePlan | None = metadata.plans[key]
    return plan


def decode(
    plan: DecodePlan,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    options: AttentionOptions,
    bounds: KeyBounds | None = None,
) -> Tensor:
    """Attention of the plan's query rows [R, Hq, D], in its order → [R, Hq, Dv]; keys as in `Attention`.

    bounds: where any row chooses by them.
    """
    rows = rows.contiguous()
    shape = kernel_shape(rows.shape[1], rows.dtype, keys, values, plan.method, options)
    out, scratch = rows.new_empty(*rows.shape[:2], values.shape[3]), torch.empty(plan.scratch_size(shape))
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    pointers = [
        None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
        for tensor in (rows, keys, values, bounds.of(keys) if bounds and plan.selects else None, sinks, scratch, out)
    ]
    kernels.rows(ctypes.byref(shape), ctypes.byref(plan.plan), *pointers)
    return out


def _plan(sequences: Sequence[SequenceRows], options: AttentionOptions) -> DecodePlan:
    methods = [options.method(sequence) for sequence in sequences]
    places = [
        (method, sequence, position)
        for method, sequence in zip(methods, sequences, strict=True)
        for position in range(sequence.start, sequence.length)
    ]
    readings = [READINGS.of(method, position) for method, _, position in places]
    rows = (_Row * len(places))(
        *(
            _Row(reading.address, sequence.block_table.data_ptr(), position, *_far(sequence, position, options))
            for reading, (_, sequence, position) in zip(readings, places, strict=True)
        )
    )
    most_parts = max(len(reading.turns) for reading in readings)
    most_items = sum(
        len(reading.turns) * (position // SPAN + 3) + row.far_count // (SPAN // UNIT) + 1
        for reading, row, (_, _, position) in zip(readings, rows, places, strict=True)
    )
    scale = _query_scale(sequences, methods)
    turns = torch.empty(len(rows) * most_parts * max(reading.rotary_dim for reading in readings))
    items, row_items = torch.empty(6 * most_items, dtype=torch.int64), torch.empty(len(rows), dtype=torch.int64)
    plan = KernelPlan(
        len(rows),
        0,
        most_parts,
        options.sliding_window or UNBOUNDED,
        *(0, 0, 0),
        ctypes.addressof(rows),
        *(None if tensor is None else tensor.data_ptr() for tensor in (scale, turns, items, row_items)),
    )
    kernels.plan_rows(ctypes.byref(plan))
    return DecodePlan(
        plan=plan,
        held=(rows, readings, sequences, scale, turns, items, row_items),
        rows=[row for sequence in sequences for row in range(sequence.first, sequence.first + sequence.count)],
        method=next((method for method in methods if method is not None), None),
    )


def _far(sequence: SequenceRows, position: int, options: AttentionOptions) -> tuple[int, int, int]:
    """How many units of which range the row reads; 0 of none where it reads all of them."""
    tokens = sequence.selected(options)
    if tokens is None or position < sequence.selects_from:
        return 0, 0, 0
    first, stop = far_units(position)
    count = units_of(tokens)
    return (count, first, stop) if count < stop - first else (0, 0, 0)


def _query_scale(sequences: Sequence[SequenceRows], methods: Sequence[PositionMethod | None]) -> Tensor | None:
    if not any(method is not None and method.logn for method in methods):
        return None
    scales = []
    for sequence, method in zip(sequences, methods, strict=True):
        own = None if method is None else method.query_scale(torch.arange(sequence.start, sequence.length))
        scales.append(torch.ones(sequence.count) if own is None else own.float())
    return torch.cat(scales)
