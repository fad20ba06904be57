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


class Pace:
    """Of one engine. gap_s: seconds, or None for chunks of any length."""

    def __init__(self, gap_s: float | None) -> None:
        self._gap_s = gap_s
        self._row_s = 0.0

    def add(self, num_prefilled: int, seconds: float, num_others: int = 0) -> None:
        """A step with so many rows of prompts, and others, is over."""
        if num_prefilled >= COUNTED:
            row_s = seconds / (num_prefilled + num_others)
            self._row_s = (self._row_s + row_s) / 2 if self._row_s else row_s

    def most_rows(self, budget: int) -> int:
        """Of prompts, in a step in which somebody streams; at most the budget."""
        if self._gap_s is None or not self._row_s:
            return budget
        rows = int(self._gap_s / self._row_s) // MULTIPLE * MULTIPLE
        return min(budget, rows if rows >= WHOLE_ROWS else LEAST_ROWS)

    def most_scored(self, budget: int) -> int:
        """Likewise, of those that are scored."""
        if self._gap_s is None or not self._row_s:
            return budget
        return min(budget, max(LEAST_SCORED, int(min(SCORED_S, self._gap_s) / self._row_s)))
