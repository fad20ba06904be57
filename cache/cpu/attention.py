"""The CPU path: few rows and prefill chunks go through the C kernels of `cache.cpu.decode` and `cache.cpu.prefill`.

Where these could not be built, or do not take a layer's shape or dtype, attention is the specification itself
(`cache.attention.reference`), a few rows at a time, so that its score matrices stay small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prerope.cache.attention.reference import reference_attention
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.cache.cpu.decode import can_attend, decode, plan_step, split
from prerope.cache.cpu.prefill import prefill
from torch import Tensor

FALLBACK_SCORES = 2**22  # (row, key, query head) that the fallback scores at once; each takes some tens of bytes


def cpu_attention(
    query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, options: AttentionOptions
) -> Tensor:
    """See `cache.attention.dispatch.Attention`. Here alone is decided what goes through which kernel."""
    native = _is_native(query, keys, values, metadata)
    plan = plan_step(metadata, options) if native else None
    if plan is not None and plan.num_rows == len(query):
        return decode(plan, query, keys, values, options, metadata.bounds)
    out = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
    if plan is not None:
        out[plan.rows] = decode(plan, query[plan.rows], keys, values, options, metadata.bounds)
    for chunks in _chunks(metadata, options, () if plan is None else tuple(plan.rows)):
        packed = slice(chunks[0].first, chunks[-1].first + chunks[-1].count)
        if native:
            out[packed] = prefill(query[packed], keys, values, chunks, metadata, options)
            continue
        for chunk in chunks:
            rows = slice(chunk.first, chunk.first + chunk.count)
            out[rows] = _fallback(query[rows], keys, values, chunk, metadata, options)
    return out


def _is_native(query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> bool:
    """Whether the kernels take a layer; asked once a step of all layers that have the same shapes and dtypes."""
    key = ("native", query.shape[1], query.dtype, keys.dtype, keys.shape, values.shape[3])
    native: bool | None = metadata.plans.get(key)
    if native is None:
        native = metadata.plans[key] = can_attend(query, keys, values)
    return native


def _chunks(metadata: AttentionMetadata, options: AttentionOptions, few: tuple[int, ...]) -> list[list[SequenceRows]]:
    """Chunks in groups of neighbours that continue the same sequence. few: first rows of chunks to leave out."""
    key = ("chunks", few)
    if key not in metadata.plans:
        sequences = split(metadata.sequences, options)
        metadata.plans[key] = _together([one for one in sequences if one.first not in few])
    chunks: list[list[SequenceRows]] = metadata.plans[key]
    return chunks


def _together(sequences: Sequence[SequenceRows]) -> list[list[SequenceRows]]:
    together: list[list[SequenceRows]] = []
    for one in sequences:
        last = together[-1][-1] if together else None
        if last is not None and last.first + last.count == one.first and _goes_on(last, one):
            together[-1].append(one)
        else:
            together.append([one])
    return together


def _goes_on(chunk: SequenceRows, after: SequenceRows) -> bool:
    """Whether the second chunk continues the first, in the same sequence."""
    return chunk.same_sequence(after) and chunk.length <= after.start


def _fallback(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequence: SequenceRows,
    metadata: AttentionMetadata,
    options: AttentionOptions,
) -> Tensor:
    """Attention of one chunk in plain torch, with the arguments and the result of `cache.cpu.prefill.prefill`."""
    out = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
    tile = max(1, FALLBACK_SCORES // (query.shape[1] * sequence.length))
    for begin in range(0, sequence.count, tile):
        count, start = min(tile, sequence.count - begin), sequence.start + begin
        blocks = sequence.block_table[: -(-(start + count) // metadata.block_size)]
        rows = SequenceRows(0, count, start, blocks, sequence.positions, sequence.selects_from)
        step = replace(metadata, sequences=[rows], plans={})
        out[begin : begin + count] = reference_attention(query[begin : begin + count], keys, values, step, options)
    return out
