"""Which sequences run in the next step, and with how many tokens each.

One token budget a step, shared by decode steps (one token each, always first) and prefill chunks. What is left after
the decodes goes to prefills, shortest remainder first, so that a short prompt is not stuck behind a 100k-token one;
the oldest prefill keeps a quarter of the budget whatever else arrives, so that it is not starved either.

    budget 512:  │ 3 decodes │ oldest prefill ≥ 127 │ shortest prefill … next shortest … │ rest to the oldest │

A sequence is admitted only when its whole prompt fits beside what the running prefills still need. When a running one
cannot grow, the sequence of highest rank number (latest, least urgent) is preempted: its blocks are released, and it
waits to be recomputed, from cached blocks where they survive.

Sequences may have a token that a step in flight samples. It is scheduled like any other, unless it will be their last;
and a sequence that was preempted meanwhile is admitted again when it is known.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

from prerope.cache.blocks.manager import KVCacheManager
from prerope.server.engine.sequence import Sequence

OLDEST_SHARE = 4  # the oldest prefill keeps 1/4 of what the decodes leave


class Scheduled(NamedTuple):
    """`num_new_tokens` of one sequence, from its `num_computed_tokens` on."""

    sequence: Sequence
    num_new_tokens: int


class Scheduler:
    """Owns the waiting and running sequences and the cache's block tables."""

    def __init__(self, cache: KVCacheManager, *, max_num_seqs: int, max_batched_tokens: int) -> None:
        assert max_batched_tokens >= 1
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.waiting: dict[str, Sequence] = {}
        self.running: dict[str, Sequence] = {}
        self.num_preemptions = 0

    @property
    def sequences(self) -> Iterable[Sequence]:
        return (*self.running.values(), *self.waiting.values())

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def holds(self, sequence: Sequence) -> bool:
        """Whether it runs or waits: it has neither finished nor been aborted."""
        request_id = sequence.request_id
        return sequence is self.running.get(request_id) or sequence is self.waiting.get(request_id)

    def add(self, sequence: Sequence) -> None:
        self.waiting[sequence.request_id] = sequence

    def remove(self, request_id: str) -> Sequence | None:
        """Take a sequence out, finished or aborted, and release its blocks."""
        sequence = self.running.pop(request_id, None) or self.waiting.pop(request_id, None)
        if sequence is not None:
            self.cache.release(sequence)
        return sequence

    def schedule(self) -> list[Scheduled]:
        """The next step; decodes first. Blocks for all of it are allocated when this returns."""
        plan: list[Scheduled] = []
        decoding = sorted((s for s in self.running.values() if s.decoding and not s.ending), key=lambda s: s.rank)
        for sequence in decoding[: self.max_batched_tokens]:
            if sequence.request_id in self.running and self._grow(sequence, 1, plan):
                plan.append(Scheduled(sequence, 1))
        self._schedule_prefills(self.max_batched_tokens - len(plan), plan)
        return plan

    def _schedule_prefills(self, budget: int, plan: list[Scheduled]) -> None:
        if budget <= 0:
            return
        self._admit()
        prefills = sorted((s for s in self.running.values() if not s.decoding), key=lambda s: s.rank)
        for sequence, num_tokens in share(prefills, budget):
            if sequence.request_id in self.running and self._grow(sequence, num_tokens, plan):
                plan.append(Scheduled(sequence, num_tokens))

    def _admit(self) -> None:
        """Move waiting sequences into `running`, best rank first, until one does not fit: none overtakes it."""
        spare = self.cache.pool.num_free - sum(
            self.cache.blocks_for(s.num_tokens) - len(s.block_table) for s in self.running.values()
        )
        for sequence in sorted(self.waiting.values(), key=lambda s: s.rank):
            if len(self.running) >= self.max_num_seqs or sequence.num_pending:
                return
            needed = self.cache.blocks_to_admit(sequence)
            if needed > spare:
                return
            self.cache.take_prefix(sequence)
            if sequence.scheduled_at is None:
                sequence.scheduled_at = time.monotonic()
                sequence.num_cached_tokens = sequence.num_computed_tokens
            spare -= needed
            del self.waiting[sequence.request_id]
            self.running[sequence.request_id] = sequence

    def _grow(self, sequence: Sequence, num_tokens: int, plan: list[Scheduled]) -> bool:
        """Allocate for `num_tokens` more, preempting from the least urgent end; False if this one was preempted."""
        while not self.cache.grow(sequence, sequence.num_computed_tokens + num_tokens):
            # One whose last token is under way reads its blocks no more, and is not computed again.
            victim = max(self.running.values(), key=lambda s: (s.ending, s.rank))
            self.preempt(victim)
            plan[:] = [item for item in plan if item.sequence is not victim]
            if victim is sequence:
                return False
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Back to waiting, with nothing computed; its place in the order stays."""
        del self.running[sequence.request_id]
        self.cache.release(sequence)
        self.waiting[sequence.request_id] = sequence
        self.num_preemptions += 1


def share(prefills: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
    """Split `budget` tokens over prefills given in rank order: [(sequence, tokens)], only those that get any."""
    if not prefills:
        return []
    oldest = prefills[0]
    grants = dict.fromkeys(prefills, 0)
    grants[oldest] = min(oldest.num_remaining_tokens, max(1, budget // OLDEST_SHARE))
    left = budget - grants[oldest]
    by_need = sorted(prefills, key=lambda s: (s.request.priority, s.num_remaining_tokens, s.rank))
    for sequence in by_need:
        more = min(sequence.num_remaining_tokens - grants[sequence], left)
        grants[sequence] += more
        left -= more
    return [(sequence, tokens) for sequence, tokens in grants.items() if tokens > 0]
