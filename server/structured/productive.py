"""What can be written to its end: the least fixed point over things that need others.

A schema needs those of its required properties, a rule those of its symbols. What needs itself, by whatever way and
without another choice, has no end: a reply that begins it could only be cut.
"""

from __future__ import annotations

from collections.abc import Iterable


class Needs:
    """Things by number, each of which ends once so many of those that it needs do."""

    def __init__(self) -> None:
        self._missing: list[int] = []
        self._spare: list[int] = []
        self._needed_by: list[list[int]] = []
        self.always = self.add(0)
        self.never = self.add(1)

    def add(self, least: int = 0, among: Iterable[int] = ()) -> int:
        """A new one that ends where `least` of `among` do."""
        number = len(self._missing)
        self._missing.append(0)
        self._spare.append(0)
        self._needed_by.append([])
        self.settle(number, least, among)
        return number

    def all_of(self, numbers: Iterable[int]) -> int:
        among = [*numbers]
        return self.add(len(among), among)

    def any_of(self, numbers: Iterable[int]) -> int:
        return self.add(1, numbers)

    def settle(self, number: int, least: int, among: Iterable[int]) -> None:
        """Say what one needs that was added before those were known."""
        self._missing[number], self._spare[number] = least, -least
        for needed in among:
            self._spare[number] += 1
            self._needed_by[needed].append(number)

    def endless(self) -> set[int]:
        """Those that lead back to themselves, whatever is chosen. What `never` alone keeps from its end is none."""
        return self._without_end() - self._impossible()

    def _impossible(self) -> set[int]:
        """Those that too many of what they need keep from being, `never` among them, however long one may write."""
        spare = list(self._spare)
        left = [number for number, more in enumerate(spare) if more < 0]
        found = set(left)
        while left:
            for number in self._needed_by[left.pop()]:
                spare[number] -= 1
                if spare[number] == -1:
                    left.append(number)
                    found.add(number)
        return found

    def _without_end(self) -> set[int]:
        missing = list(self._missing)
        left = [number for number, least in enumerate(missing) if least <= 0]
        while left:
            for number in self._needed_by[left.pop()]:
                missing[number] -= 1
                if missing[number] == 0:
                    left.append(number)
        return {number for number, least in enumerate(missing) if least > 0}
