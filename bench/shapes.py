"""Shapes of the attention of known models, for measurements that need no weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rope.frequencies import Rotary
from rope.methods import resolve
from rope.reading import PositionMethod
from rope.spec import RopeSpec


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads of one layer. Methods that differ from rope do so past `train_length` or its quarter."""

    query_heads: int
    kv_heads: int
    head_dim: int
    base: float
    train_length: int

    def method(self, name: str) -> PositionMethod:
        """By its name; with a factor of 4, where it takes one."""
        dim = self.head_dim
        rotary = Rotary(dim, dim, self.base, "default", self.train_length, self.train_length)
        return resolve(RopeSpec(method=name), rotary)

    def key_bytes(self, dtype: torch.dtype) -> int:
        """Of K and V of one token."""
        return 2 * self.kv_heads * self.head_dim * dtype.itemsize


SHAPES = {
    "smollm2": AttentionShape(9, 3, 64, 100_000.0, 8192),
    "llama-3-8b": AttentionShape(32, 8, 128, 500_000.0, 8192),
}
