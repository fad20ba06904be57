"""The small causal transformer of the extrapolation tables, and the two ways in which its attention is read.

Pre-norm blocks, RMS norms, smeared keys, ReLU² feed-forward, no biases. The model hands raw queries and keys to an
*attention* it is given: `TrainedAttention` is what the model was trained with, at any length; `MethodAttention` reads
the same raw queries and keys through a position method of `rope`, as the server would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from prerope.rope.frequencies import Rotary, plain
from prerope.rope.reading import PositionMethod
from prerope.rope.rotation import Table, table
from prerope.rope.scores import method_scores
from torch import Tensor, nn
from torch.nn.functional import pad, relu, rms_norm, scaled_dot_product_attention

ALPHA = 0.75  # HFWA: the windowed layers together see at most this share of the trained length

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query, key, value), raw, each [B, T, H, D] → [B, T, H, D]."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's size and the variant it is trained as.

    Attributes:
        variant: "plain"; "logn", whose row i has its query scaled by ln(i+1)/ln N in training too; or "hfwa" (Su 9603):
            all layers but the last see `hfwa_window` keys through RoPE, the last all keys unrotated, with log-n.
        train_length: N, in tokens.
    """

    variant: str
    vocabulary: int
    layers: int
    width: int
    heads: int
    train_length: int
    base: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def rotary(self) -> Rotary:
        n = self.train_length
        return Rotary(self.head_dim, self.head_dim, self.base, "default", train_length=n, max_length=n)

    @property
    def hfwa_window(self) -> int:
        """The largest w' with (w'−1)·(layers−1) + 1 ≤ αN."""
        return int((ALPHA * self.train_length - 1) // (self.layers - 1)) + 1


class Block(nn.Module):
    """[B, T, width] → the same, by attention and feed-forward."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, shape.heads
        width = shape.width
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.smear = nn.Parameter(torch.zeros(shape.heads))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        normed = rms_norm(x, x.shape[-1:])
        by_head = (*x.shape[:-1], self.heads, -1)
        query, key, value = (part(normed).view(by_head) for part in (self.query, self.key, self.value))
        # A head's key is its own and the one before, mixed (Olsson 2022, arXiv 2209.11895, smeared keys): without that,
        # trainings as short as these end before copying is learned, and repeated text reads like any other.
        before = pad(key, (0, 0, 0, 0, 1, 0))[:, :-1]
        key = torch.lerp(before, key, self.smear.sigmoid()[:, None])
        x = x + self.out(attention(self.layer, query, key, value).flatten(-2))
        fed: Tensor = self.down(relu(self.up(rms_norm(x, x.shape[-1:]))).square())
        return x + fed


class Model(nn.Module):
    """Token ids [B, T] → logits [B, T, vocabulary], fp32."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            # What writes to the residual stream starts at zero, and so does the head: the first loss is ln(vocabulary).
            zero = name.endswith(("out.weight", "down.weight", "head.weight", "smear"))
            nn.init.normal_(parameter, std=0.0 if zero else shape.width**-0.5, generator=generator)

    def forward(self, token_ids: Tensor, attention: Attention) -> Tensor:
        x = rms_norm(self.embedding(token_ids), (self.shape.width,))
        for block in self.blocks:
            x = block(x, attention)
        logits: Tensor = self.head(rms_norm(x, x.shape[-1:]))
        return logits


def trained_logn(train_length: int, length: int) -> Tensor:
    """ln(i+1)/ln N of rows 0 to length − 1: [length] fp64.

    Without the max(1, ·) of log-n at test time: inside N that would be 1 everywhere, and nothing would be trained.
    """
    return torch.log(torch.arange(1, length + 1, dtype=torch.float64)) / math.log(train_length)


class TrainedAttention:
    """Attention as in training, over rows of `length` tokens."""

    def __init__(self, shape: Shape, length: int, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self.variant, self.last = shape.variant, shape.layers - 1
        position = torch.arange(length)
        angles = position.double()[:, None] * plain(shape.head_dim, shape.base)
        self._table = table(angles, device=device)
        self._scale = trained_logn(shape.train_length, length).float().to(device)[:, None, None]
        distance = position[:, None] - position[None, :]
        self._band = ((distance >= 0) & (distance < shape.hfwa_window)).to(device)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        windowed = self.variant == "hfwa" and layer < self.last
        if self.variant != "hfwa" or windowed:
            query, key = _turned(query, self._table), _turned(key, self._table)
        if self.variant == "logn" or (self.variant == "hfwa" and not windowed):
            query = query * self._scale
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        mask = self._band if windowed else None
        return scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None).transpose(1, 2)


def _turned(x: Tensor, by: Table) -> Tensor:
    """x [B, T, H, D] rotated in the half pairing: `rope.rotation.rotate` writes in place, which has no gradient."""
    cos, sin = by.cos.unsqueeze(1), by.sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class MethodAttention:
    """Attention of a trained model through a position method.

    logn_trained: the model was trained with log-n, so that row i's query is scaled by ln(i+1)/ln N whatever the method.
    chunk: rows whose scores are held at once; 256 stay in a CPU's cache.
    """

    def __init__(
        self, method: PositionMethod, train_length: int, *, logn_trained: bool = False, chunk: int = 256
    ) -> None:
        self._chunk = chunk
        self.method, self._train_length, self._logn_trained = method, train_length, logn_trained

    def __call__(self, _layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, length, heads, dim = query.shape
        if self._logn_trained:
            query = query * trained_logn(self._train_length, length).to(query)[:, None, None]
        # Rows of a batch are at the same positions: they are so many more heads.
        query, key, value = (part.transpose(0, 1).flatten(1, 2) for part in (query, key, value))
        parts = []
        for rows, start in zip(torch.split(query, self._chunk), range(0, length, self._chunk), strict=True):
            seen = start + len(rows)
            weights = (method_scores(rows, key[:seen], self.method, start) * dim**-0.5).softmax(-1)  # [B·H, R, n]
            parts.append((weights @ value[:seen].transpose(0, 1)).transpose(0, 1))
        return torch.cat(parts).view(length, batch, heads, -1).transpose(0, 1)
