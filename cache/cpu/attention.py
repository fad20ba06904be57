"""The CPU path: single rows and prefill chunks go through the C kernels of `cache.cpu.decode` and `cache.cpu.prefill`.

Where these could not be built, or do not take a layer's shape or dtype, attention is the specification itself
(`cache.attention.reference`), a few rows at a time, so that its score matrices stay small.
"""

from __future__ import annotations

from dataclasses import replace

from prerope.cache.attention.reference import reference_attention
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.cache.cpu.decode import can_attend, decode, plan_step
from prerope.cache.cpu.prefill import prefill
from torch import Tensor

FALLBACK_SCORES = 2**22  # (row, key, query head) that the fallback scores at once; each takes some tens of bytes


def cpu_attention(
    query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, options: AttentionOptions
) -> Tensor:
    """See `cache.attention.dispatch.Attention`. Here alone is decided what goes through which kernel."""
    native = can_attend(query, keys, values)
    plan = plan_step(metadata, options) if native else None
    if plan is not None and plan.num_rows == len(query):
        return decode(plan, query, keys, values, options)
    out = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
    if plan is not None:
        out[plan.rows] = decode(plan, query[plan.rows], keys, values, options)
    attend = prefill if native else _fallback
    for sequence in metadata.sequences:
        if plan is not None and sequence.count == 1:
            continue
        packed = slice(sequence.first, sequence.first + sequence.count)
        out[packed] = attend(query[packed], keys, values, sequence, metadata, options)
    return out


def _fallback(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequence: SequenceRows,
    metadata: AttentionMetadata,
    options: AttentionOptions,
) -> Tensor:
    """As `cache.cpu.prefill.prefill`."""
    out = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
    tile = max(1, FALLBACK_SCORES // (query.shape[1] * sequence.length))
    for begin in range(0, sequence.count, tile):
        count, start = min(tile, sequence.count - begin), sequence.start + begin
        blocks = sequence.block_table[: -(-(start + count) // metadata.block_size)]
        rows = SequenceRows(0, count, start, blocks, sequence.positions)
        step = replace(metadata, sequences=[rows], plans={})
        out[begin : begin + count] = reference_attention(query[begin : begin + count], keys, values, step, options)
    return out
