"""Which drafts the next step verifies: those that are expected to bring more tokens a second than it has without.

A draft is a row more, and brings a token if it and all drafts before it come true. How likely that is, `Acceptance`
says; what rows cost, `StepTimes`. The likeliest go first, and the best number of them is taken. Counting goes on
whether or not anything is drafted, so drafts that do not pay are left off, and taken up again, at no cost.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING

import numpy as np
from prerope.server.engine.speculation.history import History
from prerope.server.engine.speculation.step_times import StepTimes

if TYPE_CHECKING:
    from prerope.server.engine.sequence import Sequence

MAX_DRAFTS = 31
"""Of one sequence in one step."""
MAX_ROWS = 64
"""Drafts are added up to so many rows of a step, or as many as there may be sequences."""
LEAST_CHANCE = 0.02
LEAST_GAIN = 1.03
"""Steps with drafts must be expected to be so much faster, since what is expected is a guess."""


KINDS = 8
"""A common past of 3, 4 to 7, 8 to 15, … tokens; kinds below are not used."""
FIRST_GUESS = (0.0, 0.0, 0.4, 0.55, 0.7, 0.8, 0.85, 0.9)
"""By kind, until something has been counted."""
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
        """That the next expected token comes true."""
        kind = kind_of(common)
        guess = FIRST_GUESS[kind] if self._of_all is None else self._of_all.chance(common)
        return (self._hits[kind] + ALIKE * guess) / (self._tries[kind] + ALIKE)


class Drafter:
    """What one sequence may say next."""

    def __init__(self, token_ids: Several[int], of_all: Acceptance) -> None:
        self.history = History(token_ids)
        self.acceptance = Acceptance(of_all)

    def follow(self, num_known: int) -> None:
        """Up to the tokens that are known by now."""
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
        """That draft `number` comes true where those before it have."""
        return self.acceptance.chance(self.history.common + number)


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
