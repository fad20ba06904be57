"""The CPU path. Single rows and prefill chunks go through the C kernels of `cache.cpu.decode` and `cache.cpu.prefill`.

Where these could not be built, or the CPU has matrix tiles, chunks go through torch: flash attention over pieces of a
band, merged exactly by their log-sum-exp. No score matrix is ever whole. Rows [a, b) of one run read each part of its
keys as a band; with a window,

    j:  0 ─────────── a−w ──────────── a ──── b
        far: d ≥ w     │ band: both    │ near: d < w

and only the band of b − a keys around a − w computes both products. Far keys of ReRoPE are read as they lie in the
cache. Each band is cut into a causal square, the rectangle that every row sees in full, and a lower edge.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import reduce
from typing import Any, NamedTuple

import torch
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.cache.cpu.decode import can_decode, decode, plan_step
from prerope.cache.cpu.prefill import can_prefill, prefill
from prerope.cache.cpu.tables import key_table, query_table
from prerope.rope.reading import UNBOUNDED, Part, Reading
from prerope.rope.rotation import rotate
from torch import Tensor

Plans = dict[Hashable, Any]
_SOFTCAP_TILE = 2048  # keys scored at once where a soft-cap rules the flash kernel out


class Partial(NamedTuple):
    """Attention over some of the keys: out [Hkv, G, R, Dv] fp32, and the log-sum-exp [Hkv, G, R] of its scores."""

    out: Tensor
    lse: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """bf16 products are faster than fp32 ones only where the CPU has matrix tiles (AMX)."""
    return dtype if torch.cpu._is_amx_tile_supported() else torch.float32


def cpu_attention(
    query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, options: AttentionOptions
) -> Tensor:
    """See `cache.attention.dispatch.Attention`. Here alone is decided what goes through which kernel."""
    plan = plan_step(metadata, options) if can_decode(query, keys, values) else None
    if plan is not None and plan.num_rows == len(query):
        return decode(plan, query.float(), keys, values, options).to(query.dtype)
    out = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
    if plan is not None:
        out[plan.rows] = decode(plan, query[plan.rows].float(), keys, values, options).to(query.dtype)
    fp32 = compute_dtype(query.dtype) == torch.float32
    attend = prefill if fp32 and can_prefill(query, keys, values) else _prefill_in_torch
    for sequence in metadata.sequences:
        if plan is not None and sequence.count == 1:
            continue
        packed = slice(sequence.first, sequence.first + sequence.count)
        out[packed] = attend(query[packed], keys, values, sequence, metadata, options).to(query.dtype)
    return out


def _prefill_in_torch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequence: SequenceRows,
    metadata: AttentionMetadata,
    options: AttentionOptions,
) -> Tensor:
    """As `cache.cpu.prefill.prefill`."""
    dtype, first_key = compute_dtype(query.dtype), 0
    if options.sliding_window is not None:
        first_key = max(0, sequence.start - options.sliding_window + 1)
    key, value = (_gather(cache, sequence, first_key, metadata.block_size, dtype) for cache in (keys, values))
    partial = _attend(query.to(dtype), _Keys(key, value, first_key), sequence, options, metadata.plans)
    return _finish(partial, options)


class _Keys(NamedTuple):
    """The rows of one sequence from position `first` on: key [n, Hkv, D] and value [n, Hkv, Dv], in token order."""

    key: Tensor
    value: Tensor
    first: int

    def between(self, low: int, high: int) -> _Keys:
        rows = slice(low - self.first, high - self.first)
        return _Keys(self.key[rows], self.value[rows], low)


def _gather(cache: Tensor, sequence: SequenceRows, first_key: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """[n − first_key, Hkv, D]: the rows of one sequence from position first_key, in token order."""
    first_block = first_key // block_size
    blocks = cache.index_select(0, sequence.block_table[first_block:]).flatten(0, 1)
    skip = first_block * block_size
    return blocks[first_key - skip : sequence.length - skip].to(dtype)


def _attend(query: Tensor, keys: _Keys, sequence: SequenceRows, options: AttentionOptions, plans: Plans) -> Partial:
    """All rows of one sequence: query [R, Hq, D]."""
    method = options.method(sequence)
    reach = UNBOUNDED if options.sliding_window is None else options.sliding_window
    if method is None:
        return _band(query, keys, sequence.start, 0, reach, options)
    scale = method.query_scale(torch.arange(sequence.start, sequence.length))
    if scale is not None:
        query = query * scale[:, None, None].to(query.dtype)
    runs = []
    for start, stop, reading in method.runs(sequence.start, sequence.length):
        rows = query[start - sequence.start : stop - sequence.start]
        parts = []
        for part in reading.parts:
            low, high = part.keys(start, stop, reach)
            low = max(low, keys.first)
            if low >= high:
                continue
            turned, seen = _turn(rows, keys.between(low, high), start, part, reading, method.rotary.interleaved, plans)
            parts.append(_band(turned, seen, start, part.d_min, min(part.d_max, reach), options))
        runs.append(reduce(_merge, parts))
    return Partial(torch.cat([run.out for run in runs], dim=2), torch.cat([run.lse for run in runs], dim=2))


def _turn(
    query: Tensor, keys: _Keys, start: int, part: Part, reading: Reading, interleaved: bool, plans: Plans
) -> tuple[Tensor, _Keys]:
    """Queries of the rows from `start` on and the keys of one part, each at its angle; the tables are made once a step.

    The attention factors of q and of k are both on the query: the keys stay as they are.
    """
    stop, low, high = start + len(query), keys.first, keys.first + len(keys.key)
    plan = (id(part), start, stop, low, high)
    if plan not in plans:
        plans[plan] = query_table(reading, part, start, stop, start), key_table(reading, part, low, high, start)
    query_turns, key_turns = plans[plan]
    if key_turns is not None:
        keys = keys._replace(key=rotate(keys.key, key_turns, interleaved=interleaved))
    return rotate(query, query_turns, interleaved=interleaved), keys


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """[R, Hq, D] → [Hkv, G, R, D]: the query heads that share a KV head side by side."""
    rows, heads, dim = query.shape
    return query.view(rows, key.shape[1], heads // key.shape[1], dim).permute(1, 2, 0, 3)


def _band(query: Tensor, keys: _Keys, start: int, d_min: int, d_max: int, options: AttentionOptions) -> Partial:
    """Rows at positions start, start + 1, … of query [R, Hq, D] over the keys with d_min ≤ i − j < d_max.

    Rows that see no key get out 0 and lse −inf.
    """
    grouped = _grouped(query, keys.key)
    first_row = start - keys.first  # from here on, positions count from the first key
    last_row = first_row + len(query) - 1
    square_end = last_row - d_min + 1  # where causality ends the keys, if they reach as far
    diagonal = first_row - d_min  # the last key that every row sees; the keys from it on are a causal square
    end = min(len(keys.key), square_end)
    full_begin = max(0, last_row - d_max + 1)  # from here on, every row sees all it may by causality
    begin = max(0, first_row - d_max + 1)
    if diagonal < full_begin or diagonal < end < square_end:
        return _masked(grouped, keys, first_row, d_min, d_max, begin, end, options)
    full_end = min(diagonal, end)
    pieces = []
    if diagonal < end:
        pieces.append(_flash(grouped, keys, diagonal, end, options, causal=True))
    if full_begin < full_end:
        pieces.append(_flash(grouped, keys, full_begin, full_end, options))
    if begin < min(full_begin, full_end):
        pieces.append(_masked(grouped, keys, first_row, d_min, d_max, begin, min(full_begin, full_end), options))
    return reduce(_merge, pieces)


def _masked(
    query: Tensor,
    keys: _Keys,
    first_row: int,
    d_min: int,
    d_max: int,
    begin: int,
    end: int,
    options: AttentionOptions,
) -> Partial:
    """Keys [begin, end), of which each row sees those of its band."""
    rows = torch.arange(first_row, first_row + query.shape[2])
    distance = rows[:, None] - torch.arange(begin, end)
    visible = (distance >= d_min) & (distance < d_max)
    mask = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, float("-inf"))
    partial = _flash(query, keys, begin, end, options, mask=mask)
    blind = ~visible.any(-1)
    if not blind.any():
        return partial
    return Partial(partial.out.masked_fill(blind[:, None], 0.0), partial.lse.masked_fill(blind, float("-inf")))


def _flash(
    query: Tensor,
    keys: _Keys,
    begin: int,
    end: int,
    options: AttentionOptions,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Partial:
    """Keys [begin, end): all of them, a causal square, or as the additive mask [R, keys] says."""
    shape = (query.shape[0], query.shape[1], end - begin, -1)
    key = keys.key[begin:end].transpose(0, 1).unsqueeze(1).expand(shape)
    value = keys.value[begin:end].transpose(0, 1).unsqueeze(1).expand(shape)
    if options.softcap is not None:
        if causal:
            mask = torch.full((end - begin, end - begin), float("-inf")).triu_(1)
        return _softcapped(query, key, value, mask, options.scale, options.softcap)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=options.scale
    )
    return Partial(out.float(), lse)


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float) -> Partial:
    partial: Partial | None = None
    for begin in range(0, key.shape[2], _SOFTCAP_TILE):
        tile = slice(begin, begin + _SOFTCAP_TILE)
        scores = torch.matmul(query, key[:, :, tile].transpose(-1, -2)).float() * scale
        scores = torch.tanh(scores / cap) * cap
        if mask is not None:
            scores = scores + mask[:, tile]
        lse = scores.logsumexp(-1)
        # A row that sees no key of this tile has lse −inf: its weights are 0, not NaN.
        weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        tile_partial = Partial(torch.matmul(weights.to(value.dtype), value[:, :, tile]).float(), lse)
        partial = tile_partial if partial is None else _merge(partial, tile_partial)
    assert partial is not None
    return partial


def _merge(one: Partial, other: Partial) -> Partial:
    """Exact softmax over the union of two disjoint sets of keys. Rows blind in both stay out 0, lse −inf."""
    lse = torch.logaddexp(one.lse, other.lse)
    base = lse.masked_fill(lse == float("-inf"), 0.0)
    weight, other_weight = torch.exp(one.lse - base).unsqueeze(-1), torch.exp(other.lse - base).unsqueeze(-1)
    return Partial(one.out * weight + other.out * other_weight, lse)


def _finish(partial: Partial, options: AttentionOptions) -> Tensor:
    """[Hkv, G, R, Dv] → [R, Hq, Dv]; a sink takes its share of the softmax and gives nothing."""
    out = partial.out
    if options.sinks is not None:
        sinks = options.sinks.view(out.shape[0], out.shape[1], 1).float()
        out = out * torch.sigmoid(partial.lse - sinks).unsqueeze(-1)
    return out.permute(2, 0, 1, 3).flatten(1, 2)
