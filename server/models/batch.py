"""One step as tensors: packed token ids, their positions, where K and V go, and which rows want logits.

All of it goes to the device in one piece, which does not wait for what runs there.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from prerope.cache.attention.types import AttentionMetadata, SequenceRows
from prerope.cache.blocks.states import StateRows
from prerope.cache.transfer import send
from prerope.rope.model import ModelPositions
from prerope.rope.reading import UNBOUNDED
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a step: tokens of one sequence at positions `start`, `start` + 1, …, whose blocks are allocated.

    block_table: at least the blocks up to its last token; an int64 array is taken as it is, without a copy.
    num_logits: how many of its last rows want logits.
    pending_place: where its last token is among those that the step before samples; None: it is in `token_ids`.
    state: the slots of its state, where layers keep one.
    selects_from: rows from this position on choose the far keys that they read.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int] | Ints
    positions: ModelPositions
    num_logits: int
    pending_place: int | None = None
    state: StateRows | None = None
    selects_from: int = UNBOUNDED


@dataclass(frozen=True, slots=True)
class Batch:
    """input_ids, position_ids [T] int64; logit_rows [N] int64: packed rows, in chunk order.

    states: of each sequence, where layers keep one.
    """

    input_ids: Tensor
    position_ids: Tensor
    logit_rows: Tensor
    metadata: AttentionMetadata
    states: Sequence[StateRows] = ()


def build_batch(chunks: Sequence[Chunk], block_size: int, device: torch.device, sampled: Tensor | None = None) -> Batch:
    """Pack chunks, in order. sampled: [n] int64 on the device: the tokens of the step before, computed or not yet."""
    ids, positions, slots, logit_rows = array("q"), array("q"), array("q"), array("q")
    pending_rows, pending_places = array("q"), array("q")
    sequences = []
    for chunk in chunks:
        first, stop = len(ids), chunk.start + len(chunk.token_ids)
        table = np.asarray(chunk.block_table, dtype=np.int64)[: -(-stop // block_size)]
        blocks = torch.from_numpy(table)
        sequences.append(
            SequenceRows(first, stop - chunk.start, chunk.start, blocks, chunk.positions, chunk.selects_from)
        )
        ids.extend(chunk.token_ids)
        positions.extend(range(chunk.start, stop))
        slots.extend(_slots(table, chunk.start, stop, block_size))
        logit_rows.extend(range(len(ids) - chunk.num_logits, len(ids)))
        if chunk.pending_place is not None:
            pending_rows.append(len(ids) - 1)
            pending_places.append(chunk.pending_place)
    parts = (ids, positions, slots, logit_rows, pending_rows, pending_places)
    sent: Tensor = send(np.frombuffer(bytearray().join(parts), dtype=np.int64), device)
    sizes = [len(part) for part in parts]
    input_ids, position_ids, slot_mapping, rows, pending, places = torch.split_with_sizes(sent, sizes)
    if pending_rows:
        assert sampled is not None
        input_ids.index_copy_(0, pending, sampled.index_select(0, places))
    states = [chunk.state for chunk in chunks if chunk.state is not None]
    return Batch(input_ids, position_ids, rows, AttentionMetadata(sequences, slot_mapping, block_size), states)


def _slots(table: Ints, start: int, stop: int, block_size: int) -> list[int]:
    """Where K and V of positions `start` … `stop` − 1 go."""
    blocks = table[start // block_size :].tolist()
    slots = [slot for block in blocks for slot in range(block * block_size, (block + 1) * block_size)]
    return slots[start % block_size :][: stop - start]
