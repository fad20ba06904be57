"""The rotation itself: cos|sin tables from angles, and their application to the leading dims of a head.

Pair m of a head is (m, m + D/2) in the *half* pairing (Llama, Qwen) and (2m, 2m + 1) in the *interleaved* one
(Cohere, GLM), with D the rotary dim; dims past D are left alone (partial rotary). Angles are fp64, tables fp32,
the arithmetic is fp32 whatever the input: bf16 tables cost 3.6e-3 in logits at position 131 072.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Table(NamedTuple):
    """cos and sin, each [T, D/2] fp32: one row a position, one column a dimension pair."""

    cos: Tensor
    sin: Tensor

    def rows(self, start: int, stop: int) -> Table:
        return Table(self.cos[start:stop], self.sin[start:stop])


def table(angles: Tensor, scale: float = 1.0, device: torch.device | None = None) -> Table:
    """cos and sin of `angles` [T, D/2] fp64, times `scale`, rounded once to fp32 on `device`."""
    return Table(
        (angles.cos() * scale).to(device=device, dtype=torch.float32),
        (angles.sin() * scale).to(device=device, dtype=torch.float32),
    )


def rotate(x: Tensor, by: Table, *, interleaved: bool = False) -> Tensor:
    """x [T, H, head_dim] with the leading D dims of row t rotated by row t of the table; same dtype as x."""
    cos, sin = by.cos.unsqueeze(1), by.sin.unsqueeze(1)
    half = cos.shape[-1]
    rotated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        out_first, out_second = rotated[..., 0 : 2 * half : 2], rotated[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
        out_first, out_second = rotated[..., :half], rotated[..., half : 2 * half]
    out_first.copy_(first * cos - second * sin)  # fp32: the tables promote
    out_second.copy_(second * cos + first * sin)
    if 2 * half < x.shape[-1]:
        rotated[..., 2 * half :] = x[..., 2 * half :]
    return rotated
