"""Which sequences run in the next step, and with how many tokens each.

One token budget a step, shared by decode steps (one token each, always first) and prefill chunks. What is left after
the decodes goes to prefills, shortest remainder first, so that a short prompt is not stuck behind a 100k-token one;
the oldest prefill keeps a quarter of the budget whatever else arrives, so that it is not starved either. Beside decode
steps the budget is no more than what keeps the gaps of their streams short (`Pace`).

    budget 512:  │ 3 decodes │ oldest prefill ≥ 127 │ shortest prefill … next shortest … │ rest to the oldest │

Sequences that decode may have drafts of their next tokens verified, a row each (`server.engine.speculation`), where
blocks are spare and the budget leaves rows: drafts preempt nobody, and take an eighth of what prompts could have.

A sequence is admitted only when its whole prompt fits beside what the running prefills still need. When a running one
cannot grow, the sequence of highest rank number (latest, least urgent) is preempted: its blocks are released, and it
waits to be recomputed, from cached blocks where they survive.

Sequences may have a token that a step in flight samples. It is scheduled like any other, unless it will be their last;
and a sequence that was preempted meanwhile is admitted again when it is known. One whose grammar has not yet said what
may come next is left out of the step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from prerope.cache.blocks.documents import next_copied, span_at
from prerope.cache.blocks.manager import KVCacheManager
from prerope.rope.reading import UNBOUNDED
from prerope.server.engine.documents import Copy, DocumentReader, Documents
from prerope.server.engine.selection import most_rows
from prerope.server.engine.sequence import Sequence
from prerope.server.engine.speculation import Speculator
from prerope.server.engine.step import Scheduled

WHOLE_ROWS = 128
"""Shorter chunks read a prompt more slowly: each reads the weights, and packs the keys anew."""
LEAST_ROWS = 16
"""Where the gap leaves no room for a whole chunk. So few rows are computed as decode steps are, which read far keys
without packing them: at 20,000 keys a row costs as much in 8 or 16 as in 128, and a quarter more in 32 or 64."""
SCORED_S, LEAST_SCORED = 0.03, 8
"""Of a step are for rows that are scored, as nobody waits for the first of them: a stream hardly notices."""
COUNTED = 8
"""Rows that a step must have of prompts for its time to be told of."""
MULTIPLE = 32
FORGOTTEN = 0.995
"""What is left of a row's time in whole chunks after a step of fewer rows, so that one is tried again at last."""


class Pace:
    """How many rows of prompts a step takes while others stream: as many as go within the gap that streams may have.

    What a row takes grows with the prompt before it, and is known from the steps that ran last. A step that was too
    long is followed by a shorter one: so the gap is met from the second step on, whatever stands in it besides. Before
    any is known, a whole chunk is taken, or as few scored rows as ever.

    A row takes longer in few than in a whole chunk: behind 256 keys 1.4 times as long, behind 20,000 as long. So the
    two are known apart, and what a step takes for the others in it, and for having weights to read, is in neither.
    While chunks are few rows, a row of a whole one is taken to change as theirs does, and never to take longer.
    """

    def __init__(self, gap_s: float | None) -> None:
        """gap_s: seconds, or None for chunks of any length."""
        self._gap_s = gap_s
        self._others_s = 0.0  # of a step without rows of prompts
        self._whole_s = 0.0  # of a row of a whole chunk
        self._few_s = 0.0  # of a row of a smaller one, since the last whole one

    def add(self, num_prefilled: int, seconds: float, num_others: int = 0) -> None:
        """A step with so many rows of prompts, and others, is over."""
        if not num_prefilled:
            self._others_s = _smoothed(self._others_s, seconds)
        if num_prefilled < COUNTED:
            return
        others_s = min(self._others_s, 0.9 * seconds) if num_others else 0.0
        row_s = (seconds - others_s) / num_prefilled
        if num_prefilled >= WHOLE_ROWS:
            self._whole_s, self._few_s = max(row_s, _smoothed(self._whole_s, row_s)), 0.0
            return
        before, self._few_s = self._few_s, _smoothed(self._few_s, row_s)
        change = self._few_s / before if before else 1.0
        whole_s = min(self._whole_s * change or self._few_s, self._few_s)
        self._whole_s = whole_s if self._fitting(whole_s) >= WHOLE_ROWS else whole_s * FORGOTTEN

    def most_rows(self, budget: int) -> int:
        """The number of prompt rows in a step beside streams; at most the budget."""
        if self._gap_s is None:
            return budget
        if not self._whole_s:  # no prompt has been read since the start
            return min(budget, WHOLE_ROWS)
        fitting = self._fitting(self._whole_s)
        if fitting >= budget:
            return budget
        rows = int(fitting) // MULTIPLE * MULTIPLE
        return min(budget, rows if rows >= WHOLE_ROWS else LEAST_ROWS)

    def _fitting(self, row_s: float) -> float:
        """Rows of so many seconds that fit in the gap beside the others."""
        gap_s = self._gap_s or 0.0
        return (gap_s - min(self._others_s, gap_s / 2)) / row_s if row_s else float("inf")

    def most_scored(self, budget: int) -> int:
        """The number of these rows whose prompt log-probabilities are computed."""
        if self._gap_s is None:
            return budget
        if not self._whole_s:
            return min(budget, LEAST_SCORED)
        return min(budget, max(LEAST_SCORED, int(min(SCORED_S, self._gap_s) / (self._few_s or self._whole_s))))


def _smoothed(before: float, now: float) -> float:
    return (before + now) / 2 if before else now


OLDEST_SHARE = 4  # the oldest prefill keeps 1/4 of what the decodes leave
DRAFT_SHARE = 8  # drafts take at most 1/8 of that where there is something to prefill
SCORED_ROW = 8
"""What a row costs whose token's log-probability is asked for, in rows that are only read: its logits are ranked."""


class Scheduler:
    """Owns the waiting and running sequences and the cache's block tables."""

    def __init__(
        self,
        cache: KVCacheManager,
        *,
        max_num_seqs: int,
        max_batched_tokens: int,
        speculator: Speculator | None = None,
        pace: Pace | None = None,
    ) -> None:
        assert max_batched_tokens >= 1
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.speculator = speculator
        self.pace = pace or Pace(None)
        self.waiting: dict[str, Sequence] = {}
        self.running: dict[str, Sequence] = {}
        self.num_preemptions = 0
        self._documents = Documents(cache)

    @property
    def sequences(self) -> Iterable[Sequence]:
        return (*self.running.values(), *self.waiting.values())

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def holds(self, sequence: Sequence) -> bool:
        """Whether it runs or waits: it has neither finished nor been aborted."""
        if isinstance(sequence, DocumentReader):
            return sequence.parent.reader is sequence
        request_id = sequence.request_id
        return sequence is self.running.get(request_id) or sequence is self.waiting.get(request_id)

    def add(self, sequence: Sequence) -> None:
        self.waiting[sequence.request_id] = sequence

    def remove(self, request_id: str) -> Sequence | None:
        """Take a sequence out, finished or aborted, and release its blocks."""
        sequence = self.running.pop(request_id, None) or self.waiting.pop(request_id, None)
        if sequence is not None:
            self._release(sequence)
        return sequence

    def schedule(self) -> list[Scheduled]:
        """The next step; decodes first. Blocks for all of it are allocated when this returns."""
        plan: list[Scheduled] = []
        decoding = sorted((s for s in self.running.values() if s.decoding and not s.ending), key=lambda s: s.rank)
        decoding = [sequence for sequence in decoding if not sequence.waits_for_mask]
        for sequence in decoding[: self.max_batched_tokens]:
            if sequence.request_id in self.running and self._grow(sequence, sequence.num_tokens, plan):
                plan.append(Scheduled.of(sequence, 1, sequence.num_computed_tokens))
        spare = self._admit()
        if self.speculator is not None and plan:
            self._draft(self.speculator, plan, spare)
        left = self.max_batched_tokens - sum([one.num_rows for one in plan])
        self._schedule_prefills(self.pace.most_rows(left) if plan else left, plan)
        if self.cache.states is None:
            return plan
        steps = [(one.sequence.state, one.start, one.stop) for one in plan if one.sequence.state is not None]
        rows = self.cache.states.rows_of_step(steps, keep=self.cache.prefix_caching)
        return [one._replace(state=state) for one, state in zip(plan, rows, strict=True)]

    def _draft(self, speculator: Speculator, plan: list[Scheduled], spare: int) -> None:
        """Give decode steps their drafts, in `spare` blocks and those that they have.

        One whose last token is still under way gets them once it is known.
        """
        left = self.max_batched_tokens - len(plan)
        to_read = sum([s.num_remaining_tokens for s in self.running.values() if not s.decoding])
        most = left // DRAFT_SHARE if to_read else left
        num_others = self.pace.most_rows(min(to_read, left))
        drafts = speculator.plan([one.sequence for one in plan], num_others=num_others, most=most)
        for place, one in enumerate(plan):
            own = drafts.get(one.sequence)
            if own is None:
                continue
            if one.sequence.num_pending:
                plan[place] = one._replace(awaited=True)
                continue
            held = len(one.block_table)
            own = own[: (held + spare) * self.cache.block_size - one.stop]
            if own and self.cache.grow(one.sequence, one.stop + len(own)):
                spare -= len(one.block_table) - held
                plan[place] = one._replace(drafts=tuple(own))

    def _schedule_prefills(self, budget: int, plan: list[Scheduled]) -> None:
        if budget <= 0:
            return
        prefills = sorted((s for s in self.running.values() if not s.decoding), key=lambda s: s.rank)
        prefills = [sequence for sequence in prefills if not sequence.waits_for_mask]
        most = max(1, self.max_batched_tokens // SCORED_ROW)
        to_score = self.pace.most_scored(most) if plan else most
        for sequence, num_tokens in share(prefills, budget):
            if sequence.request_id not in self.running:
                continue
            if sequence.request.sampling.prompt_logprobs is not None:
                unscored = max(0, sequence.first_scored_row - sequence.num_computed_tokens)
                num_tokens = min(num_tokens, unscored + to_score)
                to_score -= max(0, num_tokens - unscored)
            self._schedule_prefill(sequence, num_tokens, plan)

    def _schedule_prefill(self, sequence: Sequence, num_tokens: int, plan: list[Scheduled]) -> None:
        """Schedule up to `num_tokens` rows of a prompt; documents that it comes to are copied, or read first."""
        position, documents, first = sequence.num_computed_tokens, sequence.request.documents, None
        while num_tokens > 0 and position < sequence.num_tokens:
            document = span_at(documents, position) if documents else None
            if document is None:
                stop = min(position + num_tokens, sequence.num_tokens)
                if documents:
                    stop = min(stop, next_copied(documents, position, stop))
                first = position if first is None else first
                if sequence.selects_from < UNBOUNDED:
                    stop = min(stop, max(sequence.selects_from, first + most_rows(self.cache.block_size)))
                if stop <= position or not self._grow(sequence, stop, plan):
                    return
                plan.append(Scheduled.of(sequence, stop - position, position))
                num_tokens, position = num_tokens - (stop - position), stop
                continue
            reader = self._documents.open(sequence, document, position)
            if reader.num_processed_tokens < reader.num_tokens:
                # The rows that a reader builds on, above all the prefix, may be computed in this very step: it waits.
                if first is None:
                    self._schedule_reader(reader, num_tokens, plan)
                else:
                    self._documents.close(sequence)
                return
            if not self._grow(sequence, document.stop, plan):
                return
            self._documents.copy(reader, position)
            position = document.stop
            if first is None:
                sequence.num_computed_tokens = position

    def _schedule_reader(self, reader: DocumentReader, num_tokens: int, plan: list[Scheduled]) -> None:
        start = reader.num_computed_tokens
        count = min(num_tokens, reader.num_remaining_tokens)
        if count and self._grow(reader, start + count, plan):
            plan.append(Scheduled.of(reader, count, start))

    def _admit(self) -> int:
        """Move waiting sequences into `running`, best rank first, until one does not fit: none overtakes it.

        Returns the blocks that nobody runs or waits for.
        """
        spare = self._spare_blocks()
        for sequence in sorted(self.waiting.values(), key=lambda s: s.rank):
            if len(self.running) >= self.max_num_seqs:
                break
            if sequence.num_pending:
                return 0
            if sequence.fetch is not None:
                continue
            needed = self.cache.blocks_to_admit(sequence)
            if sequence.request.documents:
                needed += self._documents.blocks_to_read(sequence)
            if needed > spare or not self.cache.has_state_for(sequence):
                return 0
            self.cache.take_prefix(sequence)
            if sequence.scheduled_at is None:
                sequence.scheduled_at = time.monotonic()
                sequence.num_cached_tokens = sequence.num_computed_tokens
            spare -= needed
            del self.waiting[sequence.request_id]
            self.running[sequence.request_id] = sequence
        return max(0, spare)

    def _spare_blocks(self) -> int:
        """Free blocks beside those that the running sequences are still to get."""
        return self.cache.pool.num_free - sum(self._blocks_to_finish(s) for s in self.running.values())

    def _blocks_to_finish(self, sequence: Sequence) -> int:
        """Blocks that a running sequence is still to get for the tokens that are known."""
        missing = self.cache.blocks_for(sequence.num_tokens) - len(sequence.block_table)
        return missing + (self._documents.blocks_to_read(sequence) if sequence.request.documents else 0)

    def _grow(self, sequence: Sequence, num_tokens: int, plan: list[Scheduled]) -> bool:
        """Allocate up to `num_tokens`, preempting from the least urgent end; False if this one was preempted."""
        owner = sequence.parent if isinstance(sequence, DocumentReader) else sequence
        while not self.cache.grow(sequence, num_tokens):
            # A sequence whose last token is under way goes first: its blocks are read no more, and it is done.
            victim = max(self.running.values(), key=lambda s: (s.ending, s.rank))
            gone = (victim, victim.reader)
            self.preempt(victim)
            plan[:] = [item for item in plan if item.sequence not in gone]
            if victim is owner:
                return False
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Back to waiting, with nothing computed; its place in the order stays."""
        del self.running[sequence.request_id]
        self._release(sequence)
        self.waiting[sequence.request_id] = sequence
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        if sequence.request.documents:
            self._documents.forget(sequence)
        if sequence.fetch is not None:
            sequence.fetch.cancelled, sequence.fetch = True, None
        self.cache.release(sequence)
        sequence.drafter = None  # only who runs has one: so they are few

    def take_copies(self) -> list[Copy]:
        """Copies to make, in order, before the rows of the step that was scheduled last."""
        copies, self._documents.copies = self._documents.copies, []
        return copies

    def check_integrity(self) -> None:
        """Assert that blocks and the block tables of all sequences agree."""
        readers = [s.reader for s in self.sequences if s.reader is not None]
        self.cache.check_integrity([*self.sequences, *readers])


def share(prefills: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
    """Split `budget` tokens over prefills given in rank order: [(sequence, tokens)], only those that get any."""
    if not prefills:
        return []
    oldest = prefills[0]
    grants = dict.fromkeys(prefills, 0)
    grants[oldest] = min(oldest.num_remaining_tokens, max(1, budget // OLDEST_SHARE))
    left = budget - grants[oldest]
    by_need = sorted(prefills, key=lambda s: (s.priority, s.num_remaining_tokens, s.rank))
    for sequence in by_need:
        more = min(sequence.num_remaining_tokens - grants[sequence], left)
        grants[sequence] += more
        left -= more
    return [(sequence, tokens) for sequence, tokens in grants.items() if tokens > 0]
