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
from collections.abc import Iterable, Iterator

from prerope.cache.blocks.documents import next_copied, span_at
from prerope.cache.blocks.manager import KVCacheManager
from prerope.rope.reading import UNBOUNDED
from prerope.server.engine.documents import Copy, DocumentReader, Documents
from prerope.server.engine.selection import most_rows
from prerope.server.engine.sequence import Sequence
from prerope.server.engine.speculation import Speculator
from prerope.server.engine.step import Rows, Scheduled

FEW, WHOLE, MULTIPLE = (8, 12, 16), 128, 32
"""Rows of prompts in a step beside streams: few, which are computed as decode steps are, or a whole chunk and ever
larger multiples. Between them a row takes longer: each chunk reads the weights, and packs the keys anew. Which few are
dear differs by machine, and by how many keys are before them."""
ROOM = 0.9
"""Of the gap, within which the least whole chunk must be over, or few rows are taken: each would be late by chance. Of
`SHORT_STEPS`, what scored rows are sized for."""
WORTH = 0.9
"""A shorter step is worth a tenth of the rate at which prompts are read beside streams."""
SHORT_S, SHORT_STEPS = 0.1, 3
"""None is made shorter than both, the latter in steps without prompts: nobody would see it."""
LEAST_SCORED, SCORED_S = 4, 0.03
"""Rows that are scored, as nobody waits for the first of them, are as many as go into `SHORT_STEPS`, or, where a step
without prompts is not known, into so many seconds; but so many at least."""
FORGOTTEN = 0.998
"""What is left after each step of a row's time in sizes where it is longer: what was late by chance is tried again."""
ANEW, HOPED = 0.95, 2 / 3
"""In a whole chunk a row takes less than in few, so its time there would stay however late one was by chance. So each
prompt that is read in few rows behind as many keys leaves such a part of it, and no less than so much of theirs."""


class Pace:
    """How many rows of prompts a step takes while others stream.

    A step is over within the gap that streams may have, and is as short as costs prompts a tenth of their rate:

        rows ÷ (seconds of a step without prompts + rows × seconds of a row)

    What a row takes differs with the size of its step and with how many keys are before it, so it is known by both
    (keys within a factor of two), from steps that ran. Where there was none, it is what it was behind fewer keys, else
    what it is in a smaller step: so larger ones are tried, and then known. Before anything is, as few rows as ever are
    taken.
    """

    def __init__(self, gap_s: float | None) -> None:
        """gap_s: seconds, or None for chunks of any length."""
        self._gap_s = gap_s
        self._others_s = 0.0  # of a step without rows of prompts
        self._row_s: dict[int, dict[int, float]] = {}  # of a row: keys' binary digits → least rows → seconds
        self._last_s: dict[tuple[int, int], float] = {}  # (keys' digits, size) → of a row in the last such step
        self._digits = -1  # of the keys in the last step with a size
        self._scored_s = 0.0  # of a row that is scored

    def add(self, rows: Rows, seconds: float) -> None:
        """A step of so many is over."""
        if not rows.num_prefilled:
            self._others_s = _smoothed(self._others_s, seconds)
            return
        others_s = min(self._others_s, 0.9 * seconds) if rows.num_all > rows.num_prefilled else 0.0
        row_s = (seconds - others_s) / rows.num_prefilled
        if rows.num_scored:
            self._scored_s = _careful(self._scored_s, row_s)
        elif size := size_of(rows.num_prefilled):
            digits = rows.num_keys.bit_length()
            again = digits in self._row_s and digits != self._digits
            here = self._row_s.setdefault(digits, dict(self._behind(rows.num_keys)))
            before_s = self._last_s.get((digits, size), row_s)
            self._last_s[digits, size] = row_s
            self._learn(here, size, min(before_s, row_s))  # one that is longer than its neighbours was late by chance
            if again and size != WHOLE and WHOLE in here:
                here[WHOLE] = min(here[WHOLE], max(ANEW * here[WHOLE], HOPED * here[size]))
            self._digits = digits

    def _learn(self, here: dict[int, float], size: int, row_s: float) -> None:
        here[size] = now = _careful(here.get(size, 0.0), row_s)
        for other, known_s in here.items():
            if known_s > now:
                here[other] = max(now, FORGOTTEN * known_s)

    def _behind(self, num_keys: int) -> dict[int, float]:
        """What a row takes behind so many keys, or the nearest number that is known: fewer, if any is."""
        digits = num_keys.bit_length()
        nearest = min(self._row_s, key=lambda known: (known > digits, abs(known - digits)), default=None)
        return {} if nearest is None else self._row_s[nearest]

    def most_rows(self, budget: int, num_keys: int = 0) -> int:
        """The number of prompt rows in a step beside streams; at most the budget."""
        if self._gap_s is None or budget <= FEW[0]:
            return budget
        if not self._row_s:  # no prompt has been read since the start
            return FEW[0]
        choices = list(self._choices(self._gap_s, budget, self._behind(num_keys)))
        worth = WORTH * max(rate for _, _, rate in choices)
        short_s = max(SHORT_S, SHORT_STEPS * self._others_s)
        _, _, rows = min((max(short_s, took_s), -rate, rows) for rows, took_s, rate in choices if rate >= worth)
        return rows

    def _choices(self, gap_s: float, budget: int, row_s: dict[int, float]) -> Iterator[tuple[int, float, float]]:
        """(rows, seconds, rows a second) of the least step, and of those that are over within the gap."""
        others_s, one_s = min(self._others_s, gap_s / 2), min(row_s.values())
        for rows in FEW:
            one_s = row_s.get(rows, one_s)
            took_s = others_s + rows * one_s
            if rows <= budget and (rows == FEW[0] or took_s <= gap_s):
                yield rows, took_s, rows / took_s
        rows, one_s = min(WHOLE, budget), row_s.get(WHOLE, one_s)
        if others_s + rows * one_s > ROOM * gap_s:
            return
        while (took_s := others_s + rows * one_s) <= gap_s:
            yield rows, took_s, rows / took_s
            if rows == budget:
                return
            rows = min(budget, rows + max(MULTIPLE, rows // 4 // MULTIPLE * MULTIPLE))

    def most_scored(self, budget: int) -> int:
        """The number of these rows whose prompt log-probabilities are computed."""
        if self._gap_s is None:
            return budget
        room_s = ROOM * SHORT_STEPS * self._others_s - self._others_s or SCORED_S
        rows = int(min(room_s, self._gap_s) / self._scored_s) if self._scored_s else 0
        return min(budget, max(LEAST_SCORED, rows))


def size_of(rows: int) -> int | None:
    """As which size a step of so many rows tells of its time; None where it tells nothing of any."""
    if rows >= WHOLE:
        return WHOLE
    return next((size for size in reversed(FEW) if size <= rows < 2 * size), None)


def _smoothed(before: float, now: float) -> float:
    return (before + now) / 2 if before else now


def _careful(before: float, now: float) -> float:
    """Smoothed, but what is longer counts at once: up to a quarter, as one step may be late by chance."""
    return min(max(now, _smoothed(before, now)), 1.25 * before) if before else now


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
        self._schedule_prefills(self.pace.most_rows(left, self._num_keys_of_prompts) if plan else left, plan)
        if self.cache.states is None:
            return plan
        steps = [(one.sequence.state, one.start, one.stop) for one in plan if one.sequence.state is not None]
        rows = self.cache.states.rows_of_step(steps, keep=self.cache.prefix_caching)
        return [one._replace(state=state) for one, state in zip(plan, rows, strict=True)]

    @property
    def _num_keys_of_prompts(self) -> int:
        """Before the rows that are read of prompts, of the one that has most."""
        return max([s.num_computed_tokens for s in self.running.values() if not s.decoding], default=0)

    def _draft(self, speculator: Speculator, plan: list[Scheduled], spare: int) -> None:
        """Give decode steps their drafts, in `spare` blocks and those that they have.

        One whose last token is still under way gets them once it is known.
        """
        left = self.max_batched_tokens - len(plan)
        to_read = sum([s.num_remaining_tokens for s in self.running.values() if not s.decoding])
        most = left // DRAFT_SHARE if to_read else left
        num_others = self.pace.most_rows(min(to_read, left), self._num_keys_of_prompts)
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
