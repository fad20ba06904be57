"""Rotation by given angles, along any axes of a tensor: what `rope.RotaryEmbedding` is made of.

Pairs are interleaved, (2m, 2m+1), and angles [..., D] name each pair's twice, as rotary-embedding-torch writes them.
cos and sin are taken in fp64 and rounded once to fp32 (fp64 tensors: not at all); the arithmetic is fp32 or wider
whatever the tensor's dtype, and the result has that dtype. Gradients flow to the tensor and to the angles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from prerope.rope.rotation import Table, table
from torch import Tensor


def cos_sin(angles: Tensor, dtype: torch.dtype) -> Table:
    """The table [..., D/2] of fp64 angles [..., D/2] for a tensor of `dtype`: fp64 for fp64, else fp32."""
    return Table(angles.cos(), angles.sin()) if dtype == torch.float64 else table(angles)


def along(rows: Tensor, t: Tensor, seq_dim: int) -> Tensor:
    """rows [n, D] or [B, n, D], in the shape that broadcasts against t with n on axis `seq_dim` and B on axis 0.

    Raises ValueError where n or B is neither t's nor 1.
    """
    n, batch, given = t.shape[seq_dim], t.shape[0], list(rows.shape[:-1])
    if given[-1] not in (n, 1) or (len(given) == 2 and given[0] not in (batch, 1)):
        raise ValueError(f"positions of a tensor of shape {tuple(t.shape)} are [{n}], or [{batch}, {n}]; got {given}")
    shape = [1] * t.ndim
    shape[seq_dim], shape[-1] = rows.shape[-2:]
    if len(given) == 2:
        shape[0] = given[0]
    return rows.reshape(shape)


def turn(t: Tensor, by: Table, start_index: int = 0, scale: Tensor | float = 1.0) -> Tensor:
    """t with dims start_index… of its last axis turned pair by pair, times `scale`; the other dims are left alone.

    by: cos and sin [..., D/2] that broadcast against t's leading axes.
    scale: a number, or [..., D] that broadcasts against the turned dims.
    Raises ValueError where the turned dims do not fit into t.
    """
    dim = 2 * by.cos.shape[-1]
    stop = start_index + dim
    if stop > t.shape[-1]:
        raise ValueError(
            f"{dim} dims are to be rotated from dim {start_index} on, but the tensor's last axis has {t.shape[-1]}; "
            f"use a smaller dim or fewer axes"
        )
    # A pair is a complex number, and a turn is a product: on a CPU ten times faster than slices with a step.
    # Views of pairs ask for even strides and offsets, which a copy has.
    pairs = t[..., start_index:stop].to(by.cos.dtype, copy=True, memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(pairs.view(*pairs.shape[:-1], dim // 2, 2))
    turned = torch.view_as_real(pairs * torch.complex(by.cos, by.sin)).flatten(-2)
    if isinstance(scale, Tensor):
        turned = turned * scale.to(turned.dtype)
    elif scale != 1.0:
        turned = turned * scale
    turned = turned.to(t.dtype)
    if dim == t.shape[-1]:
        return turned
    return torch.cat((t[..., :start_index], turned, t[..., stop:]), dim=-1)


def apply_rotary_emb(
    freqs: Tensor,
    t: Tensor,
    start_index: int = 0,
    scale: Tensor | float = 1.0,
    seq_dim: int = -2,
    freqs_seq_dim: int | None = None,
) -> Tensor:
    """t [..., head_dim] with dims start_index…start_index + D − 1 rotated by the angles `freqs`; same shape and dtype.

    freqs: angles, each twice, as `RotaryEmbedding.forward` and `get_axial_freqs` give them: [N, D], row by row along
        `seq_dim` of t, or [..., D] that broadcasts against t. Where there are more rows than t has, the last ones
        count: queries follow the keys that are cached.
    scale: a number, or [n, D] along `seq_dim`, or [..., D] that broadcasts; of the rotated dims alone.
    freqs_seq_dim: the axis of `freqs` that holds the rows; by default the first of two, else `seq_dim`.
    Raises ValueError where the rotated dims do not fit into t.
    """
    seq_dim -= t.ndim if seq_dim >= 0 else 0
    if freqs_seq_dim is None:
        freqs_seq_dim = 0 if freqs.ndim == 2 else seq_dim
    if -freqs.ndim <= freqs_seq_dim < freqs.ndim - 1 and freqs_seq_dim != -1:
        surplus = max(0, freqs.shape[freqs_seq_dim] - t.shape[seq_dim])
        freqs = freqs.narrow(freqs_seq_dim, surplus, freqs.shape[freqs_seq_dim] - surplus)
    if freqs.ndim == 2:
        freqs = along(freqs, t, seq_dim)
    if isinstance(scale, Tensor) and scale.ndim == 2:
        scale = along(scale, t, seq_dim)
    return turn(t, cos_sin(freqs[..., ::2].double(), t.dtype), start_index, scale)


def apply_learned_rotations(
    rotations: Tensor, t: Tensor, start_index: int = 0, freq_ranges: Tensor | None = None
) -> Tensor:
    """t rotated by learned angles: `rotations` [..., m], or [..., m] times `freq_ranges` [f] for m·f pairs."""
    if freq_ranges is not None:
        rotations = (rotations.double().unsqueeze(-1) * freq_ranges.double()).flatten(-2)
    return apply_rotary_emb(rotations.repeat_interleave(2, dim=-1), t, start_index)


def broadcat(tensors: Sequence[Tensor], dim: int = -1) -> Tensor:
    """The tensors broadcast against each other, then joined along `dim`."""
    return torch.cat(torch.broadcast_tensors(*tensors), dim=dim)  # type: ignore[no-untyped-call]
