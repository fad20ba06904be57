"""Scores of replies, their means with standard errors, and the effective length of a method."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

EFFECTIVE = 0.85
"""A length counts as read while the score there is at least this share of that at a quarter of the trained length."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One reply. sheet: what stands for the text that it was asked of; replies about one sheet go together."""

    method: str
    family: str
    length: int
    seed: int
    depth: float | None
    sheet: str
    score: float


@dataclass(frozen=True, slots=True)
class Mean:
    """With its standard error; None where there is one sheet a family."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{100 * self.value:.0f}" + ("" if self.error is None else f" ± {100 * self.error:.0f}")


def mean(scored: Iterable[Scored]) -> Mean | None:
    """The mean over families of the mean over sheets of the mean over a sheet's questions: each family counts once."""
    sheets: dict[tuple[str, str], list[float]] = defaultdict(list)
    for one in scored:
        sheets[one.family, one.sheet].append(one.score)
    families: dict[str, list[float]] = defaultdict(list)
    for (family, _), scores in sheets.items():
        families[family].append(statistics.fmean(scores))
    if not families:
        return None
    value = statistics.fmean(statistics.fmean(of_sheets) for of_sheets in families.values())
    if any(len(of_sheets) < 2 for of_sheets in families.values()):
        return Mean(value, None)
    variance = sum(statistics.variance(of_sheets) / len(of_sheets) for of_sheets in families.values())
    return Mean(value, math.sqrt(variance) / len(families))


@dataclass(slots=True)
class Scores:
    """All replies of a run."""

    methods: Sequence[str]
    families: Sequence[str]
    lengths: Sequence[int]
    train_length: int
    replies: list[Scored] = field(default_factory=list)

    def mean(self, keep: Callable[[Scored], bool]) -> Mean | None:
        return mean(one for one in self.replies if keep(one))

    def at(self, method: str, length: int, family: str | None = None) -> Mean | None:
        """Over all families, or of one."""
        return self.mean(lambda s: s.method == method and s.length == length and family in (None, s.family))

    def depths(self) -> list[float]:
        return sorted({one.depth for one in self.replies if one.depth is not None})

    def effective_length(self, method: str, family: str | None = None) -> int | None:
        """The longest length up to which no score is below `EFFECTIVE` of that at a quarter of the trained length.

        None where the quarter was not measured, or nothing is scored there.
        """
        quarter = self.at(method, self.train_length // 4, family)
        if quarter is None or quarter.value == 0:
            return None
        longest = self.train_length // 4
        for length in sorted(n for n in self.lengths if n >= self.train_length // 4):
            found = self.at(method, length, family)
            if found is None or found.value < EFFECTIVE * quarter.value:
                break
            longest = length
        return longest
