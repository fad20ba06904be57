"""KVCacheManager: which blocks a sequence gets, what it may take over, and what stays findable after it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from prerope.cache.blocks.manager import BlockTable, KVCacheManager, PrefixHasher
from prerope.rope.model import resolve_model
from prerope.rope.spec import RopeSpec

from tests.cache.layouts import rotary

BLOCK = 4
ROPE = resolve_model(RopeSpec(method="rope"), {"": rotary(16, 16)}, None)


@dataclass(eq=False)
class Tokens:
    """The least that the cache asks of a sequence."""

    token_ids: list[int]
    hasher: PrefixHasher = field(default_factory=lambda: PrefixHasher(BLOCK, ROPE, ""))
    block_table: BlockTable = field(default_factory=BlockTable)
    num_computed_tokens: int = 0
    num_scored_tokens: int = 1

    @property
    def num_reusable_tokens(self) -> int:
        return len(self.token_ids) - self.num_scored_tokens


def manager(num_blocks: int = 8, *, prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(num_blocks, BLOCK, prefix_caching=prefix_caching)


def compute(cache: KVCacheManager, sequence: Tokens, num_tokens: int) -> None:
    """What a step does: allocate, compute, make findable."""
    assert cache.grow(sequence, num_tokens)
    known, sequence.num_computed_tokens = sequence.num_computed_tokens, num_tokens
    cache.remember(sequence, known)


def finished(cache: KVCacheManager, num_tokens: int) -> None:
    """A sequence of tokens 0 … n−1 that came and went."""
    sequence = Tokens(list(range(num_tokens)))
    compute(cache, sequence, num_tokens)
    cache.release(sequence)


def test_grow_takes_blocks_as_tokens_need_them() -> None:
    cache, sequence = manager(), Tokens(list(range(20)))
    for num_tokens, num_blocks in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (9, 3), (3, 3)):
        assert cache.grow(sequence, num_tokens)
        assert len(sequence.block_table) == num_blocks
    assert cache.num_tokens == 32
    cache.check_integrity([sequence])


def test_grow_is_all_or_nothing() -> None:
    cache, sequence = manager(2), Tokens(list(range(20)))
    assert cache.grow(sequence, 4)
    assert not cache.grow(sequence, 12)
    assert len(sequence.block_table) == 1
    assert cache.pool.num_free == 1


@pytest.mark.parametrize(("num_tokens", "reused"), [(4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12), (30, 12)])
def test_the_last_token_is_never_taken_from_the_cache(num_tokens: int, reused: int) -> None:
    cache = manager()
    finished(cache, 13)
    sequence = Tokens(list(range(num_tokens)))
    assert cache.take_prefix(sequence) == reused == sequence.num_computed_tokens
    assert len(sequence.block_table) == reused // BLOCK
    assert (cache.queried_tokens, cache.hit_tokens) == (num_tokens, reused)
    cache.check_integrity([sequence])


def test_a_block_is_findable_only_once_it_is_computed() -> None:
    cache = manager()
    writer = Tokens(list(range(12)))
    assert cache.grow(writer, 12)
    assert cache.take_prefix(Tokens(list(range(12)))) == 0
    compute(cache, writer, 7)
    reader = Tokens(list(range(12)))
    assert cache.take_prefix(reader) == 4
    assert reader.block_table == writer.block_table[:1], "shared while both live"
    cache.check_integrity([writer, reader])


def test_a_hole_in_the_chain_ends_it() -> None:
    cache = manager(4)
    finished(cache, 16)
    other = Tokens([99] * 8)
    compute(cache, other, 8)  # takes the two last blocks of the chain
    reader = Tokens(list(range(16)))
    assert cache.take_prefix(reader) == 8
    cache.check_integrity([other, reader])


def test_no_more_is_hashed_than_is_looked_up() -> None:
    """The whole of a prompt of 100,000 tokens took 23 ms of the step that admitted it."""
    cache = manager(300)
    finished(cache, 17)
    for tokens, found in (([99] * 1000, 0), ([*range(16), *[99] * 984], 4)):
        sequence = Tokens(tokens)
        cache.blocks_to_admit(sequence)
        assert cache.take_prefix(sequence) == found * BLOCK
        assert len(sequence.hasher.hashes) == found + 1
        cache.release(sequence)


def test_two_equal_sequences_side_by_side_leave_one_known_copy() -> None:
    cache = manager()
    pair = [Tokens(list(range(8))) for _ in range(2)]
    for sequence in pair:
        compute(cache, sequence, 8)
    assert cache.pool.num_cached == 2
    for sequence in pair:
        cache.release(sequence)
    cache.check_integrity([])
    assert cache.pool.num_free == 8


def test_without_prefix_caching_nothing_is_kept() -> None:
    cache = manager(prefix_caching=False)
    finished(cache, 13)
    assert cache.pool.num_cached == 0
    assert cache.take_prefix(Tokens(list(range(13)))) == 0


def test_blocks_to_admit_counts_what_would_leave_the_free_ones() -> None:
    cache = manager()
    finished(cache, 13)
    newcomer = Tokens(list(range(20)))
    assert cache.blocks_to_admit(newcomer) == 5, "cached but free: taking them back uses them up"
    holder = Tokens(list(range(13)))
    cache.take_prefix(holder)
    assert cache.blocks_to_admit(newcomer) == 2, "held by another: sharing costs nothing"
    newcomer.num_scored_tokens = len(newcomer.token_ids)
    assert cache.blocks_to_admit(newcomer) == 5, "nothing to share where every token is scored"


def test_release_forgets_progress_and_keeps_content() -> None:
    cache, sequence = manager(), Tokens(list(range(13)))
    compute(cache, sequence, 13)
    cache.release(sequence)
    assert (sequence.block_table, sequence.num_computed_tokens) == ([], 0)
    assert cache.take_prefix(sequence) == 12, "a preempted sequence finds its own blocks again"
