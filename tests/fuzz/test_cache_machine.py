"""KVCacheManager and the prefix cache against the contents of every block, token by token.

`content` says of each slot whose K and V lie in it: salt, method, and all tokens up to that row. Hashes and digests do
not occur here. Whether the K and V of two methods are the same in a row is found by their scores: K and V above the
first layer depend on how this row and all before it were read.

What must be found is a dict too: (salt, the reading of the block's last row, tokens) → block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prerope.cache.blocks.manager import KVCacheManager, PrefixHasher
from prerope.rope.frequencies import Rotary
from prerope.rope.model import ModelPositions, resolve_model
from prerope.rope.scores import method_scores
from prerope.rope.spec import RopeSpec

from tests.fuzz.budget import budget

BLOCK = 4
TRAINED = 16
MAX_TOKENS = 32
ROTARY = Rotary(16, 16, 1e4, "default", TRAINED, TRAINED)

METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "rope": ({"method": "rope"}, math.inf),
    "rerope 8": ({"method": "rerope", "window": 8}, 8),
    "rerope 7": ({"method": "rerope", "window": 7}, 7),
    "leaky 8": ({"method": "leaky_rerope", "window": 8, "leak": 4.0}, 8),
    "dynamic_ntk": ({"method": "dynamic_ntk"}, TRAINED),
    "dynamic_leaky": ({"method": "dynamic_leaky", "window": 6}, TRAINED),
    "log-n": ({"method": "rope", "logn": True}, TRAINED),
    "linear": ({"method": "linear", "factor": 2.0}, 0),
}
"""Name → (spec, the rows that it reads as plain rope: blocks wholly inside are shared, says the README)."""


@cache
def positions(method: str) -> ModelPositions:
    return resolve_model(RopeSpec(**METHODS[method][0]), {"": ROTARY}, 2 * TRAINED)


@cache
def rows_alike(one: str, other: str) -> int:
    """Rows from the first on in which two methods read every key alike, so that K and V are the same in all layers."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, MAX_TOKENS, 4, 16, generator=generator)
    first, second = (method_scores(query, key, positions(name).methods[""]) for name in (one, other))
    differs = ((first - second).abs() > 1e-4).any(dim=(0, 2))  # −inf − −inf is nan, which is not above
    return int(differs.nonzero()[0]) if differs.any() else MAX_TOKENS


Content = tuple[str, str, tuple[int, ...]]
"""Salt, method, and the tokens up to and including the row."""


@dataclass(eq=False)
class Tokens:
    """A sequence as the cache sees it; the last `num_scored` of its tokens are wanted for their logits."""

    token_ids: list[int]
    method: str
    salt: str
    num_scored: int
    hasher: PrefixHasher = field(init=False)
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0

    def __post_init__(self) -> None:
        self.hasher = PrefixHasher(BLOCK, positions(self.method), self.salt)

    @property
    def num_reusable_tokens(self) -> int:
        return max(0, len(self.token_ids) - self.num_scored)

    def content(self, row: int) -> Content:
        return (self.salt, self.method, tuple(self.token_ids[: row + 1]))

    def name(self, end: int) -> Content:
        """Of the block that ends before row `end`: equal for sequences that must share it."""
        return (self.salt, "rope" if end <= METHODS[self.method][1] else self.method, tuple(self.token_ids[:end]))


def same(one: Content | None, other: Content) -> bool:
    """Whether K and V of a row are those of another sequence's, and its tenant may know."""
    if one is None or (one[0], one[2]) != (other[0], other[2]):
        return False
    return len(other[2]) <= rows_alike(one[1], other[1])


class CacheMachine(RuleBasedStateMachine):
    """`live` have blocks; `content` is block → what its slots hold; `known` is what a prefix must be found by."""

    @initialize(num_blocks=st.integers(3, 14), caching=st.sampled_from([True, True, True, False]))
    def begin(self, num_blocks: int, caching: bool) -> None:
        self.cache = KVCacheManager(num_blocks, BLOCK, prefix_caching=caching)
        self.live: list[Tokens] = []
        self.content: dict[int, list[Content | None]] = {}
        self.known: dict[Content, int] = {}
        self.queried = self.hit = 0

    @rule(
        length=st.integers(1, MAX_TOKENS - 6),
        turn=st.sampled_from([0, 3, 7, 9, 16, 99]),
        method=st.sampled_from(sorted(METHODS)),
        salt=st.sampled_from(["", "", "tenant"]),
        num_scored=st.sampled_from([1, 1, 1, 7]),
        whole=st.booleans(),
    )
    def add(self, length: int, turn: int, method: str, salt: str, num_scored: int, whole: bool) -> None:
        tokens = [0] * min(turn, length) + [1] * max(0, length - turn)  # two that turn late share their beginning
        self._start(Tokens(tokens, method, salt, num_scored), whole=whole)

    def _start(self, one: Tokens, *, whole: bool) -> None:
        free, needed = self.cache.pool.num_free, self.cache.blocks_to_admit(one)
        expected = self._expected_prefix(one)
        assert self.cache.take_prefix(one) == len(expected) * BLOCK == one.num_computed_tokens
        assert one.block_table == expected
        self.queried, self.hit = self.queried + len(one.token_ids), self.hit + one.num_computed_tokens
        self.live.append(one)
        if whole:
            fits = self._grow(one, len(one.token_ids))
            assert fits == (needed <= free), "blocks_to_admit did not foresee it"
            assert not fits or free - self.cache.pool.num_free == needed

    def _expected_prefix(self, one: Tokens) -> list[int]:
        blocks: list[int] = []
        for end in range(BLOCK, one.num_reusable_tokens + 1, BLOCK):
            block = self.known.get(one.name(end))
            if block is None or not self.cache.prefix_caching:
                break
            blocks.append(block)
        return blocks

    def _grow(self, one: Tokens, num_tokens: int) -> bool:
        before, free = list(one.block_table), self.cache.pool.num_free
        held = {block for other in self.live for block in other.block_table}
        if not self.cache.grow(one, num_tokens):
            assert one.block_table == before
            assert self.cache.pool.num_free == free < math.ceil(num_tokens / BLOCK) - len(before)
            return False
        new = one.block_table[len(before) :]
        assert one.block_table[: len(before)] == before
        assert len(one.block_table) == max(len(before), math.ceil(num_tokens / BLOCK))
        assert held.isdisjoint(new), "a block that someone holds was handed out"
        self.content |= {block: [None] * BLOCK for block in new}
        self.known = {name: block for name, block in self.known.items() if block not in new}
        return True

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 14))
    def compute(self, data: st.DataObject, count: int) -> None:
        """A prefill chunk or a decode step."""
        one = data.draw(st.sampled_from(self.live))
        start = one.num_computed_tokens
        stop = min(start + count, len(one.token_ids))
        if stop == start or not self._grow(one, stop):
            return
        for row in range(start, stop):
            block = one.block_table[row // BLOCK]
            assert sum(other.block_table.count(block) for other in self.live) == 1, "two would write into one block"
            self.content[block][row % BLOCK] = one.content(row)
        one.num_computed_tokens = stop
        self.cache.remember(one, start)
        for index in range(start // BLOCK, stop // BLOCK):
            block = one.block_table[index]
            if self.cache.prefix_caching and block not in self.known.values():
                self.known.setdefault(one.name((index + 1) * BLOCK), block)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def append(self, data: st.DataObject, token: int) -> None:
        one = data.draw(st.sampled_from(self.live))
        if one.num_computed_tokens == len(one.token_ids) < MAX_TOKENS:
            one.token_ids.append(token)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        one = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.cache.release(one)
        assert (one.block_table, one.num_computed_tokens) == ([], 0)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), whole=st.booleans())
    def preempt(self, data: st.DataObject, whole: bool) -> None:
        """Released and begun again, as the same sequence, from what survives."""
        one = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.cache.release(one)
        self._start(one, whole=whole)

    @invariant()
    def holds(self) -> None:
        """What each sequence reads is its own, and what may be found later is what its name says."""
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity(self.live)
        for one in self.live:
            for row in range(one.num_computed_tokens):
                found = self.content[one.block_table[row // BLOCK]][row % BLOCK]
                assert same(found, one.content(row)), f"row {row} of {one} reads {found}"
        assert self.cache.pool.num_cached == len(self.known)
        assert (self.cache.queried_tokens, self.cache.hit_tokens) == (self.queried, self.hit)

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for one in self.live:
            self.cache.release(one)
        self.cache.check_integrity([])
        assert self.cache.pool.num_free == self.cache.pool.num_blocks


TestCache = CacheMachine.TestCase
TestCache.settings = budget(80, stateful_step_count=40)


def test_the_model_tells_methods_apart() -> None:
    """`rows_alike` finds borders by itself; the README's rule, which `METHODS` states, must lie within them."""
    for one, (_, plain) in METHODS.items():
        assert rows_alike(one, one) == MAX_TOKENS
        assert rows_alike("rope", one) >= min(plain, MAX_TOKENS)
        assert one == "rope" or rows_alike("rope", one) <= plain + 1, "at d = w near and far meet: one row more"
