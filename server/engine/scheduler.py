"""Which sequences run in the next step, and with how many tokens each.

One token budget a step, shared by decode steps (one token each, always first) and prefill chunks. What is left after
the decodes goes to prefills, shortest remainder first, so that a short prompt is not stuck behind a 100k-token one;
the oldest prefill keeps a quarter of the budget whatever else arrives, so that it is not starved either. Beside decode
steps the budget is no more than what keeps the gaps of their streams short (`server.engine.pace`).

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
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prerope.cache.blocks.manager import KVCacheManager
from prerope.rope.reading import UNBOUNDED
from prerope.server.engine.documents import Copy, DocumentReader, Documents
from prerope.server.engine.pace import FEW, GROUP, WHOLE, Pace, share
from prerope.server.engine.selection import most_rows
from prerope.server.engine.sequence import Sequence
from prerope.server.engine.speculation import Speculator
from prerope.server.engine.step import Rows, Scheduled

if TYPE_CHECKING:
    from prerope.server.config import EngineConfig
    from prerope.server.engine.memory.sizing import CacheSize

DRAFT_SHARE = 8  # drafts take at most 1/8 of what the decodes leave where there is something to prefill
SCORED_ROW = 8
"""What a row costs whose token's log-probability is asked for, in rows that are only read: its logits are ranked."""

RECENT = 32
"""Steps of which a quarter are not late: a dozen in a row are, while a worker reads the prompt that comes next."""
FORGOTTEN = 0.998
"""What is left after each step of a row's time in sizes where it is longer: what was late by chance is tried again."""
LATE = 2
"""In a larger step no row takes so many times as long as in a smaller one but by chance, as the first of all may."""
ANEW, HOPED = 0.95, 2 / 3
"""In a whole chunk a row takes less than in few, so its time there would stay however late one was by chance. So each
prompt that is read in few rows behind as many keys leaves such a part of it, and no less than so much of theirs."""


class RowTimes:
    """How long rows of prompts take, learned from the steps that ran; `Pace` chooses by it.

    Rows that are only read are sized for a time that somebody waits, scored ones for so many ordinary steps: of these
    CPU time counts, where that is what a step takes, as other processes make all steps longer for a while.
    """

    def __init__(self) -> None:
        self.plain, self.scored = RowTable(), RowTable()  # rows that are only read, and those that are scored, too

    def add(self, rows: Rows, seconds: float, own_s: float | None = None) -> None:
        """A step of so many is over. own_s: its CPU time, where that is not the same."""
        own_s = seconds if own_s is None else own_s
        if not rows.num_prefilled:
            self.plain.add_others(seconds)
            self.scored.add_others(own_s)
            return
        table, took_s = (self.scored, own_s) if rows.num_scored else (self.plain, seconds)
        others_s = min(table.others_s, 0.9 * took_s) if rows.num_all > rows.num_prefilled else 0.0
        if size := size_of(rows.num_prefilled, rows.num_all - rows.num_prefilled):
            table.add(size, rows.num_keys, (took_s - others_s) / rows.num_prefilled)


class RowTable:
    """Seconds of a row of one kind: they differ with the size of its step and with how many keys are before it.

    So they are known by both (keys within a factor of two). Where no step was, it is what it was behind fewer keys.
    """

    def __init__(self) -> None:
        self.others_s = 0.0  # of a step without rows of prompts, if it is not late
        self._others = deque[float](maxlen=RECENT)
        self._row_s: dict[int, dict[int, float]] = {}  # keys' binary digits → least rows → seconds
        self._last_s: dict[tuple[int, int], float] = {}  # (keys' digits, size) → of a row in the last such step
        self._sure: set[tuple[int, int]] = set()  # of which there was more than one
        self._digits = -1  # of the keys in the last step

    def add_others(self, seconds: float) -> None:
        """A step without rows of prompts took so long."""
        self._others.append(seconds)
        self.others_s = sorted(self._others)[len(self._others) // 4]

    def add(self, size: int, num_keys: int, row_s: float) -> None:
        """What a row took in a step of this size."""
        digits = num_keys.bit_length()
        again = digits in self._row_s and digits != self._digits
        here = self._row_s.setdefault(digits, dict(self.behind(num_keys)))
        if (digits, size) in self._last_s:
            self._sure.add((digits, size))
        before_s = self._last_s.get((digits, size), row_s)
        self._last_s[digits, size] = row_s
        self._learn(digits, size, min(before_s, row_s))  # one that is longer than its neighbours was late by chance
        if again and size != WHOLE and WHOLE in here:
            here[WHOLE] = min(here[WHOLE], max(ANEW * here[WHOLE], HOPED * here[size]))
        self._digits = digits

    def _learn(self, digits: int, size: int, row_s: float) -> None:
        here = self._row_s[digits]
        here[size] = now = _careful(here.get(size, 0.0), row_s)
        for other, known_s in here.items():
            if other > size and known_s > LATE * now:
                here[other] = ANEW * known_s if (digits, other) in self._sure else LATE * now
            elif known_s > now:
                here[other] = max(now, FORGOTTEN * known_s)

    def behind(self, num_keys: int) -> dict[int, float]:
        """By size what a row takes behind so many keys, or the nearest number that is known: fewer, if any is."""
        digits = num_keys.bit_length()
        nearest = min(self._row_s, key=lambda known: (known > digits, abs(known - digits)), default=None)
        return {} if nearest is None else self._row_s[nearest]


def size_of(rows: int, num_beside: int) -> int | None:
    """As which size a step of so many rows tells of its time; None where it tells nothing of any."""
    if rows >= WHOLE:
        return WHOLE
    filled = rows + num_beside % GROUP  # in groups, beside which there are full ones
    count = filled if filled >= GROUP else rows
    return next((size for size in reversed(FEW) if size <= count < 2 * size), None)


def _careful(before: float, now: float) -> float:
    """Smoothed, but what is longer counts at once: up to a quarter, as one step may be late by chance."""
    return min(max(now, (before + now) / 2), 1.25 * before) if before else now


class Scheduler:
    """Owns the waiting and running sequences and the cache's block tables."""

    def __init__(
        self,
        cache: KVCacheManager,
        *,
        max_num_seqs: int,
        max_batched_tokens: int,
        speculator: Speculator | None = None,
        stream_gap_s: float | None = None,
    ) -> None:
        """stream_gap_s: seconds that `Pace` is for; None: chunks of any length."""
        assert max_batched_tokens >= 1
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.speculator = speculator
        self.row_times = RowTimes()
        self.pace = Pace(stream_gap_s, self.row_times)
        self.waiting: dict[str, Sequence] = {}
        self.running: dict[str, Sequence] = {}
        self.num_preemptions = 0
        self._documents = Documents(cache, self._schedule_rows, self._grow)

    @classmethod
    def of(cls, config: EngineConfig, size: CacheSize, *, speculates: bool) -> Scheduler:
        """One for a deployment, over a cache of this size."""
        cache = KVCacheManager(
            size.num_blocks, config.block_size, prefix_caching=config.prefix_caching, num_states=size.num_states
        )
        return cls(
            cache,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            speculator=Speculator(max_num_seqs=config.max_num_seqs) if speculates else None,
            stream_gap_s=config.stream_gap_s,
        )

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
        prompts = [sequence for sequence in self.running.values() if not sequence.decoding]
        num_keys = max([sequence.num_computed_tokens for sequence in prompts], default=0)
        if self.speculator is not None and plan:
            to_read = sum([sequence.num_remaining_tokens for sequence in prompts])
            self._draft(self.speculator, plan, spare, to_read, num_keys)
        self._schedule_prefills(prompts, num_keys, plan)
        if self.cache.states is None:
            return plan
        steps = [(one.sequence.state, one.start, one.stop) for one in plan if one.sequence.state is not None]
        rows = self.cache.states.rows_of_step(steps, keep=self.cache.prefix_caching)
        return [one._replace(state=state) for one, state in zip(plan, rows, strict=True)]

    def _draft(self, speculator: Speculator, plan: list[Scheduled], spare: int, to_read: int, num_keys: int) -> None:
        """Give decode steps their drafts, in `spare` blocks and those that they have.

        One whose last token is still under way gets them once it is known. to_read: rows of prompts that are left.
        """
        left = self.max_batched_tokens - len(plan)
        most = left // DRAFT_SHARE if to_read else left
        num_others = self.pace.most_rows(min(to_read, left), num_keys, len(plan)) if to_read else 0
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

    def learn(self, rows: Rows, seconds: float, own_s: float) -> None:
        """A step of so many rows is over. own_s: in CPU time, where that is what a step takes."""
        self.row_times.add(rows, seconds, own_s)
        if self.speculator is not None:
            self.speculator.step_times.add(rows.num_all, own_s)

    def _schedule_prefills(self, prompts: list[Sequence], num_keys: int, plan: list[Scheduled]) -> None:
        """num_keys: before the next rows of the prompt that has most."""
        prefills = sorted([one for one in prompts if not one.waits_for_mask], key=lambda s: s.rank)
        num_beside = sum([one.num_rows for one in plan])
        left = self.max_batched_tokens - num_beside
        if left <= 0 or not prefills:
            return
        budget = to_read = self.pace.most_rows(left, num_keys, num_beside) if plan else left
        to_score = max(1, self.max_batched_tokens // SCORED_ROW)
        if plan:
            to_score = self.pace.most_scored(min(to_score, left), num_keys, num_beside)
            if any(one.sampling.prompt_logprobs is not None for one in prefills):
                budget = max(budget, to_score)  # of rows that are not scored perhaps nothing is known
        first, *others = prefills
        grants = share(prefills, budget) if others else [(first, min(first.num_remaining_tokens, budget))]
        for sequence, num_tokens in grants:
            if sequence.request_id not in self.running:
                continue
            if sequence.request.sampling.prompt_logprobs is not None:
                unscored = max(0, sequence.first_scored_row - sequence.num_computed_tokens)
                num_tokens = min(num_tokens, unscored + to_score)
                to_score -= max(0, num_tokens - unscored)
            else:  # far keys may be before them, which are not before those that are scored
                num_tokens = min(num_tokens, to_read)
                to_read -= num_tokens
            if sequence.request.documents:
                self._documents.schedule(sequence, num_tokens, plan)
            else:
                start = sequence.num_computed_tokens
                self._schedule_rows(sequence, start, min(start + num_tokens, sequence.num_tokens), start, plan)

    def _schedule_rows(self, sequence: Sequence, start: int, stop: int, first: int, plan: list[Scheduled]) -> int:
        """Schedule rows `start` … `stop` − 1 of a prompt; one past the last for which there was room.

        first: of its rows in this step.
        """
        if sequence.selects_from < UNBOUNDED:
            stop = min(stop, max(sequence.selects_from, first + most_rows(self.cache.block_size)))
        if stop <= start or not self._grow(sequence, stop, plan):
            return start
        plan.append(Scheduled.of(sequence, stop - start, start))
        return stop

    def _admit(self) -> int:
        """Move waiting sequences into `running`, best rank first, until one does not fit: none overtakes it.

        Returns the blocks that nobody runs or waits for.
        """
        spare = self.cache.pool.num_free - sum(self._blocks_to_finish(s) for s in self.running.values())
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
