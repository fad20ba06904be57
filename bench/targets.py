"""What a measurement is to reach, beside what it found. A target that is missed is told; it fails no run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VERDICTS = ("reached", "missed", "not measured")


@dataclass(frozen=True, slots=True)
class Target:
    """One figure. found: by case; the worst of them counts. form: how a figure is written."""

    name: str
    limit: float
    at_least: bool
    found: Mapping[str, float]
    form: str = "{:.2f}"

    @property
    def worst(self) -> str | None:
        """The case that is farthest on the wrong side; None where nothing was measured."""
        if not self.found:
            return None
        return (min if self.at_least else max)(self.found, key=self.found.__getitem__)

    @property
    def verdict(self) -> str:
        if self.worst is None:
            return "not measured"
        figure = self.found[self.worst]
        return "reached" if (figure >= self.limit if self.at_least else figure <= self.limit) else "missed"


@dataclass(frozen=True, slots=True)
class TargetTable:
    """A table of targets (`bench.report.Tabular`)."""

    targets: Sequence[Target]

    def headings(self) -> list[str]:
        return ["target", "wanted", "found", "worst case", "verdict"]

    def rows(self) -> list[list[str]]:
        return [
            [
                target.name,
                ("≥ " if target.at_least else "≤ ") + target.form.format(target.limit),
                "–" if target.worst is None else target.form.format(target.found[target.worst]),
                target.worst or "–",
                target.verdict,
            ]
            for target in self.targets
        ]

    def notes(self) -> list[str]:
        counts = Counter(target.verdict for target in self.targets)
        return ["Targets: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)]

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {
                "target": target.name,
                "limit": target.limit,
                "at_least": target.at_least,
                "found": dict(target.found),
                "verdict": target.verdict,
            }
            for target in self.targets
        ]
