"""Shapes of known models, for measurements that need no trained weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from prerope.rope.frequencies import Rotary
from prerope.rope.methods import resolve
from prerope.rope.reading import PositionMethod
from prerope.rope.spec import RopeSpec


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


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama with an output head of its own: `layers` layers of `attention` and a gated MLP."""

    attention: AttentionShape
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int

    def config(self) -> Any:
        """As transformers takes it."""
        from transformers import LlamaConfig

        attention = self.attention
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=attention.query_heads,
            num_key_value_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            max_position_embeddings=attention.train_length,
            rope_parameters={"rope_type": "default", "rope_theta": attention.base},
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=self.vocabulary - 2,
            eos_token_id=self.vocabulary - 1,
        )

    def read_bytes(self, dtype: torch.dtype) -> int:
        """Of the weights that every step reads: all but the embedding, of which it reads a row a token."""
        attention = self.attention
        queries, keys = attention.query_heads * attention.head_dim, attention.kv_heads * attention.head_dim
        layer = self.hidden * (2 * queries + 2 * keys + 3 * self.intermediate + 2)
        return dtype.itemsize * (self.layers * layer + self.hidden + self.hidden * self.vocabulary)

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Of K and V of one token in all layers."""
        return self.layers * self.attention.key_bytes(dtype)


SHAPES = {
    "smollm2": AttentionShape(9, 3, 64, 100_000.0, 8192),
    "llama-3-8b": AttentionShape(32, 8, 128, 500_000.0, 8192),
}
TOY_SHAPE = AttentionShape(4, 2, 16, 10_000.0, 64)

MODELS = {
    "llama-3-8b": ModelShape(SHAPES["llama-3-8b"], layers=32, hidden=4096, intermediate=14336, vocabulary=128256),
    "tiny": ModelShape(
        AttentionShape(4, 1, 128, 500_000.0, 256), layers=2, hidden=512, intermediate=1024, vocabulary=1024
    ),
    "toy": ModelShape(TOY_SHAPE, layers=2, hidden=64, intermediate=128, vocabulary=512),
}
