"""A scheduler and its block tables without a model: a script that always answers 'token 7', and checks every step."""

from __future__ import annotations

import itertools
from typing import Any

from prerope.cache.blocks.manager import KVCacheManager
from prerope.rope.frequencies import Rotary
from prerope.rope.model import resolve_model
from prerope.rope.spec import RopeSpec
from prerope.server.engine.scheduler import Scheduler
from prerope.server.engine.sequence import EngineRequest, SamplingParams, Sequence
from prerope.server.engine.step import Scheduled

BLOCK = 16
POSITIONS = resolve_model(RopeSpec(method="rerope"), {"": Rotary(16, 16, 1e4, "default", 64, 64)}, None)
IDS = itertools.count()


def sequence(
    prompt: list[int], max_tokens: int = 4, *, priority: int = 0, block_size: int = BLOCK, **sampling: Any
) -> Sequence:
    request = EngineRequest(str(next(IDS)), prompt, SamplingParams(max_tokens, **sampling), priority=priority)
    return Sequence.from_request(request, POSITIONS, block_size, None)


def unique(length: int) -> list[int]:
    """A prompt that shares no prefix with any other."""
    return [next(IDS)] * length


class RecordingScheduler(Scheduler):
    """Notes who was preempted in a step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.preempted: set[str] = set()

    def schedule(self) -> list[Scheduled]:
        self.preempted = set()
        return super().schedule()

    def preempt(self, sequence: Sequence) -> None:
        self.preempted.add(sequence.request_id)
        super().preempt(sequence)


class Script:
    """A scheduler and what follows each of its steps. Checks what must hold of every step."""

    def __init__(self, num_blocks: int, *, budget: int = 512, max_num_seqs: int = 64, block_size: int = BLOCK) -> None:
        self.cache = KVCacheManager(num_blocks, block_size, prefix_caching=True)
        self.scheduler = RecordingScheduler(self.cache, max_num_seqs=max_num_seqs, max_batched_tokens=budget)
        self.budget = budget
        self.steps = 0

    def add(self, *sequences: Sequence) -> None:
        for one in sequences:
            self.scheduler.add(one)

    def step(self) -> list[Scheduled]:
        decoding = [s for s in self.scheduler.running.values() if s.decoding]
        plan = self.scheduler.schedule()
        self.steps += 1
        self._check(plan, decoding)
        for one, count, *_ in plan:
            known = one.num_computed_tokens
            one.num_computed_tokens += count
            self.cache.remember(one, known)
            if one.num_remaining_tokens == 0:
                one.append(7)
                if one.num_output_tokens >= one.sampling.max_tokens:
                    self.scheduler.remove(one.request_id)
        self.check_integrity()
        return plan

    def _check(self, plan: list[Scheduled], decoding: list[Sequence]) -> None:
        running, preempted = self.scheduler.running, self.scheduler.preempted
        assert sum(count for _, count, *_ in plan) <= self.budget
        assert len({one.request_id for one, *_ in plan}) == len(plan)
        assert len(running) <= self.scheduler.max_num_seqs
        for one, count, *_ in plan:
            assert one.request_id in running, "scheduled, but preempted since"
            assert 1 <= count <= one.num_remaining_tokens
            assert len(one.block_table) * self.cache.block_size >= one.num_computed_tokens + count
        scheduled = {one.request_id for one, *_ in plan}
        passed_over = {one.request_id for one in decoding} - scheduled - preempted
        assert not passed_over, "a decode neither ran nor made room for another"

    def check_integrity(self) -> None:
        self.cache.check_integrity(self.scheduler.sequences)

    def finish(self, max_steps: int = 2000) -> None:
        """To the end, which must come; every block is free or cached then."""
        for _ in range(max_steps):
            if not self.scheduler.has_work():
                break
            self.step()
        assert not self.scheduler.has_work(), "it does not come to an end"
        self.check_integrity()
        assert self.cache.pool.num_free == self.cache.pool.num_blocks
