"""The scheduler over a tiny cache, with a script for a model, against plain truths about each step and about waiting.

The script writes into every slot which tokens its K and V stand for, and checks all that a sequence reads. The bounds
on waiting follow from two truths, which are checked in each step: the running sequence of best rank gets tokens in
every step, and nobody is admitted over the head of a waiting one of better rank.
"""

from __future__ import annotations

import itertools
import zlib

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prerope.cache.blocks.manager import KVCacheManager, PrefixHasher
from prerope.server.engine.pace import OLDEST_SHARE
from prerope.server.engine.sequence import EngineRequest, SamplingParams, Sequence
from prerope.server.engine.step import Scheduled

from tests.engine.scripted import POSITIONS, RecordingScheduler
from tests.fuzz.budget import budget

BLOCK = 4


def next_token(token_ids: list[int]) -> int:
    return zlib.crc32(bytes(token_ids)) % 5


class Model:
    """What lies in every slot of the cache: (salt, tokens up to this one)."""

    def __init__(self, cache: KVCacheManager) -> None:
        self.cache = cache
        self.slots: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}

    def run(self, one: Sequence, count: int, live: list[Sequence]) -> None:
        """Compute `count` more tokens of one sequence, and its next token where all are computed."""
        start = one.num_computed_tokens
        for row in range(start):
            assert self.slots[self.slot(one, row)] == self.value(one, row), "it reads what is not its own"
        for row in range(start, start + count):
            slot = self.slot(one, row)
            assert sum(slot[0] in other.block_table for other in live) == 1, "two would write into one block"
            self.slots[slot] = self.value(one, row)
        one.num_computed_tokens = start + count
        self.cache.remember(one, start)
        if one.num_remaining_tokens == 0:
            one.append(next_token(one.token_ids))

    def slot(self, one: Sequence, row: int) -> tuple[int, int]:
        return (one.block_table[row // BLOCK], row % BLOCK)

    def value(self, one: Sequence, row: int) -> tuple[str, tuple[int, ...]]:
        return (one.request.cache_salt, tuple(one.token_ids[: row + 1]))


def best(sequences: list[Sequence]) -> Sequence | None:
    return min(sequences, key=lambda one: one.rank, default=None)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests of one or several sequences come, go and are preempted; every step is checked."""

    @initialize(budget=st.integers(3, 40), max_num_seqs=st.integers(1, 5), num_blocks=st.integers(5, 20))
    def begin(self, budget: int, max_num_seqs: int, num_blocks: int) -> None:
        self.budget = max(budget, max_num_seqs)  # as the engine demands of its settings
        self.cache = KVCacheManager(num_blocks, BLOCK, prefix_caching=True)
        self.scheduler = RecordingScheduler(self.cache, max_num_seqs=max_num_seqs, max_batched_tokens=self.budget)
        self.model = Model(self.cache)
        self.ids = itertools.count()
        self.num_steps = 0
        self.idle = False
        self.patience: tuple[Sequence, int] | None = None  # who waits for admission first, and until which step

    @rule(
        common=st.integers(0, 24),
        own=st.integers(1, 10),
        family=st.integers(0, 2),
        max_tokens=st.integers(1, 9),
        num_choices=st.sampled_from([1, 1, 1, 3]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        salt=st.sampled_from(["", "", "tenant"]),
    )
    def add(
        self, common: int, own: int, family: int, max_tokens: int, num_choices: int, priority: int, salt: str
    ) -> None:
        prompt = [10 + family] * common + [100 + next(self.ids) % 100] * own
        prompt = prompt[: self.cache.num_tokens - max_tokens] or [1]  # longer ones are refused before they get here
        for _ in range(num_choices):
            request = EngineRequest(
                str(next(self.ids)), prompt, SamplingParams(max_tokens=max_tokens), cache_salt=salt, priority=priority
            )
            hasher = PrefixHasher(BLOCK, POSITIONS, salt)
            self.scheduler.add(Sequence(request, POSITIONS, hasher, None, list(prompt), len(prompt)))

    @rule()
    def step(self) -> None:
        running = dict(self.scheduler.running)
        decoding = [one for one in running.values() if one.decoding]
        plan = self.scheduler.schedule()
        self.num_steps += 1
        self._check_plan(plan, decoding)
        self._check_order(plan, running, decoding)
        for one, count, *_ in plan:
            self.model.run(one, count, list(self.scheduler.sequences))
            if one.num_output_tokens == one.sampling.max_tokens:
                self._check_output(one)
                assert self.scheduler.remove(one.request_id) is one
        self._check_patience()
        assert plan or not self.idle or not self.scheduler.has_work(), "two steps in a row without a token"
        self.idle = not plan

    @rule(count=st.integers(2, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.scheduler.has_work())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from([one.request_id for one in self.scheduler.sequences]))
        one = self.scheduler.remove(request_id)
        assert one is not None
        assert one.block_table == []
        assert self.scheduler.remove(request_id) is None

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """In between, as if room had been needed."""
        running = self.scheduler.running
        self.scheduler.preempt(running[data.draw(st.sampled_from(list(running)))])
        self.idle = False  # whoever was to decode in the next step is to be admitted again

    def _check_plan(self, plan: list[Scheduled], decoding: list[Sequence]) -> None:
        running = self.scheduler.running
        assert sum(count for _, count, *_ in plan) <= self.budget
        assert len({one.request_id for one, *_ in plan}) == len(plan)
        assert len(running) <= self.scheduler.max_num_seqs
        for one, count, *_ in plan:
            assert running.get(one.request_id) is one, "scheduled, but preempted since"
            assert 1 <= count <= one.num_remaining_tokens
            assert len(one.block_table) * BLOCK >= one.num_computed_tokens + count
        again = self.scheduler.preempted  # and perhaps admitted since, to read what is left of it in the same step
        decodes = [one for one, *_ in plan if one in decoding and one.request_id not in again]
        assert [one for one, *_ in plan[: len(decodes)]] == sorted(decodes, key=lambda one: one.rank), "decodes first"
        missing = {one.request_id for one in decoding} - {one.request_id for one in decodes}
        assert missing <= self.scheduler.preempted, "a stream got no token, and made no room either"

    def _check_order(self, plan: list[Scheduled], before: dict[str, Sequence], decoding: list[Sequence]) -> None:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        granted = {one.request_id: count for one, count, *_ in plan}
        for preempted in self.scheduler.preempted & waiting.keys():
            one = waiting[preempted]
            assert (one.block_table, one.num_computed_tokens) == ([], 0)
            assert all(other.rank < one.rank for other in running.values()), "a less urgent one kept its blocks"
        admitted = [one for request_id, one in running.items() if request_id not in before]
        for one in admitted:
            assert all(one.rank < other.rank for other in waiting.values()), "admitted over another's head"
        needed = sum(self.cache.blocks_for(one.num_tokens) - len(one.block_table) for one in running.values())
        assert not admitted or needed <= self.cache.pool.num_free, "admitted, and its prompt does not fit"
        first = best(list(running.values()))
        if first is not None and not (first in admitted and first.decoding):  # that one decodes in the next step
            assert first.request_id in granted, "the most urgent sequence got nothing"
        oldest = best([one for one in running.values() if not one.decoding])
        if oldest is not None and oldest.request_id in granted:
            share = max(1, (self.budget - len(decoding)) // OLDEST_SHARE)
            assert granted[oldest.request_id] >= min(share, oldest.num_remaining_tokens)

    def _check_output(self, one: Sequence) -> None:
        tokens = list(one.request.prompt_token_ids)
        for _ in range(one.sampling.max_tokens):
            tokens.append(next_token(tokens))
        assert one.token_ids == tokens

    def _check_patience(self) -> None:
        """Whoever is first of all, and waits, is admitted once those that run have had their tokens one by one."""
        first = best(list(self.scheduler.sequences))
        if first is None or first.request_id in self.scheduler.running:
            self.patience = None
        elif self.patience is None or self.patience[0] is not first:
            work = [one.num_prompt_tokens + one.sampling.max_tokens for one in self.scheduler.running.values()]
            self.patience = (first, self.num_steps + sum(work) + 1)
        else:
            assert self.num_steps <= self.patience[1], "it starves"

    @invariant()
    def accounts(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.cache.check_integrity(self.scheduler.sequences)
        for one in self.scheduler.waiting.values():
            assert one.block_table == [], "a waiting sequence holds blocks"
        assert self.scheduler.running.keys().isdisjoint(self.scheduler.waiting)

    def teardown(self) -> None:
        """With no more arrivals all end, within a step for each of their tokens, and every block is free or cached."""
        if not hasattr(self, "scheduler"):
            return
        limit = sum(one.num_prompt_tokens + one.sampling.max_tokens + 1 for one in self.scheduler.sequences)
        for _ in range(limit):
            if self.scheduler.has_work():
                self.step()
        assert not self.scheduler.has_work(), f"not done after {limit} steps"
        self.cache.check_integrity([])
        assert self.cache.pool.num_free == self.cache.pool.num_blocks


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = budget(80, stateful_step_count=40)
