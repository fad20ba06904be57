"""Attention as the papers write it, in fp64 and with whole score matrices: the oracle of the reference path.

Uses complex multiplication for rotations and nothing of `rope` or `cache`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def turned(x: Tensor, angles: Tensor, *, interleaved: bool) -> Tensor:
    """x [T, H, head_dim] fp64 with its leading dims turned by angles [T, D/2]."""
    half = angles.shape[-1]
    first = x[..., 0 : 2 * half : 2] if interleaved else x[..., :half]
    second = x[..., 1 : 2 * half : 2] if interleaved else x[..., half : 2 * half]
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    pair = (product.real, product.imag)
    mixed = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([mixed, x[..., 2 * half :]], dim=-1)


def rotated(x: Tensor, positions: Tensor, dim: int, *, interleaved: bool, base: float = 10000.0) -> Tensor:
    """Plain RoPE at these positions, integers or not."""
    theta = base ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    return turned(x, positions.double()[:, None] * theta, interleaved=interleaved)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention of the last rows: query [R, Hq, D], key and value [n, Hkv, D] → [R, Hq, D]."""
    scores = product(query, key)
    if slopes is not None:
        scores += torch.arange(len(key)).double() * slopes[:, None, None]  # as published: of the key, not the distance
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return weighted(scores, value, sinks)


def two_matrices(query: Tensor, key: Tensor, value: Tensor, *, window: int, leak: float, start: int = 0) -> Tensor:
    """ReRoPE (leak = ∞) and Leaky ReRoPE: one score matrix at true distances, one at w + (d − w)/k, picked by d < w."""
    dim = query.shape[-1]
    i, j = torch.arange(start, start + len(query)), torch.arange(len(key))
    near = product(*(rotated(x, p, dim, interleaved=False) for x, p in ((query, i), (key, j))))
    far_i, far_j = (i - window) / leak + window, j / leak
    far = product(*(rotated(x, p, dim, interleaved=False) for x, p in ((query, far_i), (key, far_j))))
    return weighted(torch.where(i[:, None] - j < window, near, far), value)


def grouped(query: Tensor, key: Tensor, value: Tensor, *, window: int, group: int) -> Tensor:
    """Self-Extend (Jin 2024, algorithm 1): neighbours at true distances, the rest at floored positions, shifted."""
    dim = query.shape[-1]
    i, j = torch.arange(len(query)), torch.arange(len(key))
    near = product(*(rotated(x, p, dim, interleaved=False) for x, p in ((query, i), (key, j))))
    far_i, far_j = i // group + window - window // group, j // group
    far = product(*(rotated(x, p, dim, interleaved=False) for x, p in ((query, far_i), (key, far_j))))
    return weighted(torch.where(i[:, None] - j < window, near, far), value)


def by_dimension(query: Tensor, key: Tensor, value: Tensor, *, window: int, scales: Tensor) -> Tensor:
    """DPE (Lu 2025, as its authors code it): Self-Extend's far positions, floored by a scale for each pair, [D/2]."""
    dim = query.shape[-1]
    theta = 10000.0 ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    i, j = torch.arange(len(query)), torch.arange(len(key))
    near = product(*(rotated(x, p, dim, interleaved=False) for x, p in ((query, i), (key, j))))
    far_i, far_j = i[:, None] // scales + window - window // scales, j[:, None] // scales
    far = product(*(turned(x, p.double() * theta, interleaved=False) for x, p in ((query, far_i), (key, far_j))))
    return weighted(torch.where(i[:, None] - j < window, near, far), value)


def string(query: Tensor, key: Tensor, value: Tensor, *, shift: int, local: int) -> Tensor:
    """STRING (An 2024, alg. 1): a diagonal of `shift` true distances, and below it distances that begin at `local`."""
    dim = query.shape[-1]
    i, j = torch.arange(len(query)), torch.arange(len(key))
    near = product(*(rotated(x, p, dim, interleaved=False) for x, p in ((query, i), (key, j))))
    far = product(*(rotated(x, p, dim, interleaved=False) for x, p in ((query, i - shift + local), (key, j))))
    return weighted(torch.where(i[:, None] - j < shift, near, far), value)


def dual_chunk(query: Tensor, key: Tensor, value: Tensor, *, window: int, length: int) -> Tensor:
    """Dual chunk attention (An 2024): chunks of s = L − w, three query positions, one key position j mod s."""
    size, last = length - window, length - 1
    scores = torch.empty(query.shape[1], len(query), len(key), dtype=query.dtype)
    turned = rotated(key, torch.arange(len(key)) % size, query.shape[-1], interleaved=False)
    for i in range(len(query)):
        for j_chunk in range(i // size + 1):
            apart = i // size - j_chunk
            position = (i % size, min(i % size + size, last), last)[min(apart, 2)]
            row = rotated(query[i : i + 1], torch.tensor([position]), query.shape[-1], interleaved=False)
            keys = slice(j_chunk * size, (j_chunk + 1) * size)
            scores[:, i : i + 1, keys] = product(row, turned[keys])
    return weighted(scores, value)


def streaming(query: Tensor, key: Tensor, value: Tensor, *, window: int, sinks: int) -> Tensor:
    """StreamingLLM (Xiao 2023, §3.2): each row has a cache of the first tokens and the last ones, numbered as they lie
    in that cache."""
    rows = []
    for i in range(len(query)):
        kept = [j for j in range(i + 1) if j < sinks or i - j < window]
        at = torch.arange(len(kept))
        row = rotated(query[i : i + 1], at[-1:], query.shape[-1], interleaved=False)
        rows.append(attend(row, rotated(key[kept], at, query.shape[-1], interleaved=False), value[kept]))
    return torch.cat(rows)


def xpos(query: Tensor, key: Tensor, value: Tensor, *, scale_base: float = 512.0) -> Tensor:
    """xPos (Sun 2022, eq. 11): Re Σ_m q_m·conj(k_m)·exp(iθ_m d)·ζ_m^(d / 512), all pairs of tokens one by one."""
    dim = query.shape[-1]
    m = torch.arange(dim // 2, dtype=torch.float64)
    theta, zeta = 10000.0 ** (-2 * m / dim), (2 * m + 0.4 * dim) / (1.4 * dim)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    q, k = (torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) for x in (query, key))
    d = (torch.arange(len(query))[:, None] - torch.arange(len(key))).clamp(min=0).double()[..., None]
    kernel = torch.polar(zeta ** (d / scale_base), theta * d)
    scores = torch.einsum("ihm,jhm,ijm->hij", q, k.conj(), kernel).real / math.sqrt(dim)
    return weighted(scores, value)


def product(query: Tensor, key: Tensor) -> Tensor:
    """[Hq, R, n], scaled; query heads share KV heads in runs."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(query.shape[-1])


def weighted(scores: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Causal softmax of scores [Hq, R, n] whose last row is the last key's; a sink takes part and gives nothing."""
    heads, rows, length = scores.shape
    causal = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    exponentials = scores.masked_fill(~causal, -math.inf).exp()
    total = exponentials.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    value = value.repeat_interleave(heads // value.shape[1], dim=1)
    return torch.einsum("hij,jhd->ihd", exponentials / total, value)
