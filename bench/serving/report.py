"""What a serving measurement found: medians by point and server, and how many times as fast the first server is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.serving.measure import Figures, Point, Run, run_figures, speedup, summarise
from bench.shared.machine import DISTURBED_CORES
from bench.shared.report import NOTHING, Report, Table

COLUMNS = {  # figure → heading, factor to the shown unit, format
    "ttft": ("TTFT, ms", 1e3, ",.0f"),
    "time_per_token": ("time/token, ms", 1e3, ",.1f"),
    "gap_p50": ("gap p50, ms", 1e3, ",.1f"),
    "gap_p99": ("gap p99, ms", 1e3, ",.1f"),
    "output_rate": ("output tok/s", 1.0, ",.1f"),
    "total_rate": ("all tok/s", 1.0, ",.0f"),
}
COMPARED = {"ttft": "TTFT", "time_per_token": "time/token", "output_rate": "output tok/s"}


@dataclass(frozen=True, slots=True)
class Served:
    """The first of `names` is the subject, the others are its peers."""

    names: Sequence[str]
    points: Sequence[Point]
    runs: Mapping[tuple[str, Point], Sequence[Run]]
    about: Mapping[str, Any]  # machine and options, JSON-ready

    def figures(self, name: str, point: Point) -> Figures | None:
        return summarise(self.runs.get((name, point), ()))

    def ratio(self, figure: str, point: Point, peer: str) -> float:
        """How many times as fast the subject is; NaN where one of them has no figure."""
        ours, theirs = self.figures(self.names[0], point), self.figures(peer, point)
        return math.nan if ours is None or theirs is None else speedup(figure, ours, theirs)

    def row(self, point: Point, name: str) -> list[str]:
        peers = len(self.names) > 1
        ratios = [self.ratio(key, point, name) if name != self.names[0] else math.nan for key in COMPARED if peers]
        return [point.label, name, *_cells(self.figures(name, point)), *(_shown(r, ".2f", "×") for r in ratios)]

    def notes(self) -> list[str]:
        about, runs = self.about, [run for runs in self.runs.values() for run in runs]
        alive = "one server alive at a time" if about["alone"] else "servers interleaved, all alive"
        lines = [
            f"{about['date']}, {about['cpu']}, {about['cores']} cores, {about['output_tokens']} tokens generated a "
            f"request, medians of {about['rounds']} rounds, {alive}."
        ]
        if len(self.names) > 1:
            lines.append(f"× is how many times as fast {self.names[0]} is as the server in that row. {self._slowest()}")
        if count := sum(run.disturbed for run in runs):
            more = f"other programs used more than {DISTURBED_CORES} of a core"
            lines.append(f"Disturbed: in {count} of {len(runs)} runs {more}.")
        failed = {
            f"Failed: {n} at {p.label}: {why}" for (n, p), rs in self.runs.items() for r in rs for why in r.failures
        }
        return [*lines, *sorted(failed)]

    def _slowest(self) -> str:
        cases = [(self.ratio(k, p, n), n, k, p) for p in self.points for k in COMPARED for n in self.names[1:]]
        known = [case for case in cases if not math.isnan(case[0])]
        if not known:
            return ""
        ratio, peer, figure, point = min(known, key=lambda case: case[0])
        return f"The least: {ratio:.2f}× {peer} by {COMPARED[figure]} at {point.label} streams."


def _shown(value: float, form: str, unit: str = "") -> str:
    return NOTHING if math.isnan(value) else format(value, form) + unit


def _cells(figures: Figures | None) -> list[str]:
    if figures is None:
        return [NOTHING] * len(COLUMNS)
    return [_shown(figures[key] * factor, form) for key, (_, factor, form) in COLUMNS.items()]


def one_line(name: str, point: Point, run: Run) -> str:
    """What a run gave, as it ends."""
    if run.failures:
        return f"{name}, {point.label}: failed, {run.failures[0]}"
    headings = (heading.replace(",", "") for heading, _, _ in COLUMNS.values())
    cells = ", ".join(f"{h} {cell}" for h, cell in zip(headings, _cells(run_figures(run)), strict=True))
    return f"{name}, {point.label}: {cells}" + (f", others used {run.others_cores:.1f} cores" if run.disturbed else "")


def report(served: Served) -> Report:
    compared = [f"× {name}" for name in COMPARED.values() if len(served.names) > 1]
    headings = ["prompt × streams", "server", *(heading for heading, _, _ in COLUMNS.values()), *compared]
    rows = [served.row(point, name) for point in served.points for name in served.names]
    points = [
        {
            **asdict(point),
            "server": name,
            "figures": served.figures(name, point),
            "speedup_of_first": {key: served.ratio(key, point, name) for key in COLUMNS},
            "runs": [asdict(run) for run in served.runs.get((name, point), ())],
        }
        for point in served.points
        for name in served.names
    ]
    table = Table(headings, rows, served.notes(), left=(0, 1))
    data = {"about": dict(served.about), "points": points}
    return Report("serving", [table], data)
