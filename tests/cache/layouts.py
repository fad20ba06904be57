"""Paged caches for tests: random raw keys and values, scattered over blocks, and the metadata that finds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from prerope.cache.attention.types import AttentionMetadata, SequenceRows
from prerope.rope.frequencies import Rotary
from prerope.rope.methods import resolve
from prerope.rope.model import ModelPositions
from prerope.rope.reading import PositionMethod
from prerope.rope.registry import METHODS
from prerope.rope.spec import RopeSpec
from torch import Tensor

TRAINED = 64
WINDOWED = [name for name, entry in METHODS.items() if entry.windowed]
DPE_GROUPS = (2, 1, 16, 128)
"""Of quarters of the pairs: within a tile of keys, none, and longer than one."""
METHOD_NAMES = [name for name in METHODS if name != "proportional"]


def rotary(head_dim: int, dim: int, *, interleaved: bool = False) -> Rotary:
    """A model trained at `TRAINED`, with LongRoPE factors beside a plain embedding, so that every method resolves."""
    parameters = {
        "long_factor": [1 + 0.3 * m for m in range(dim // 2)],
        "short_factor": [1 + 0.01 * m for m in range(dim // 2)],
        "factor": 4.0,
    }
    return Rotary(head_dim, dim, 10000.0, "default", TRAINED, TRAINED, parameters, interleaved)


def method(
    name: str,
    embedding: Rotary,
    *,
    window: int | None = None,
    group: int | None = None,
    groups: tuple[int, ...] = DPE_GROUPS,
    logn: bool = False,
) -> PositionMethod:
    spec = RopeSpec(
        method=name,
        window=window if name in WINDOWED else None,
        leak=3.0 if name == "leaky_rerope" else None,
        sinks=1 if name == "streaming" else None,
        group=group,
        groups=groups[: embedding.dim // 2] if name == "dpe" else None,
        factor=4.0 if "factor" in METHODS[name].takes else None,
        logn=logn,
    )
    return resolve(spec, embedding)


def one_group(resolved: PositionMethod) -> ModelPositions:
    return ModelPositions({"": resolved}, "")


@dataclass(frozen=True)
class Paged:
    """One step: query [T, Hq, D], and keys and values in scattered blocks; slots past a sequence's end hold rubbish."""

    query: Tensor
    keys: Tensor
    values: Tensor
    metadata: AttentionMetadata


def paged(
    rows: list[tuple[int, int]],
    positions: list[ModelPositions],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Paged:
    """rows: (start, count) a sequence. Block tables are disjoint and shuffled over the cache."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-(start + count) // block_size) for start, count in rows]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks, generator=generator).split([*needed, 3])
    first, sequences = 0, []
    for (start, count), table, own in zip(rows, order, positions, strict=False):
        sequences.append(SequenceRows(first, count, start, table, own))
        first += count
    shape = (num_blocks, block_size, kv_heads, head_dim)
    keys, values = torch.randn(2, *shape, generator=generator).to(dtype)
    return Paged(
        query=torch.randn(first, heads, head_dim, generator=generator).to(dtype),
        keys=keys,
        values=values,
        metadata=AttentionMetadata(sequences, torch.zeros(0, dtype=torch.int64), block_size),
    )


def contiguous(step: Paged, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(query [R, Hq, D], keys and values [n, Hkv, D]) of one sequence, in token order."""
    sequence = step.metadata.sequences[index]
    query = step.query[sequence.first : sequence.first + sequence.count]
    key, value = (cache[sequence.block_table].flatten(0, 1)[: sequence.length] for cache in (step.keys, step.values))
    return query, key, value
