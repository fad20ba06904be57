"""How often what a history expects comes true, by how much of the past it has in common with.

Counted for each sequence, and for all of them together, which is what a sequence is taken for while it is new. Counting
goes on whether or not anything is drafted, so drafts that do not pay are left off, and taken up again, at no cost.
"""

from __future__ import annotations

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
    """Of one sequence; `of_all` None: of all."""

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
