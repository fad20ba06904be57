"""A step as tensors, against the same row by row in plain Python; and tokens that only the device knows."""

from __future__ import annotations

import random

import pytest
import torch
from prerope.cache.blocks.manager import BlockTable
from prerope.server.models.model import Batch, Chunk, build_batch

from tests.engine.scripted_model import POSITIONS

CPU = torch.device("cpu")


def chunks(seed: int, block_size: int) -> list[Chunk]:
    draw = random.Random(seed)
    found = []
    for _ in range(draw.randint(1, 6)):
        start, count = draw.choice([0, 1, 15, 16, 17, 40]), draw.choice([1, 1, 2, 16, 33])
        table = draw.sample(range(1000), -(-(start + count) // block_size) + draw.randint(0, 3))
        tokens = [draw.randrange(500) for _ in range(count)]
        found.append(Chunk.of(tokens, start, table, POSITIONS, draw.choice([0, 1, count])))
    return found


def by_rows(chunks: list[Chunk], block_size: int) -> list[tuple[int, int, int, bool]]:
    """(id, position, slot, whether logits are wanted) of every row."""
    return [
        (
            token,
            chunk.start + i,
            int(chunk.block_table[(chunk.start + i) // block_size]) * block_size + (chunk.start + i) % block_size,
            i >= len(chunk.token_ids) - chunk.num_logits,
        )
        for chunk in chunks
        for i, token in enumerate(chunk.token_ids)
    ]


def rows_of(batch: Batch) -> list[tuple[int, int, int, bool]]:
    wanted = set(batch.logit_rows.tolist())
    columns = (batch.input_ids, batch.position_ids, batch.metadata.slot_mapping)
    return [(*row, i in wanted) for i, row in enumerate(zip(*(c.tolist() for c in columns), strict=True))]


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_packed_rows(block_size: int) -> None:
    for seed in range(30):
        given = chunks(seed, block_size)
        batch = build_batch(given, block_size, CPU)
        assert rows_of(batch) == by_rows(given, block_size)
        assert batch.logit_rows.tolist() == sorted(batch.logit_rows.tolist())
        first = 0
        for chunk, sequence in zip(given, batch.metadata.sequences, strict=True):
            assert (sequence.first, sequence.count, sequence.start) == (first, len(chunk.token_ids), chunk.start)
            assert sequence.block_table.tolist() == chunk.block_table.tolist()[: -(-sequence.length // block_size)]
            first += sequence.count


def test_pending_tokens_are_taken_from_the_step_before() -> None:
    """By their place there, in any order, beside rows whose tokens are known."""
    known, sampled = [3, 4, 5], torch.tensor([70, 71, 72])
    pending = [Chunk.of([-1], 4 + place, [0, 1], POSITIONS, 1, place) for place in (2, 0)]
    batch = build_batch([pending[0], Chunk.of(known, 0, [2], POSITIONS, 1), pending[1]], 4, CPU, sampled)
    assert batch.input_ids.tolist() == [72, *known, 70]
    assert batch.position_ids.tolist() == [6, 0, 1, 2, 4]
    assert sampled.tolist() == [70, 71, 72]


def test_a_block_table_is_not_copied_and_what_was_given_never_changes() -> None:
    table, views = BlockTable(), []
    for length in range(1, 200):
        table.extend([1000 + length])
        view = table.head(length)
        assert view.tolist() == list(table)
        views.append(view)
    assert [view.tolist() for view in views] == [list(table[: len(view)]) for view in views]
    assert table.head(150).base is table.head(199).base
    batch = build_batch([Chunk.of([7], 150, table.head(151), POSITIONS, 1)], 1, CPU)
    assert batch.metadata.sequences[0].block_table.data_ptr() == table.head(1).ctypes.data
