"""The specification: attention over raw keys in plain fp32 torch, slow and obvious.

Every fast path is tested against this. It computes the near and the far score matrix whole, as the papers write them,
and picks by distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cache.attention import AttentionMetadata, AttentionOptions, SequenceRows
from rope.reading import Reading
from rope.rotation import rotate, table


def reference_attention(
    query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, options: AttentionOptions
) -> Tensor:
    """See `cache.attention.paged_attention`."""
    out = torch.empty(query.shape[0], query.shape[1], values.shape[-1], dtype=query.dtype, device=query.device)
    for sequence in metadata.sequences:
        rows = slice(sequence.first, sequence.first + sequence.count)
        key = keys[sequence.block_table].flatten(0, 1)[: sequence.length].float()
        value = values[sequence.block_table].flatten(0, 1)[: sequence.length].float()
        out[rows] = _sequence(query[rows].float(), key, value, sequence, options).to(query.dtype)
    return out


def _sequence(query: Tensor, key: Tensor, value: Tensor, sequence: SequenceRows, options: AttentionOptions) -> Tensor:
    """query [R, Hq, D], key and value [n, Hkv, D], fp32 → [R, Hq, Dv]."""
    group_size = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    i = torch.arange(sequence.start, sequence.length, device=query.device)
    j = torch.arange(sequence.length, device=query.device)
    distance = i[:, None] - j[None, :]

    scores = _scores(query, key, distance, i, j, sequence, options) * options.scale  # [Hq, R, n]
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    visible = distance >= 0
    if options.sliding_window is not None:
        visible &= distance < options.sliding_window
    scores = scores.masked_fill(~visible, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, value)


def _scores(
    query: Tensor,
    key: Tensor,
    distance: Tensor,
    i: Tensor,
    j: Tensor,
    sequence: SequenceRows,
    options: AttentionOptions,
) -> Tensor:
    """[Hq, R, n], unscaled: each row under its own reading."""
    method = options.method(sequence)
    if method is None:
        return torch.einsum("ihd,jhd->hij", query, key)
    scale = method.query_scale(i)
    if scale is not None:
        query = query * scale[:, None, None].float()
    parts = []
    for start, stop, reading in method.runs(sequence.start, sequence.length):
        rows = slice(start - sequence.start, stop - sequence.start)
        parts.append(_read(query[rows], key, distance[rows], i[rows], j, reading, method.rotary.interleaved))
    return torch.cat(parts, dim=1)


def _read(
    query: Tensor, key: Tensor, distance: Tensor, i: Tensor, j: Tensor, reading: Reading, pairing: bool
) -> Tensor:
    def product(query_angles: Tensor, key_angles: Tensor) -> Tensor:
        factor = reading.attention_factor
        rotated_query = rotate(query, table(query_angles, factor), interleaved=pairing)
        rotated_key = rotate(key, table(key_angles, factor), interleaved=pairing)
        return torch.einsum("ihd,jhd->hij", rotated_query, rotated_key)

    # Positions and frequencies meet on the CPU in fp64; the tables come back in fp32.
    i, j = i.cpu(), j.cpu()
    near = product(reading.near_angles(i), reading.near_angles(j))
    if reading.window is None:
        return near
    far = product(reading.far_query_angles(i), reading.far_key_angles(j))
    return torch.where(distance < reading.window, near, far)
