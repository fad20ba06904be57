"""What a measurement of starts looks like: terminal table, markdown table, JSON and a plot. Measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.report import markdown, write

FIRST_TOKEN = "first token"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process. `private`: of `rss`, what no file backs."""

    rss: int
    uss: int
    private: int


@dataclass(frozen=True, slots=True)
class Start:
    """One start: milestone → second at which it was reached, in order; memory by the moment it was looked at.

    second_ttft: seconds to the first token of the next request, when everything has run once.
    """

    at: Mapping[str, float]
    second_ttft: float
    memory: Mapping[str, Memory]
    cache_bytes: int

    def phases(self) -> dict[str, float]:
        """Seconds that each milestone took after the one before it."""
        times = pairwise([0.0, *self.at.values()])
        return {name: until - since for name, (since, until) in zip(self.at, times, strict=True)}


@dataclass(frozen=True, slots=True)
class StartupReport:
    """Medians over the starts."""

    starts: Sequence[Start]
    about: Mapping[str, Any]

    def phase(self, name: str) -> float:
        return statistics.median(start.phases()[name] for start in self.starts)

    def reached(self, name: str) -> list[float]:
        """Seconds since the process began, of each start."""
        return [start.at[name] for start in self.starts]

    def memory(self, moment: str) -> Memory:
        """Medians; of the starts that have this moment."""
        found = [start.memory[moment] for start in self.starts if moment in start.memory]
        return Memory(*(round(statistics.median(getattr(m, name) for m in found)) for name in Memory.__slots__))

    def moments(self) -> list[str]:
        return list(dict.fromkeys(moment for start in self.starts for moment in start.memory))

    def headings(self) -> list[str]:
        return ["until", "took, s", "at, s", "range, s"]

    def rows(self) -> list[list[str]]:
        return [
            [
                name,
                f"{self.phase(name):.2f}",
                f"{statistics.median(at):.2f}",
                f"{min(at):.2f}–{max(at):.2f}",
            ]
            for name in self.starts[0].at
            for at in (self.reached(name),)
        ]

    def notes(self) -> list[str]:
        about, starts = self.about, self.starts
        again = statistics.median(start.second_ttft for start in starts)
        weights = about["weight_bytes"]
        held = f"weights {_mib(weights)}, " if weights else ""
        seen = "; ".join(f"{moment} {self._memory_note(moment)}" for moment in self.moments())
        return [
            f"{about['model']}: medians of {len(starts)} start{'s'[: len(starts) != 1]}, seconds since the process "
            f"began, the prompt of 128 tokens sent as soon as /ready answers; the next such prompt has its first token "
            f"after {again:.2f} s. {about['date']} on {about['cpu']}, {about['cores']} cores.",
            f"Memory: {held}cache {_mib(starts[0].cache_bytes)}, which takes memory as it is written to. {seen}.",
        ]

    def _memory_note(self, moment: str) -> str:
        found = self.memory(moment)
        return f"{_mib(found.rss)} resident (private {_mib(found.private)}, USS {_mib(found.uss)})"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def as_json(report: StartupReport) -> dict[str, Any]:
    medians = {
        name: {"took_s": report.phase(name), "at_s": statistics.median(report.reached(name))}
        for name in report.starts[0].at
    }
    memory = {moment: asdict(report.memory(moment)) for moment in report.moments()}
    starts = [asdict(start) for start in report.starts]
    return {"about": dict(report.about), "phases": medians, "memory_bytes": memory, "starts": starts}


def save(report: StartupReport, folder: Path) -> list[Path]:
    """Write startup.json, startup.md and startup.png."""
    return write("startup", folder, as_json(report), markdown(report), partial(plot, report))


def plot(report: StartupReport, path: Path) -> None:
    """A bar of the phases, by their medians."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(9, 2), layout="constrained")
    left = 0.0
    for name in report.starts[0].at:
        took = report.phase(name)
        panel.barh(0, took, left=left, label=f"{name}, {took:.2f} s")
        left += took
    panel.set_yticks([])
    panel.set_xlabel("seconds since the process began")
    panel.set_title(f"{report.about['model']}: from the start to the first token", loc="left")
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1.1), frameon=False, fontsize=8)
    panel.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
