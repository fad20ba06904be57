"""The specification: attention over raw keys in plain fp32 torch, slow and obvious.

Every fast path is tested against this.
"""

from __future__ import annotations

import torch
from prerope.cache.attention.selection import selected_keys
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.rope.scores import method_scores
from torch import Tensor


def reference_attention(
    query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, options: AttentionOptions
) -> Tensor:
    """See `cache.attention.dispatch.Attention`."""
    out = torch.empty(query.shape[0], query.shape[1], values.shape[-1], dtype=query.dtype, device=query.device)
    for sequence in metadata.sequences:
        rows = slice(sequence.first, sequence.first + sequence.count)
        blocks = sequence.block_table.to(keys.device)
        key, value = (cache[blocks].flatten(0, 1)[: sequence.length].float() for cache in (keys, values))
        out[rows] = attend_sequence(query[rows].float(), key, value, sequence, options).to(query.dtype)
    return out


def attend_sequence(
    query: Tensor, key: Tensor, value: Tensor, sequence: SequenceRows, options: AttentionOptions
) -> Tensor:
    """query [R, Hq, D], key and value [n, Hkv, D], fp32 → [R, Hq, Dv]. The keys are the last n of the sequence."""
    group_size = query.shape[1] // key.shape[1]
    chosen = _chosen(query, key, sequence, options)
    key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    i = torch.arange(sequence.start, sequence.length, device=query.device)
    j = torch.arange(sequence.length - len(key), sequence.length, device=query.device)
    distance = i[:, None] - j[None, :]

    scores = _scores(query, key, sequence, options) * options.scale  # [Hq, R, n]
    visible = (distance >= 0) & ~scores.isneginf()
    if chosen is not None:
        visible &= chosen
    if options.slopes is not None:
        scores = scores - options.slopes[:, None, None] * distance
    if options.sliding_window is not None:
        visible &= distance < options.sliding_window
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, value)


def _chosen(query: Tensor, key: Tensor, sequence: SequenceRows, options: AttentionOptions) -> Tensor | None:
    """[Hq, R, n] bool: the keys that rows read; None: all. Where rows choose, the keys are all of the sequence."""
    tokens = sequence.selected(options)
    if tokens is None:
        return None
    assert len(key) == sequence.length
    chosen = torch.ones(key.shape[1], len(query), len(key), dtype=torch.bool, device=query.device)
    for row, position in enumerate(range(sequence.start, sequence.length)):
        if position >= sequence.selects_from:
            chosen[:, row] = selected_keys(query[row], key, position, tokens)
    return chosen.repeat_interleave(query.shape[1] // key.shape[1], dim=0)


def _scores(query: Tensor, key: Tensor, sequence: SequenceRows, options: AttentionOptions) -> Tensor:
    """[Hq, R, n], unscaled."""
    method = options.method(sequence)
    if method is None:
        return torch.einsum("ihd,jhd->hij", query, key)
    return method_scores(query, key, method, sequence.start, first_key=sequence.length - len(key))
