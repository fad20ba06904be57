"""Which drafts the next step verifies: those that are expected to bring more tokens a second than it has without.

A draft is a row more, and brings a token if it and all drafts before it come true. How likely that is, `Acceptance`
says; what rows cost, `StepTimes`. The likeliest go first, and the best number of them is taken. Counting goes on
whether or not anything is drafted, so drafts that do not pay are left off, and taken up again, at no cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from prerope.server.engine.speculation.history import History

if TYPE_CHECKING:
    from prerope.server.engine.sequence import Sequence

MAX_DRAFTS = 31
"""The most drafts of one sequence in one step."""
MAX_ROWS = 64
"""Drafts are added up to so many rows of a step, or as many as there may be sequences."""
LEAST_CHANCE = 0.02
LEAST_GAIN = 1.03
"""Steps with drafts must be expected to be so much faster, since what is expected is a guess."""

MOST_LONGER = 2.0
"""How many times as long drafts may make a step in which several sequences decode: who has none waits for others'."""

KINDS = 8
"""A common past of 3, 4 to 7, 8 to 15, … tokens; kinds below are not used."""
FIRST_GUESS = (0.0, 0.0, 0.4, 0.55, 0.7, 0.8, 0.85, 0.9)
"""The chance that a draft comes true, by kind, until enough drafts have been counted."""
ALIKE = 4.0
"""Tries of its own after which a sequence counts for as much as all others together."""
KEPT, KEPT_OF_ALL = 0.95, 0.998
"""What a try leaves of the weight of those before it."""


def kind_of(common: int) -> int:
    return min(common.bit_length(), KINDS - 1)


class Acceptance:
    """How often what a history expects comes true, by how much of the past it has in common with.

    Of one sequence, and (`of_all` None) of all together, which is what a sequence is taken for while it is new.
    """

    def __init__(self, of_all: Acceptance | None = None) -> None:
        self._of_all = of_all
        self._kept = KEPT if of_all else KEPT_OF_ALL
        self._tries = [0.0] * KINDS
        self._hits = [0.0] * KINDS

    def count(self, common: int, *, hit: bool) -> None:
        """A token was expected with so much in common, and came true or not."""
        kind = kind_of(common)
        self._tries[kind] = self._tries[kind] * self._kept + 1
        self._hits[kind] = self._hits[kind] * self._kept + hit
        if self._of_all is not None:
            self._of_all.count(common, hit=hit)

    def chance(self, common: int) -> float:
        """The probability that the next expected token comes true."""
        kind = kind_of(common)
        guess = FIRST_GUESS[kind] if self._of_all is None else self._of_all.chance(common)
        return (self._hits[kind] + ALIKE * guess) / (self._tries[kind] + ALIKE)


class Drafter:
    """What one sequence may say next."""

    def __init__(self, token_ids: Several[int], of_all: Acceptance) -> None:
        self.history = History(token_ids)
        self.acceptance = Acceptance(of_all)

    def follow(self, num_known: int) -> None:
        """Take in the sequence's tokens up to number `num_known`, counting which of them were expected."""
        history = self.history
        if not history.num_known:
            history.read(num_known)
            return
        for place in range(history.num_known, num_known):
            common = history.common
            hit = history.follow(history.token_ids[place])
            if hit is not None:
                self.acceptance.count(common, hit=hit)

    def chance(self, number: int) -> float:
        """The probability that draft `number` comes true, given that the drafts before it have."""
        return self.acceptance.chance(self.history.common + number)


MEASURED = 5
"""Measurements of a number of rows; their median counts, since a step may be late by chance."""
STALE = 1024
"""Steps after which a number of rows that no step had is forgotten."""
PER_ROW = 0.03
"""What one more row is guessed to cost, as a share of a step of one row."""
EXACT = 32
"""Up to so many rows each number is for itself; above, numbers within an eighth are one."""


def _bucket(rows: int) -> int:
    if rows <= EXACT:
        return rows
    unit = 1 << (rows.bit_length() - 4)
    return max(EXACT + 1, rows // unit * unit)


@dataclass(slots=True)
class _Measured:
    last: deque[float] = field(default_factory=lambda: deque(maxlen=MEASURED))
    seconds: float = 0.0  # their median
    last_step: int = 0

    def add(self, seconds: float, step: int) -> None:
        self.last.append(seconds)
        self.last_step = step
        self.seconds = sorted(self.last)[(len(self.last) - 1) // 2]


class StepTimes:
    """How long a step of so many rows takes, learned from the steps that run.

    Steps of few rows are all measured. A number of rows that has not been seen lately is taken for what lies between
    its neighbours, and beyond them for a little dearer than the last, so that it is tried where it might pay. More rows
    take no less time: where measurements say so, they were late or early by chance, and what is between counts.
    Otherwise the luckiest number of rows would be chosen.
    """

    def __init__(self) -> None:
        self._by_rows: dict[int, _Measured] = {}
        self._num_steps = 0
        self._curve: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def add(self, rows: int, seconds: float) -> None:
        """A step is over."""
        self._num_steps += 1
        self._by_rows.setdefault(_bucket(rows), _Measured()).add(seconds, self._num_steps)
        self._curve = None
        if self._num_steps % STALE == 0:
            old = self._num_steps - STALE
            self._by_rows = {rows: one for rows, one in self._by_rows.items() if one.last_step > old}

    def of(self, first: int, count: int) -> NDArray[np.float64] | None:
        """Seconds of steps of `first`, `first` + 1, … rows, `count` in all; None where nothing has been measured."""
        if not self._by_rows:
            return None
        if self._curve is None:
            known = sorted(self._by_rows)
            measured = np.array([self._by_rows[n].seconds for n in known])
            above, below = np.maximum.accumulate(measured), np.minimum.accumulate(measured[::-1])[::-1]
            self._curve = np.array(known, dtype=np.float64), (above + below) / 2
        rows, seconds = self._curve
        asked = np.arange(first, first + count)
        beyond = np.maximum(asked - rows[-1], 0.0) * PER_ROW * seconds[-1] / (1 + PER_ROW * (rows[-1] - 1))
        found: NDArray[np.float64] = np.interp(asked, rows, seconds) + beyond
        return found


class Speculator:
    """Plans drafts for all sequences of an engine."""

    def __init__(self, *, max_num_seqs: int) -> None:
        self.step_times = StepTimes()
        self._acceptance = Acceptance()
        self._max_rows = max(MAX_ROWS, max_num_seqs)

    def plan(self, decoding: Several[Sequence], *, num_others: int, most: int) -> dict[Sequence, list[int]]:
        """Drafts for sequences that decode in a step with `num_others` rows besides; `most` of them in all."""
        most = min(most, self._max_rows - len(decoding))
        may = [sequence for sequence in decoding if sequence.request.speculation and sequence.num_more_drafts > 0]
        drafters = [(sequence, self._drafter(sequence)) for sequence in may]
        drafters = [(sequence, one) for sequence, one in drafters if one.history.place is not None]
        first = len(decoding) + num_others
        seconds = self.step_times.of(first, most + 1) if most > 0 and drafters else None
        if seconds is None:
            return {}
        order, tokens = _likeliest(drafters, most)
        if len(decoding) > 1:
            tokens = tokens[: int((seconds[1:] <= MOST_LONGER * seconds[0]).sum())]
        rates = (len(decoding) + np.array([0.0, *tokens])) / seconds[: len(tokens) + 1]
        best = int(rates.argmax())
        if rates[best] < LEAST_GAIN * rates[0]:
            return {}
        counts = np.bincount(order[:best], minlength=len(drafters)).tolist()
        return {
            sequence: one.history.expected(count)
            for (sequence, one), count in zip(drafters, counts, strict=True)
            if count
        }

    def _drafter(self, sequence: Sequence) -> Drafter:
        if sequence.drafter is None:
            sequence.drafter = Drafter(sequence.token_ids, self._acceptance)
        drafter = sequence.drafter
        drafter.follow(len(sequence.token_ids) - sequence.num_pending)
        return drafter


def _likeliest(drafters: Several[tuple[Sequence, Drafter]], most: int) -> tuple[list[int], list[float]]:
    """(whose drafts are taken, one after the other; tokens that so many are expected to bring)."""
    heap = [(-drafter.chance(0), index, 1) for index, (_, drafter) in enumerate(drafters)]
    heapify(heap)
    order: list[int] = []
    tokens: list[float] = []
    while heap and len(order) < most and -heap[0][0] >= LEAST_CHANCE:
        chance, index, number = heap[0]
        order.append(index)
        tokens.append((tokens[-1] if tokens else 0.0) - chance)
        sequence, drafter = drafters[index]
        more = number < min(MAX_DRAFTS, sequence.num_more_drafts)
        heapreplace(heap, (chance * drafter.chance(number) if more else 0.0, index, number + 1))
    return order, tokens
