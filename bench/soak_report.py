"""What a soak looks like: a terminal table, markdown, JSON and a plot. Measures and judges nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.measure import percentile
from bench.report import write
from bench.soak_client import Outcome
from bench.soak_verdicts import MEBIBYTE, Trend, Verdict
from bench.soak_watch import Sample

PERCENTS = (50, 90, 99)
NOTHING = "–"
ORDER = ("short", "shared", "crowd", "slow", "abort", "bad")  # long ones come after these, by name


@dataclass(frozen=True, slots=True)
class SoakReport:
    """One soak. `warm_up` and `outcomes` are what came before and after its end, `samples` are all of both.

    Traffic ran from `begin` to `end` seconds.
    """

    about: Mapping[str, Any]
    warm_up: Sequence[Outcome]
    outcomes: Sequence[Outcome]
    samples: Sequence[Sample]
    begin: float
    end: float
    verdicts: Sequence[Verdict]
    memory: Trend | None = None

    @property
    def held(self) -> bool:
        return all(verdict.held for verdict in self.verdicts)

    @property
    def kinds(self) -> list[str]:
        """Classes that occurred, in the order of the table."""
        present = {outcome.kind for outcome in self.outcomes}
        long = sorted(present - set(ORDER), key=lambda kind: (len(kind), kind))
        return [kind for kind in ORDER if kind in present] + long

    def of(self, kind: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind == kind]

    def latencies(self, kind: str) -> tuple[list[float], list[float]]:
        """TTFT of the class's whole streams, and all gaps between their tokens, in seconds."""
        outcomes = self.of(kind)
        return [o.ttft for o in outcomes if o.ttft is not None], [gap for o in outcomes for gap in o.gaps]

    def headings(self) -> list[str]:
        times = [f"{name} p{percent}, s" for name in ("TTFT", "between tokens") for percent in PERCENTS]
        return ["class", "requests", "statuses", "streams", *times]

    def rows(self) -> list[list[str]]:
        rows = []
        for kind in self.kinds:
            outcomes, (ttfts, gaps) = self.of(kind), self.latencies(kind)
            statuses = Counter("aborted" if o.aborted else str(o.status or "none") for o in outcomes)
            shown = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
            if kind == "slow":
                gaps = []  # the reader's own pauses
            times = [_seconds(percentile(values, percent)) for values in (ttfts, gaps) for percent in PERCENTS]
            rows.append([kind, str(len(outcomes)), shown, str(len(ttfts)), *times])
        return rows

    def summary(self) -> str:
        about, first, last = self.about, self.samples[0].gauges, self.samples[-1].gauges
        minutes = (self.end - self.begin) / 60
        return (
            f"{about['date']}, {about['cpu']}, {about['cores']} cores. {minutes:.1f} min of traffic after the warm-up, "
            f"{about['clients']} clients and one of long prompts, seed {about['seed']}: {len(self.outcomes)} requests, "
            f"{last.prompt_tokens - first.prompt_tokens:,} prompt tokens read and "
            f"{last.generation_tokens - first.generation_tokens:,} generated, warm-up included; "
            f"{last.preemptions} preemptions."
        )


def _seconds(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.2f}"


def print_report(report: SoakReport, console: Console) -> None:
    table = Table(header_style="bold")
    for i, heading in enumerate(report.headings()):
        table.add_column(heading, justify="left" if i in (0, 2) else "right")
    for row in report.rows():
        table.add_row(*row)
    console.print(table)
    console.print(report.summary(), highlight=False)
    for verdict in report.verdicts:
        mark = "[green]held[/]  " if verdict.held else "[bold red]FAILED[/]"
        console.print(f"{mark} {verdict.rule}: ", end="", highlight=False)
        console.print(verdict.finding, highlight=False, markup=False)


def markdown(report: SoakReport) -> str:
    """A section for RESULTS.md."""
    headings = report.headings()
    lines = ["| " + " | ".join(headings) + " |", "|---|---:|---|" + "---:|" * (len(headings) - 3)]
    lines += ["| " + " | ".join(row) + " |" for row in report.rows()]
    lines += ["", report.summary(), "", "| rule | held | found |", "|---|---|---|"]
    lines += [
        f"| {verdict.rule} | {'yes' if verdict.held else '**no**'} | {_cell(verdict.finding)} |"
        for verdict in report.verdicts
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_json(report: SoakReport) -> dict[str, Any]:
    """Everything, raw."""
    return {
        "about": dict(report.about),
        "held": report.held,
        "verdicts": [asdict(verdict) for verdict in report.verdicts],
        "memory": asdict(report.memory) if report.memory else None,
        "traffic_s": [report.begin, report.end],
        "warm_up": [asdict(outcome) for outcome in report.warm_up],
        "outcomes": [asdict(outcome) for outcome in report.outcomes],
        "samples": [asdict(sample) for sample in report.samples],
    }


def save(report: SoakReport, folder: Path) -> list[Path]:
    """Write soak.json, soak.md and soak.png."""
    return write("soak", folder, as_json(report), markdown(report), partial(plot, report))


def plot(report: SoakReport, path: Path) -> None:
    """Memory, latency and the cache over time, in minutes since the traffic began."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(4, 1, figsize=(10, 11), sharex=True, layout="constrained")
    _plot_memory(panels[0], report)
    _plot_latency(panels[1], report, "TTFT of streams, s", gaps=False)
    _plot_latency(panels[2], report, "longest gap between two tokens of a stream, s", gaps=True)
    _plot_cache(panels[3], report)
    for panel in panels:
        panel.axvline(0, color="0.7", linewidth=1, zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("minutes since the traffic began; before it, the warm-up")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot_memory(panel: Any, report: SoakReport) -> None:
    seen = [(_minutes(report, s.at), s.rss / MEBIBYTE) for s in report.samples if s.rss is not None]
    panel.plot([at for at, _ in seen], [rss for _, rss in seen], linewidth=1, color="C0")
    if report.memory is not None:
        line = report.memory
        minutes = line.seconds / 60
        ends = [(line.mean + sign * line.slope * line.seconds / 2) / MEBIBYTE for sign in (-1, 1)]
        panel.plot([0, minutes], ends, color="C3", linewidth=1.5, linestyle="--", label="least squares")
        panel.legend(frameon=False, loc="lower right", fontsize=8)
    panel.set_ylim(0, 1.2 * max([rss for _, rss in seen], default=1.0))
    panel.set_title("resident memory of the server, MiB", loc="left", fontsize=10)


def _plot_latency(panel: Any, report: SoakReport, title: str, *, gaps: bool) -> None:
    """A dot a stream, where it began."""
    for i, kind in enumerate(report.kinds):
        dots = [
            (o.started, max(o.gaps) if gaps else o.ttft)
            for o in report.of(kind)
            if o.ttft is not None and (o.gaps or not gaps) and kind not in ("slow", "abort")
        ]
        if dots:
            xs = [_minutes(report, at) for at, _ in dots]
            panel.scatter(xs, [value for _, value in dots], s=14, color=f"C{i}", label=kind, alpha=0.8, linewidths=0)
    log_axis(panel)
    panel.margins(y=0.25)
    panel.set_title(title, loc="left", fontsize=10)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, ncols=5, fontsize=8, loc="upper left")


def log_axis(panel: Any) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter("{x:g}")


def _plot_cache(panel: Any, report: SoakReport) -> None:
    ats = [_minutes(report, sample.at) for sample in report.samples]
    blocks = [sample.gauges.blocks for sample in report.samples]
    held = [100 * (1 - s.gauges.free_blocks / total) for s, total in zip(report.samples, blocks, strict=True)]
    cached = [100 * s.gauges.cached_blocks / total for s, total in zip(report.samples, blocks, strict=True)]
    panel.plot(ats, cached, linewidth=1, color="0.6", label="with known content")
    panel.plot(ats, held, linewidth=1, color="C0", label="held by sequences")
    panel.set_ylim(0, 105)
    panel.legend(frameon=False, ncols=2, fontsize=8, loc="center left")
    panel.set_title("cache blocks, %", loc="left", fontsize=10)


def _minutes(report: SoakReport, at: float) -> float:
    return (at - report.begin) / 60
