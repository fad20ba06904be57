"""What a serving measurement looks like: a terminal table, a markdown table, JSON and a plot. Measures nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.measure import TIMES, Figures, Point, Run, run_figures, speedup, summarise
from bench.neighbours import DISTURBED_CORES
from bench.report import write

Runs = Mapping[tuple[str, Point], Sequence[Run]]

COLUMNS = {  # figure → heading, factor to the shown unit, format
    "ttft": ("TTFT, ms", 1e3, ",.0f"),
    "time_per_token": ("time/token, ms", 1e3, ",.1f"),
    "gap_p50": ("gap p50, ms", 1e3, ",.1f"),
    "gap_p99": ("gap p99, ms", 1e3, ",.1f"),
    "output_rate": ("output tok/s", 1.0, ",.1f"),
    "total_rate": ("all tok/s", 1.0, ",.0f"),
}
COMPARED = ("ttft", "time_per_token", "output_rate")
NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Report:
    """One whole measurement. The first of `names` is the subject, the others are its peers."""

    names: Sequence[str]
    points: Sequence[Point]
    runs: Runs
    about: Mapping[str, Any]  # machine and options, JSON-ready

    def figures(self, name: str, point: Point) -> Figures | None:
        return summarise(self.runs.get((name, point), ()))

    def ratios(self, figure: str, point: Point) -> dict[str, float]:
        """How many times as fast the subject is, for each peer measured at the point."""
        subject = self.figures(self.names[0], point)
        peers = {name: self.figures(name, point) for name in self.names[1:]}
        if subject is None:
            return {}
        return {name: speedup(figure, subject, peer) for name, peer in peers.items() if peer is not None}

    def rows(self) -> list[list[str]]:
        """Cells of every table: a line for each point and server."""
        return [self._row(point, name) for point in self.points for name in self.names]

    def _row(self, point: Point, name: str) -> list[str]:
        figures = self.figures(name, point)
        if figures is None:
            return [point.label, name, *[NOTHING] * (len(COLUMNS) + len(COMPARED))]
        cells = [_shown(getattr(figures, key) * factor, form) for key, (_, factor, form) in COLUMNS.items()]
        subject = name == self.names[0]
        ratios = [NOTHING if subject else _ratio(self.ratios(key, point).get(name)) for key in COMPARED]
        return [point.label, name, *cells, *ratios]

    def headings(self) -> list[str]:
        columns = [heading for heading, _, _ in COLUMNS.values()]
        compared = [f"× {short_name(key)}" for key in COMPARED]
        return ["prompt × streams", "server", *columns, *(compared if len(self.names) > 1 else [])]

    def failures(self) -> list[str]:
        lines = (
            f"{name} at {point.label}: {failure}"
            for (name, point), runs in self.runs.items()
            for run in runs
            for failure in run.failures
        )
        return list(dict.fromkeys(lines))

    def disturbed(self) -> str:
        """How many runs other programs disturbed, in words; empty where none."""
        runs = [run for runs in self.runs.values() for run in runs]
        count = sum(run.others_cores > DISTURBED_CORES for run in runs)
        if not count:
            return ""
        return f"Disturbed: in {count} of {len(runs)} runs other programs used more than {DISTURBED_CORES} of a core."

    def slowest(self) -> str:
        """The worst ratio of all, in words; empty where nothing was compared."""
        ratios = [
            (ratio, peer, short_name(key), point)
            for point in self.points
            for key in COMPARED
            for peer, ratio in self.ratios(key, point).items()
        ]
        if not ratios:
            return ""
        ratio, peer, figure, point = min(ratios, key=lambda item: item[0])
        ours = self.names[0]
        return (
            f"× is how many times as fast {ours} is as the server in that row. The least: {ratio:.2f}× {peer} "
            f"by {figure} at {point.label} streams."
        )


def short_name(figure: str) -> str:
    """A figure's heading without its unit."""
    return COLUMNS[figure][0].split(",")[0]


def _shown(value: float, form: str) -> str:
    return NOTHING if math.isnan(value) else format(value, form)


def _ratio(value: float | None) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{value:.2f}×"


def one_line(name: str, point: Point, run: Run) -> str:
    """What a run gave, as it ends."""
    figures = run_figures(run)
    if figures is None:
        return f"{name}, {point.label}: failed, {run.failures[0] if run.failures else 'no stream'}"
    cells = [
        f"{heading.replace(',', '')} {_shown(figures[key] * factor, form)}"
        for key, (heading, factor, form) in COLUMNS.items()
    ]
    disturbed = f", disturbed: others used {run.others_cores:.1f} cores" if run.others_cores > DISTURBED_CORES else ""
    return f"{name}, {point.label}: {', '.join(cells)}{disturbed}"


def print_table(report: Report, console: Console) -> None:
    headings = report.headings()
    table = Table(title=f"Medians of {report.about['rounds']} rounds", header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for row in report.rows():
        table.add_row(*row[: len(headings)], end_section=row[1] == report.names[-1])
    console.print(table)
    for line in report.failures():
        console.print(f"[red]failed[/]: {line}", highlight=False)
    for line in filter(None, (report.slowest(), report.disturbed())):
        console.print(line, highlight=False)


def markdown(report: Report) -> str:
    """A section for RESULTS.md."""
    headings = report.headings()
    lines = ["| " + " | ".join(headings) + " |", "|---|---|" + "---:|" * (len(headings) - 2)]
    lines += ["| " + " | ".join(row[: len(headings)]) + " |" for row in report.rows()]
    notes = [
        f"{report.about['date']}, {report.about['cpu']}, {report.about['cores']} cores, "
        f"{report.about['output_tokens']} tokens generated a request, medians of {report.about['rounds']} rounds, "
        f"{'one server alive at a time' if report.about['alone'] else 'servers interleaved, all alive'}.",
        report.slowest(),
        report.disturbed(),
        *(f"Failed: {line}" for line in report.failures()),
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(note for note in notes if note) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """Medians, ratios and every raw token time."""
    points = []
    for point in report.points:
        servers = {}
        for name in report.names:
            figures = report.figures(name, point)
            runs = [asdict(run) for run in report.runs.get((name, point), ())]
            servers[name] = {"figures": figures.as_dict() if figures else None, "runs": runs}
        ratios = {key: report.ratios(key, point) for key in COLUMNS}
        points.append({**asdict(point), "servers": servers, "speedup_of_first_over": ratios})
    return {"about": dict(report.about), "points": points}


def save(report: Report, folder: Path) -> list[Path]:
    """Write serving.json, serving.md and serving.png."""
    return write("serving", folder, as_json(report), markdown(report), partial(plot, report))


def plot(report: Report, path: Path) -> None:
    """A panel a figure, a group of bars a point, a bar a server."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = ("ttft", "time_per_token", "output_rate")
    figure, panels = pyplot.subplots(len(shown), 1, figsize=(1.6 + 1.7 * len(report.points), 9), layout="constrained")
    width = 0.8 / len(report.names)
    for panel, key in zip(panels, shown, strict=True):
        heading, factor, form = COLUMNS[key]
        for i, name in enumerate(report.names):
            found = [report.figures(name, point) for point in report.points]
            heights = [getattr(figures, key) * factor if figures else math.nan for figures in found]
            bars = panel.bar([x + (i + 0.5) * width - 0.4 for x in range(len(found))], heights, width, label=name)
            panel.bar_label(bars, ["" if math.isnan(h) else format(h, form) for h in heights], fontsize=7, padding=1)
        panel.set_title(f"{heading} ({'less' if key in TIMES else 'more'} is better)", loc="left", fontsize=10)
        if key != "time_per_token":  # the others span orders of magnitude
            panel.set_yscale("log")
        panel.margins(y=0.2)
        panel.set_xticks(range(len(report.points)), [point.label for point in report.points])
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, ncols=len(report.names), loc="upper left")
    panels[-1].set_xlabel("tokens in the prompt × streams at once")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
