"""How many rows of prompts a step takes while others stream: as many as it can within the gap that streams may have.

What a row takes grows with the prompt before it, and is known from the steps that ran last. A step that was too long is
followed by a shorter one: so the gap is met from the second step on, whatever stands in it besides.
"""

from __future__ import annotations

LEAST_ROWS = 128
"""Shorter chunks would read a prompt more than a tenth more slowly: each reads the weights, and packs the keys anew."""
COUNTED = 32
"""Rows that a step must have of prompts for its time to be told of."""
MULTIPLE = 32


class Pace:
    """Of one engine. gap_s: seconds, or None for chunks of any length."""

    def __init__(self, gap_s: float | None) -> None:
        self._gap_s = gap_s
        self._row_s = 0.0

    def add(self, num_prefilled: int, seconds: float) -> None:
        """A step with so many rows of prompts is over."""
        if num_prefilled >= COUNTED:
            row_s = seconds / num_prefilled
            self._row_s = (self._row_s + row_s) / 2 if self._row_s else row_s

    def most_rows(self, budget: int) -> int:
        """Of prompts, in a step in which somebody streams; at most the budget."""
        if self._gap_s is None or not self._row_s:
            return budget
        rows = int(self._gap_s / self._row_s) // MULTIPLE * MULTIPLE
        return min(budget, max(rows, LEAST_ROWS))
