"""The block pool against a simple model of it, over random histories: who holds what, and who is handed out next."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prerope.cache.blocks.manager import BlockPool

from tests.fuzz.budget import budget


class PoolHistory(RuleBasedStateMachine):
    """The model: who holds what as lists, contents as a dict, the free queue as a list (next to be reused first)."""

    @initialize(num_blocks=st.integers(2, 7))
    def begin(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.free = list(range(num_blocks))

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
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(self.tables)
        assert self.pool.num_free == len(self.free)
        assert self.pool.num_cached == len(self.content)
        for block in range(self.pool.num_blocks):
            assert self.pool.is_free(block) == (block in self.free)
        known = {block_hash: block for block, block_hash in self.content.items()}
        for value in range(10):
            assert self.pool.find(bytes([value])) == known.get(bytes([value]))

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for table in self.tables:
            self.pool.release(table)
        self.pool.check_integrity()
        assert self.pool.num_free == self.pool.num_blocks


TestPool = PoolHistory.TestCase
TestPool.settings = budget(60, stateful_step_count=40)
