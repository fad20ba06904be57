"""Which drafts the next step verifies: those that are expected to bring more tokens a second than it has without.

A draft is a row more, and brings a token if it and all drafts before it come true. How likely that is, `Acceptance`
says; what rows cost, `StepTimes`. The likeliest go first, and the best number of them is taken.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING

import numpy as np
from prerope.server.engine.speculation.acceptance import Acceptance
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
