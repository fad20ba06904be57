"""Tables of a search: candidates on the document that was searched on, finalists on the others. Measures nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Losses = Mapping[tuple[str, int], Sequence[float]]
"""(candidate, document) → nats of each token; document 0 is the one that was searched on."""

STRETCHES = 16
"""Neighbouring tokens are hard together, so an error is worked out from the means of so many stretches of a text."""


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of ours − theirs over the same tokens, and its standard error."""
    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    size = len(values) // STRETCHES
    means = [statistics.fmean(values[start : start + size]) for start in range(0, size * STRETCHES, size)]
    return statistics.fmean(values), statistics.stdev(means) / math.sqrt(STRETCHES)


@dataclass(frozen=True, slots=True)
class Tuning:
    """All candidates on document 0, the best first."""

    losses: Losses
    baseline: str
    document: str

    def headings(self) -> list[str]:
        return ["candidate", "loss", f"beside {self.baseline}"]

    def rows(self) -> list[list[str]]:
        read = {name: found for (name, document), found in self.losses.items() if document == 0}
        theirs = read.get(self.baseline)
        return [
            [name, f"{statistics.fmean(read[name]):.4f}", _beside(read[name], theirs, name == self.baseline)]
            for name in sorted(read, key=lambda name: statistics.fmean(read[name]))
        ]

    def notes(self) -> list[str]:
        return [f"Searched on: {self.document}."]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Those candidates that read any of the other documents, beside the baseline on each of them."""

    losses: Losses
    baseline: str
    documents: Sequence[str]

    def headings(self) -> list[str]:
        letters = [_letter(number) for number in range(1, len(self.documents) + 1)]
        return ["candidate", *letters, "mean ± deviation over documents"]

    def rows(self) -> list[list[str]]:
        numbers = range(1, len(self.documents) + 1)
        names = dict.fromkeys(name for name, document in self.losses if document)
        rows = []
        for name in names:
            found = [(self.losses.get((name, n)), self.losses.get((self.baseline, n))) for n in numbers]
            if name == self.baseline:
                rows.append(
                    [name, *("–" if ours is None else f"{statistics.fmean(ours):.4f}" for ours, _ in found), ""]
                )
            else:
                rows.append([name, *(_beside(ours, theirs) for ours, theirs in found), self._over_documents(name)])
        return rows

    def _over_documents(self, name: str) -> str:
        both = [
            n
            for n in range(1, len(self.documents) + 1)
            if (name, n) in self.losses and (self.baseline, n) in self.losses
        ]
        means = [difference(self.losses[name, n], self.losses[self.baseline, n])[0] for n in both]
        if len(means) < 2:
            return "–"
        return f"{statistics.fmean(means):+.4f} ± {statistics.stdev(means):.4f}"

    def notes(self) -> list[str]:
        listed = "; ".join(f"{_letter(n)}: {name}" for n, name in enumerate(self.documents, 1))
        return [f"Held out: {listed}. {self.baseline}'s row is its loss, the others are the difference from it."]


def _letter(number: int) -> str:
    return chr(ord("A") + number - 1)


def _beside(ours: Sequence[float] | None, theirs: Sequence[float] | None, same: bool = False) -> str:
    if ours is None or theirs is None:
        return "–"
    if same:
        return ""
    mean, error = difference(ours, theirs)
    return f"{mean:+.4f} ± {error:.4f}"
