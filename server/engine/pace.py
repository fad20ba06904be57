"""How many rows of prompts a step takes while others stream: as many as it can within the gap that streams may have.

What a row takes grows with the prompt before it, and is known from the steps that ran last. A step that was too long is
followed by a shorter one: so the gap is met from the second step on, whatever stands in it besides.
"""

from __future__ import annotations

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
    """The pace of one engine. gap_s: seconds, or None for chunks of any length.

    A row takes longer in few than in a whole chunk: behind 256 keys 1.4 times as long, behind 20,000 as long. So the
    two are known apart, and what a step takes for the others in it, and for having weights to read, is in neither.
    While chunks are few rows, a row of a whole one is taken to change as theirs does, and never to take longer.
    """

    def __init__(self, gap_s: float | None) -> None:
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
        """Of prompts, in a step in which somebody streams; at most the budget."""
        if self._gap_s is None or not self._whole_s:
            return budget
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
        """Likewise, of those that are scored."""
        if self._gap_s is None or not self._whole_s:
            return budget
        return min(budget, max(LEAST_SCORED, int(min(SCORED_S, self._gap_s) / (self._few_s or self._whole_s))))


def _smoothed(before: float, now: float) -> float:
    return (before + now) / 2 if before else now
