"""A length that is not known but bounded, in characters: of a value in a template, or of what a part of it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


class Unbounded(Exception):
    """A template may do more than is known here."""


@dataclass(frozen=True, slots=True)
class Length:
    """At most `constant`, and for each level so many times its length. Level 0 is the request, k what loop k is at."""

    constant: float = 0.0
    times: tuple[float, ...] = ()

    def __add__(self, other: Length) -> Length:
        return self._merged(other, float.__add__)

    def __or__(self, other: Length) -> Length:
        """The longer of the two."""
        return self._merged(other, max)

    def _merged(self, other: Length, merge: Callable[[float, float], float]) -> Length:
        width = max(len(self.times), len(other.times))
        mine, theirs = ((*one.times, *[0.0] * (width - len(one.times))) for one in (self, other))
        return Length(merge(self.constant, other.constant), tuple(map(merge, mine, theirs)))

    def __mul__(self, factor: float) -> Length:
        return Length(self.constant * factor, tuple(factor * count for count in self.times))

    def most(self, levels: Sequence[float]) -> float:
        """levels: the most that the request, and what each loop is at, is long."""
        return self.constant + sum(count * most for count, most in zip(self.times, levels, strict=False))

    def over(self, through: Length, levels: Sequence[float]) -> Length:
        """The sum over all elements of a loop of what is so long at each; levels: of all around that loop, and its own.

        Elements are together as long as what the loop goes through, and no more than that has characters.
        """
        inside = self.times[len(levels) - 1] if len(self.times) == len(levels) else 0.0
        return through * (inside + Length(self.constant, self.times[: len(levels) - 1]).most(levels))


REQUEST = Length(0.0, (1.0,))
NUMBER = Length(32.0)
"""Of one that nobody sent."""
