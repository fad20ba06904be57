"""The CPU path in torch: flash attention over pieces of a band, merged exactly by their log-sum-exp.

No score matrix is ever whole. For a run of rows [a, b) that share a reading, keys fall into at most two bands,

    j:  0 ─────────── a−w ──────────── a ──── b
        far: d ≥ w     │ band: both    │ near: d < w

and only the band of b − a keys around a − w computes both products. Far keys of ReRoPE are read as they lie in the
cache. Each band is cut into a causal square, the rectangle that every row sees in full, and a lower edge. Single rows
go through the C kernel of `cache.decode` where it could be built, and through the same code as chunks where not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cache.attention import AttentionMetadata, AttentionOptions, SequenceRows
from cache.decode import can_decode, decode
from cache.tables import Part, TableCache
from rope.reading import UNBOUNDED, Reading
from rope.rotation import Table, rotate

TABLES = TableCache()
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
    """See `cache.attention.paged_attention`."""
    out = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
    dtype = compute_dtype(query.dtype)
    chunks = metadata.sequences
    if can_decode(query, keys) and (single := [s for s in chunks if s.count == 1]):
        chunks = [s for s in chunks if s.count > 1]
        rows, decoded = decode(query, keys, values, single, metadata, options)
        out[rows] = decoded.to(query.dtype)
    for sequence in chunks:
        packed = slice(sequence.first, sequence.first + sequence.count)
        first_key = 0
        if options.sliding_window is not None:
            first_key = max(0, sequence.start - options.sliding_window + 1)
        key, value = (_gather(cache, sequence, first_key, metadata.block_size, dtype) for cache in (keys, values))
        partial = _attend(query[packed].to(dtype), key, value, first_key, sequence, options)
        out[packed] = _finish(partial, options).to(query.dtype)
    return out


def _gather(cache: Tensor, sequence: SequenceRows, first_key: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """[n − first_key, Hkv, D]: the rows of one sequence from position first_key, in token order."""
    first_block = first_key // block_size
    blocks = cache.index_select(0, sequence.block_table[first_block:]).flatten(0, 1)
    skip = first_block * block_size
    return blocks[first_key - skip : sequence.length - skip].to(dtype)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, first_key: int, sequence: SequenceRows, options: AttentionOptions
) -> Partial:
    """All rows of one sequence: query [R, Hq, D], key and value [n, Hkv, D] from position first_key."""
    method = options.method(sequence)
    reach = UNBOUNDED if options.sliding_window is None else options.sliding_window
    if method is None:
        return _band(_grouped(query, key), key, value, sequence.start - first_key, 0, reach, options)
    scale = method.query_scale(torch.arange(sequence.start, sequence.length))
    if scale is not None:
        query = query * scale[:, None, None].to(query.dtype)
    parts = []
    for start, stop, reading in method.runs(sequence.start, sequence.length):
        rows = query[start - sequence.start : stop - sequence.start]
        seen = slice(0, stop - first_key)
        parts.append(
            _read(rows, key[seen], value[seen], start, first_key, reading, method.rotary.interleaved, reach, options)
        )
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([p.out for p in parts], dim=2), torch.cat([p.lse for p in parts], dim=2))


def _read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: int,
    first_key: int,
    reading: Reading,
    interleaved: bool,
    reach: int,
    options: AttentionOptions,
) -> Partial:
    """Rows from position `start` under one reading: near part, far part where there is one, merged."""
    stop = start + query.shape[0]
    window = reach if reading.window is None else min(reading.window, reach)
    low = max(first_key, start - window + 1)  # the first key that is near to any row
    near_query = rotate(query, _query_table(reading, "near", start, stop), interleaved=interleaved)
    near_key = rotate(key[low - first_key :], TABLES.rows(reading, "near", low, stop), interleaved=interleaved)
    near = _band(_grouped(near_query, key), near_key, value[low - first_key :], start - low, 0, window, options)
    if window >= reach or stop - 1 - window < first_key:
        return near
    far_stop = stop - window  # keys from here on are near to every row
    far_query = rotate(query, _query_table(reading, "far_query", start, stop), interleaved=interleaved)
    far_key = key[: far_stop - first_key]
    if not reading.far_keys_raw:
        far_key = rotate(far_key, TABLES.rows(reading, "far_key", first_key, far_stop), interleaved=interleaved)
    far_value = value[: far_stop - first_key]
    far = _band(_grouped(far_query, key), far_key, far_value, start - first_key, window, reach, options)
    return _merge(near, far)


def _query_table(reading: Reading, part: Part, start: int, stop: int) -> Table:
    """The attention factor of q and of k, both on the query: the keys stay as they are."""
    rows = TABLES.rows(reading, part, start, stop)
    factor = reading.attention_factor**2
    return rows if factor == 1.0 else Table(rows.cos * factor, rows.sin * factor)


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """[R, Hq, D] → [Hkv, G, R, D]: the query heads that share a KV head side by side."""
    rows, heads, dim = query.shape
    return query.view(rows, key.shape[1], heads // key.shape[1], dim).permute(1, 2, 0, 3)


def _band(
    query: Tensor, key: Tensor, value: Tensor, first_row: int, d_min: int, d_max: int, options: AttentionOptions
) -> Partial:
    """Rows p = first_row, first_row + 1, … of query [Hkv, G, R, D] over the keys j with d_min ≤ p − j < d_max.

    Positions count from the first of the keys [n, Hkv, D]. Rows that see no key get out 0 and lse −inf.
    """
    last_row = first_row + query.shape[2] - 1
    begin, end = max(0, first_row - d_max + 1), last_row - d_min + 1  # keys that any row sees
    full_begin = max(0, last_row - d_max + 1)  # from here on, every row sees all it may by causality
    diagonal = first_row - d_min  # the last key that every row sees; the keys from it on are a causal square
    if diagonal < full_begin:
        return _masked(query, key, value, first_row, d_min, d_max, begin, end, options)
    partial = _flash(query, key, value, diagonal, end, options, causal=True)
    if full_begin < diagonal:
        partial = _merge(partial, _flash(query, key, value, full_begin, diagonal, options))
    if begin < full_begin:
        partial = _merge(partial, _masked(query, key, value, first_row, d_min, d_max, begin, full_begin, options))
    return partial


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    partial = _flash(query, key, value, begin, end, options, mask=mask)
    blind = ~visible.any(-1)
    if not blind.any():
        return partial
    return Partial(partial.out.masked_fill(blind[:, None], 0.0), partial.lse.masked_fill(blind, float("-inf")))


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begin: int,
    end: int,
    options: AttentionOptions,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Partial:
    """Keys [begin, end): all of them, a causal square, or as the additive mask [R, keys] says."""
    shape = (query.shape[0], query.shape[1], end - begin, -1)
    key = key[begin:end].transpose(0, 1).unsqueeze(1).expand(shape)
    value = value[begin:end].transpose(0, 1).unsqueeze(1).expand(shape)
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
