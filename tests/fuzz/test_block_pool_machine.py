"""The block pool against what must be true of it: nothing here mirrors its queue, only who holds what, and since when.

Each block has `written`, what a writer last put into it. A hash is the name of what was written, so `find` must lead to
a block that holds just that, and a block that is handed out anew must not be found by anybody.
"""

from __future__ import annotations

import itertools

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prerope.cache.blocks.manager import BlockPool

from tests.fuzz.budget import budget

CONTENTS = 20


def name(content: int) -> bytes:
    return b"content %d" % content


class PoolMachine(RuleBasedStateMachine):
    """Tables are what sequences hold; `known` is content → block; `freed` is block → when it was last let go."""

    @initialize(num_blocks=st.integers(2, 6))
    def begin(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.tables: list[list[int]] = []
        self.written: dict[int, int] = {}
        self.known: dict[int, int] = {}
        self.freed: dict[int, int] = dict.fromkeys(range(num_blocks), 0)
        self.clock = itertools.count(1)

    def holders(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    @rule(count=st.integers(1, 3))
    def allocate(self, count: int) -> None:
        count = min(count, len(self.freed))
        before = dict(self.freed)
        blocks = self.pool.allocate(count)
        self.tables.append(blocks)
        assert len(set(blocks)) == count
        assert set(blocks) <= before.keys(), "a block that someone holds was handed out"
        self._check_order(blocks, before)
        for block in blocks:
            del self.freed[block]
            self.written.pop(block, None)
        self.known = {content: block for content, block in self.known.items() if block not in blocks}

    def _check_order(self, blocks: list[int], free: dict[int, int]) -> None:
        """Blocks that nobody can find go first, then the least recently freed."""
        findable = set(self.known.values())
        taken = [block in findable for block in blocks]
        assert taken == sorted(taken), "a cached block went before one that holds nothing"
        left = free.keys() - set(blocks)
        if any(taken):
            assert left <= findable, "a cached block was evicted while one that holds nothing was free"
        ages = [free[block] for block, cached in zip(blocks, taken, strict=True) if cached]
        assert ages == sorted(ages)
        assert not ages or all(free[block] >= ages[-1] for block in left), "not the least recently freed"

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        contents = data.draw(st.lists(st.sampled_from(sorted(self.known)), unique=True, min_size=1, max_size=4))
        blocks = [self.pool.find(name(content)) for content in contents]
        assert [None if block is None else self.written[block] for block in blocks] == contents
        found = [block for block in blocks if block is not None]
        self.pool.share(found)
        for block in found:
            self.freed.pop(block, None)
        self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        for block in reversed(table):  # the end of a chain is of no use without its beginning
            if not self.holders(block):
                self.freed[block] = next(self.clock)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), content=st.integers(0, CONTENTS - 1), count=st.integers(1, 3))
    def write_and_remember(self, data: st.DataObject, content: int, count: int) -> None:
        for block in data.draw(st.sampled_from([table for table in self.tables if table]))[:count]:
            written = self.written.setdefault(block, content)  # a full block is written once
            self.pool.remember(block, name(written))
            self.known.setdefault(written, block)
            content = (content + 1) % CONTENTS

    @invariant()
    def accounts(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(self.tables)
        held = {block for table in self.tables for block in table}
        assert held.isdisjoint(self.freed)
        assert self.pool.num_free + len(held) == self.pool.num_blocks
        assert self.pool.num_cached == len(self.known)
        for block in range(self.pool.num_blocks):
            assert self.pool.is_free(block) == (block not in held)
        for content in range(CONTENTS):
            assert self.pool.find(name(content)) == self.known.get(content)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for table in self.tables:
            self.pool.release(table)
        self.pool.check_integrity()
        assert self.pool.num_free == self.pool.num_blocks


TestPool = PoolMachine.TestCase
TestPool.settings = budget(150, stateful_step_count=40)
