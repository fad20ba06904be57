"""The block pool against a simple model of it, over random histories, and its rules one by one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prerope.cache.blocks.manager import BlockPool

NUM_BLOCKS = 7


class PoolHistory(RuleBasedStateMachine):
    """The model: who holds what as lists, contents as a dict, the free queue as a list (next to be reused first)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.free = list(range(NUM_BLOCKS))

    def held(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.free)))
        blocks = self.pool.allocate(count)
        assert blocks == self.free[:count]
        del self.free[:count]
        for block in blocks:
            self.content.pop(block, None)
        self.tables.append(blocks)

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        hashes = data.draw(st.lists(st.sampled_from(sorted(self.content.values())), unique=True, min_size=1))
        found = [self.pool.find(block_hash) for block_hash in hashes]
        blocks = [block for block in found if block is not None]
        assert [self.content[block] for block in blocks] == hashes
        self.pool.share(blocks)
        self.free = [block for block in self.free if block not in blocks]
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        for block in reversed(table):
            if self.held(block):
                continue
            if block in self.content:
                self.free.append(block)
            else:
                self.free.insert(0, block)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), value=st.integers(0, 9))
    def remember(self, data: st.DataObject, value: int) -> None:
        block = data.draw(st.sampled_from(sorted({block for table in self.tables for block in table})))
        block_hash = bytes([value])
        self.pool.remember(block, block_hash)
        if block not in self.content and block_hash not in self.content.values():
            self.content[block] = block_hash

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity(self.tables)
        assert self.pool.num_free == len(self.free)
        assert self.pool.num_cached == len(self.content)
        for block in range(NUM_BLOCKS):
            assert self.pool.is_free(block) == (block in self.free)
        known = {block_hash: block for block, block_hash in self.content.items()}
        for value in range(10):
            assert self.pool.find(bytes([value])) == known.get(bytes([value]))

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.release(table)
        self.pool.check_integrity()
        assert self.pool.num_free == NUM_BLOCKS


TestPoolHistory = PoolHistory.TestCase
TestPoolHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_end_of_a_chain_is_reused_before_its_beginning() -> None:
    pool = BlockPool(4)
    chain = pool.allocate(4)
    for place, block in enumerate(chain):
        pool.remember(block, bytes([place]))
    pool.release(chain)
    pool.allocate(2)
    assert [pool.find(bytes([place])) is not None for place in range(4)] == [True, True, False, False]


def test_least_recently_freed_goes_first_and_being_shared_makes_recent() -> None:
    pool = BlockPool(3)
    for place in range(3):
        (block,) = pool.allocate(1)
        pool.remember(block, bytes([place]))
    for place in range(3):
        pool.release([pool.find(bytes([place]))])  # type: ignore[list-item]
    oldest = pool.find(bytes([0]))
    assert oldest is not None
    pool.share([oldest])
    pool.release([oldest])
    pool.allocate(2)
    assert pool.find(bytes([0])) == oldest


def test_blocks_without_content_are_reused_before_cached_ones() -> None:
    pool = BlockPool(3)
    cached, partial = pool.allocate(2)
    pool.remember(cached, b"known")
    pool.release([cached])
    pool.release([partial])
    assert pool.allocate(1) == [partial]
    assert pool.find(b"known") == cached


def test_misuse_is_caught() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([block])
    with pytest.raises(AssertionError, match=r"allocate\(3\) with 2 free"):
        pool.allocate(3)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity([[0]])


def test_integrity_notices_a_leak_a_lost_block_and_a_wrong_index() -> None:
    leaking = BlockPool(2)
    leaking.allocate(1)
    with pytest.raises(AssertionError, match="reference counts"):
        leaking.check_integrity()
    lost = BlockPool(2)
    del lost._free[0]
    with pytest.raises(AssertionError, match="free queue"):
        lost.check_integrity()
    misled = BlockPool(2)
    misled._block_of[b"x"] = 1
    with pytest.raises(AssertionError, match="hash index"):
        misled.check_integrity()
