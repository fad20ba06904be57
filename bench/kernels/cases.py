"""What bench.kernels measures: models, steps, and the work that any exact kernel must do.

Bytes of decode are one read of K and V of the keys that are read, FLOPs of prefill 4·D a visible (row, key, query
head): work done twice or on masked keys counts as time and not as work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from prerope.cache.attention.reference import attend_sequence
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.rope.model import ModelPositions
from torch import Tensor

from bench.shared.shapes import SHAPES, TOY_SHAPE, AttentionShape

RAW = "raw"
"""The same kernel on a layer without positions: nothing is rotated."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which cases: (batch, context) of decode, rows of prefill, and the sequences of each check of correctness.

    checked: (start, count) of sequences, by the name of the check.
    judged_bytes, judged_rows: keys and values of decode, and rows of prefill, from which a case is held to targets.
    """

    models: dict[str, AttentionShape]
    methods: tuple[str, ...]
    only_checked: tuple[str, ...]  # further methods, of which no time is taken
    dtype: torch.dtype
    decode: tuple[tuple[int, int], ...]
    prefill: tuple[int, ...]
    checked: dict[str, tuple[tuple[int, int], ...]]
    block_size: int
    most_bytes: int  # of keys and values; larger cases are left out
    judged_bytes: int
    judged_rows: int


FULL = Plan(
    models=SHAPES,
    methods=("rope", "rerope", "yarn", "dynamic_leaky"),
    only_checked=(
        *("linear", "dynamic_ntk", "dynamic_yarn", "xpos", "jagged_rerope", "leaky_rerope", "self_extend", "dpe"),
        *("dual_chunk", "string", "streaming"),
    ),
    dtype=torch.bfloat16,
    decode=tuple((batch, context) for batch in (1, 8, 32) for context in (4096, 32768, 131072)),
    prefill=(2048, 8192, 32768, 65536),
    checked={
        "131k": ((131_000, 1), (130_944, 1)),
        "9k": ((9000, 1), (8191, 1), (8192, 1)),
        "700": ((700, 1), (0, 1), (63, 1), (64, 1)),
        "chunks": ((8100, 300), (0, 130), (700, 1)),
    },
    block_size=16,
    most_bytes=20 * 10**9,  # a peer needs them once more, and SDPA's layout half of them again: 43 GB
    judged_bytes=5 * 10**8,
    judged_rows=32768,
)
TOY = replace(
    FULL,
    models={"toy": TOY_SHAPE},
    methods=("rope", "rerope"),
    only_checked=(),
    dtype=torch.float16,  # the interpreter cuts bf16 off where a GPU rounds, which doubles the error
    decode=((2, 96),),
    prefill=(96,),
    checked={"rows": ((100, 1), (0, 1)), "chunks": ((60, 20), (90, 1))},
    judged_bytes=0,
    judged_rows=0,
)


@dataclass(frozen=True, slots=True)
class Step:
    """Arguments of `paged_attention`."""

    query: Tensor
    keys: Tensor
    values: Tensor
    metadata: AttentionMetadata
    options: AttentionOptions

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """query [B, R, Hq, D], keys and values [B, n, Hkv, D] in token order: of sequences that are alike."""
        sequences = self.metadata.sequences
        tables = torch.stack([sequence.block_table for sequence in sequences]).to(self.keys.device)
        length = sequences[0].length
        key, value = (cache[tables].flatten(1, 2)[:, :length] for cache in (self.keys, self.values))
        return self.query.view(len(sequences), -1, *self.query.shape[1:]), key, value


def make_step(
    model: AttentionShape,
    method: str,
    rows: list[tuple[int, int]],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Step:
    """Sequences of (start, count), their blocks scattered over the cache; block tables are on the host, as served."""
    positions = ModelPositions({"": model.method("rope" if method == RAW else method)}, "")
    needed = [-(-(start + count) // block_size) for start, count in rows]
    tables = torch.split(torch.randperm(sum(needed)), needed)
    first, sequences = 0, []
    for (start, count), table in zip(rows, tables, strict=True):
        sequences.append(SequenceRows(first, count, start, table, positions))
        first += count
    shape = (sum(needed), block_size, model.kv_heads, model.head_dim)
    keys, values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    query = torch.randn(first, model.query_heads, model.head_dim, dtype=dtype, device=device)
    metadata = AttentionMetadata(sequences, torch.zeros(0, dtype=torch.int64), block_size)
    return Step(query, keys, values, metadata, AttentionOptions(model.head_dim**-0.5, None if method == RAW else ""))


def decode_steps(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """(model, batch, context) that fit."""
    for name, model in plan.models.items():
        for batch, context in plan.decode:
            if batch * context * model.key_bytes(plan.dtype) <= plan.most_bytes:
                yield name, batch, context


def prefill_flops(model: AttentionShape, rows: int, start: int = 0) -> float:
    """FLOPs of the last `rows` rows of a prompt that has `start` tokens before them."""
    return 4.0 * model.head_dim * model.query_heads * (rows * start + rows * (rows + 1) / 2)


def low_precision(step: Step) -> Tensor:
    """Attention as a plain torch program does it in the step's dtype, which the reference does in fp32: the error that
    a kernel may make twice."""
    out = torch.empty_like(step.query)
    for sequence in step.metadata.sequences:
        rows, blocks = slice(sequence.first, sequence.first + sequence.count), sequence.block_table
        key, value = (
            cache[blocks.to(cache.device)].flatten(0, 1)[: sequence.length] for cache in (step.keys, step.values)
        )
        out[rows] = attend_sequence(step.query[rows], key, value, sequence, step.options)
    return out
