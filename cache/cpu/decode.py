"""Decode steps on the CPU: one query row a sequence, through the C kernel.

What the kernel needs beside the tensors is the same for all layers of a rotary group, so it is worked out once a step,
in C. See kernels/c/rows.c.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.cache.cpu.arithmetic import multiplies_pairs
from prerope.cache.cpu.turns import READINGS
from prerope.cache.kernels.build import DTYPES, kernels, reads
from prerope.rope.reading import UNBOUNDED, PositionMethod
from torch import Tensor

SPAN = 512
"""Keys that are summed by themselves, of kernels/c/attend.h."""
MAX_ROWS, MAX_DIM = 96, 256
"""Of kernels/c/attend.h: rows × query heads of a KV head, and dims of a head."""


def can_attend(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernels are there and take these shapes and dtypes."""
    return (
        reads(keys.dtype)
        and reads(query.dtype)
        and max(keys.shape[3], values.shape[3]) <= MAX_DIM
        and query.shape[1] // keys.shape[2] <= MAX_ROWS
    )


class KernelShape(ctypes.Structure):
    """`Shape` of kernels/c/parts.h."""

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

    _fields_ = [("reading", ctypes.c_void_p), ("blocks", ctypes.c_void_p), ("position", ctypes.c_int64)]


class KernelPlan(ctypes.Structure):
    """`RowPlan` of kernels/c/rows.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_rows", "most_parts", "reach")),
        *((name, ctypes.c_void_p) for name in ("rows", "scales", "turns", "items", "row_items")),
    ]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One step of one rotary group. `held` owns what `plan` points to; rows: the packed rows."""

    plan: KernelPlan
    held: tuple[Any, ...]
    rows: list[int]
    num_items: int
    method: PositionMethod | None

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def scratch(self, shape: KernelShape) -> Tensor:
        """What the kernel wants, fp32."""
        return torch.empty(kernels().prerope_rows_scratch(ctypes.byref(shape), ctypes.c_int64(self.num_items)))


def plan_step(metadata: AttentionMetadata, options: AttentionOptions) -> DecodePlan | None:
    """The plan of the single rows of a step, for all layers with these options; None where it has none."""
    key = ("decode", options.group, options.sliding_window)
    if key not in metadata.plans:
        single = [sequence for sequence in metadata.sequences if sequence.count == 1]
        metadata.plans[key] = _plan(single, options) if single else None
    plan: DecodePlan | None = metadata.plans[key]
    return plan


def decode(plan: DecodePlan, rows: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions) -> Tensor:
    """Attention of the plan's query rows [R, Hq, D], in its order → [R, Hq, Dv]; keys as in `Attention`."""
    rows = rows.contiguous()
    shape = kernel_shape(rows.shape[1], rows.dtype, keys, values, plan.method, options)
    out, scratch = rows.new_empty(*rows.shape[:2], values.shape[3]), plan.scratch(shape)
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    pointers = [
        None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
        for tensor in (rows, keys, values, sinks, scratch, out)
    ]
    kernels().prerope_rows(ctypes.byref(shape), ctypes.byref(plan.plan), *pointers)
    return out


def _plan(sequences: Sequence[SequenceRows], options: AttentionOptions) -> DecodePlan:
    methods = [options.method(sequence) for sequence in sequences]
    readings = [READINGS.of(method, sequence.start) for method, sequence in zip(methods, sequences, strict=True)]
    rows = (_Row * len(sequences))(
        *(
            _Row(reading.address, sequence.block_table.data_ptr(), sequence.start)
            for reading, sequence in zip(readings, sequences, strict=True)
        )
    )
    most_parts = max(len(reading.turns) for reading in readings)
    most_items = sum(
        len(reading.turns) * (sequence.start // SPAN + 2) for reading, sequence in zip(readings, sequences, strict=True)
    )
    scale = _query_scale(sequences, methods)
    turns = torch.empty(len(sequences) * most_parts * max(reading.rotary_dim for reading in readings))
    items, row_items = torch.empty(3 * most_items, dtype=torch.int64), torch.empty(len(rows) + 1, dtype=torch.int64)
    plan = KernelPlan(
        len(sequences),
        most_parts,
        options.sliding_window or UNBOUNDED,
        ctypes.addressof(rows),
        *(None if tensor is None else tensor.data_ptr() for tensor in (scale, turns, items, row_items)),
    )
    return DecodePlan(
        plan=plan,
        num_items=kernels().prerope_plan_rows(ctypes.byref(plan)),
        held=(rows, readings, sequences, scale, turns, items, row_items),
        rows=[sequence.first for sequence in sequences],
        method=next((method for method in methods if method is not None), None),
    )


def _query_scale(sequences: Sequence[SequenceRows], methods: Sequence[PositionMethod | None]) -> Tensor | None:
    if not any(method is not None and method.logn for method in methods):
        return None
    scales = [
        None if method is None else method.query_scale(torch.tensor([sequence.start]))
        for sequence, method in zip(sequences, methods, strict=True)
    ]
    return torch.tensor([1.0 if scale is None else float(scale) for scale in scales])
