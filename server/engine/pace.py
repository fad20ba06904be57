"""How many rows of prompts a step takes beside streams, so that the gaps between their tokens stay short; and of which.

A chunk of a prompt makes the step longer that gives all streams their next token. How much longer differs by machine,
by the size of the step and by how many keys are before its rows: the scheduler learns it from steps that ran
(`RowTimes`), and asks here how many rows the next step takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prerope.server.engine.scheduler import RowTimes
    from prerope.server.engine.sequence import Sequence

OLDEST_SHARE = 4  # the oldest prefill keeps 1/4 of what the decodes leave

GROUP = 4
"""Rows that pass over the weights together, where rows are few: those of a step that fill no group cost as much as if
they did. So with the rows beside them, of streams and drafts, those of prompts fill groups."""
FEW, WHOLE, MULTIPLE = (1, 2, 4, 8, 12, 16, 32), 128, 32
"""Rows of prompts in a step beside streams: few, most of which are computed as decode steps are, or a whole chunk and
ever larger multiples. Between them a row takes longer: each chunk reads the weights, and packs the keys anew. Which few
are dear differs by machine, and by how many keys are before them. Fewer than eight read prompts at a fraction of the
rate: they are for gaps into which no eight go; 32 are for processors that are bound by arithmetic, where they cost
hardly more than a whole chunk that is too long."""
FIRST = 8
"""Before any time is known."""
ROOM = 0.9
"""Of the gap, within which the least whole chunk must be over, or few rows are taken: each would be late by chance."""
HARDLY = 1.25
"""Times as long as the least step that scores a row may one be that scores more: most of the least is for any number,
such as a whole group, and either may have been late."""
WORTH = 0.9
"""A shorter step is worth a tenth of the rate at which prompts are read beside streams."""
SHORT_S, SHORT_STEPS = 0.1, 3
"""None is made shorter than both, the latter in steps without prompts: nobody would see it."""
SCORED_STEPS = 2
"""A step that scores rows is sized for so many without: the third is for what makes steps late by chance."""
FIRST_SCORED = 4
"""Rows that are scored before their time is known. Then, as nobody waits for the first of them, they are as many as go
into `SCORED_STEPS`, and at most the others' gap."""


class Pace:
    """How many rows of prompts a step takes while others stream.

    A step is over within the gap that streams may have, and is as short as costs prompts a tenth of their rate:

        rows ÷ (seconds of a step without prompts + rows × seconds of a row)

    A row of a size that is not known is taken for what it is in a smaller step: so larger ones are tried, in a short
    gap one after the other, and then known. Before anything is, `FIRST` are taken.
    """

    def __init__(self, gap_s: float | None, times: RowTimes) -> None:
        """gap_s: seconds, or None for chunks of any length."""
        self._gap_s = gap_s
        self.times = times

    def most_rows(self, budget: int, num_keys: int = 0, num_beside: int = 0) -> int:
        """The number of prompt rows in a step beside streams, which have `num_beside`; at most the budget."""
        if self._gap_s is None or budget <= FEW[0]:
            return budget
        others_s, row_s = self.times.plain.others_s, self.times.plain.behind(num_keys)
        begun = num_beside % GROUP
        if not row_s or not others_s:  # no prompt has been read since the start, or no step without one
            return min(budget, FIRST - begun)
        choices = list(self._choices(self._gap_s, budget, others_s, row_s, begun))
        worth = WORTH * max(rate for _, _, rate in choices)
        short_s = max(SHORT_S, SHORT_STEPS * others_s)
        _, _, rows = min((max(short_s, took_s), -rate, rows) for rows, took_s, rate in choices if rate >= worth)
        return rows

    def _choices(
        self, gap_s: float, budget: int, others_s: float, row_s: dict[int, float], begun: int
    ) -> Iterator[tuple[int, float, float]]:
        """(rows, seconds, rows a second) of the least step, and of those that are over within the gap.

        begun: rows beside them of a group that is not full.
        """
        others_s, one_s = min(others_s, gap_s / 2), min(row_s.values())
        for size in FEW:
            rows, one_s = size - begun * (size >= GROUP), row_s.get(size, one_s)
            took_s = others_s + rows * one_s
            if size == FEW[0] or (rows <= budget and took_s <= gap_s):
                yield rows, took_s, rows / took_s
            if size > max(row_s) and gap_s <= max(SHORT_S, SHORT_STEPS * others_s):
                return
        rows, one_s = min(WHOLE, budget), row_s.get(WHOLE, one_s)
        if others_s + rows * one_s > ROOM * gap_s:
            return
        while (took_s := others_s + rows * one_s) <= gap_s:
            yield rows, took_s, rows / took_s
            if rows == budget:
                return
            rows = min(budget, rows + max(MULTIPLE, rows // 4 // MULTIPLE * MULTIPLE))

    def most_scored(self, budget: int, num_keys: int = 0, num_beside: int = 0) -> int:
        """The number of prompt rows whose log-probabilities are computed in a step beside streams, likewise."""
        if self._gap_s is None:
            return budget
        others_s, row_s = self.times.scored.others_s, self.times.scored.behind(num_keys)
        begun = num_beside % GROUP
        if not row_s or not others_s:
            return min(budget, FIRST_SCORED - begun)
        least_s = others_s + row_s.get(FEW[0], min(row_s.values()))
        gap_s = min(max(SCORED_STEPS * others_s, HARDLY * least_s), self._gap_s)
        choices = self._choices(gap_s, budget, others_s, row_s, begun)
        return max((rate, rows) for rows, _, rate in choices)[1]


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
