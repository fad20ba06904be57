"""One step as tensors: packed token ids, their positions, where K and V go, and which rows want logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache.attention import AttentionMetadata, SequenceRows
from rope.model_positions import ModelPositions


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a step: tokens of one sequence at positions `start`, `start` + 1, …, whose blocks are allocated.

    num_logits: how many of its last rows want logits.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    positions: ModelPositions
    num_logits: int


@dataclass(frozen=True, slots=True)
class Batch:
    """input_ids, position_ids [T] int64; logit_rows [N] int64: packed rows, in chunk order."""

    input_ids: Tensor
    position_ids: Tensor
    logit_rows: Tensor
    metadata: AttentionMetadata


def build_batch(chunks: Sequence[Chunk], block_size: int, device: torch.device) -> Batch:
    """Pack chunks, in order."""
    ids: list[int] = []
    positions, slots, sequences, logit_rows = [], [], [], []
    for chunk in chunks:
        count = len(chunk.token_ids)
        stop = chunk.start + count
        table = torch.tensor(chunk.block_table[: -(-stop // block_size)])
        where = torch.arange(chunk.start, stop)
        sequences.append(SequenceRows(len(ids), count, chunk.start, table.to(device), chunk.positions))
        positions.append(where)
        slots.append(table[where // block_size] * block_size + where % block_size)
        logit_rows.append(torch.arange(len(ids) + count - chunk.num_logits, len(ids) + count))
        ids.extend(chunk.token_ids)
    metadata = AttentionMetadata(sequences, torch.cat(slots).to(device), block_size)
    return Batch(
        torch.tensor(ids).to(device), torch.cat(positions).to(device), torch.cat(logit_rows).to(device), metadata
    )
