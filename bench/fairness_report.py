"""What a fairness measurement looks like: a terminal table, markdown, JSON and a plot. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.fairness_load import Latencies
from bench.measure import percentile
from bench.report import write
from bench.soak_report import log_axis

JUDGED = 99
PERCENTS = (50, JUDGED, 100)
SUBJECT, RIVAL = "ours", "fifo"
NAMES = {SUBJECT: "ours", RIVAL: "FIFO prefill"}


@dataclass(frozen=True, slots=True)
class FairnessReport:
    """One measurement: latencies by policy, the budget, and the two figures that the bound is made of.

    Attributes:
        chunk_s: B ÷ r, the longest that a chunk of the whole budget took.
        steps: of the bound on TTFT.
    """

    about: Mapping[str, Any]
    latencies: Mapping[str, Latencies]
    budget: int
    chunk_s: float
    steps: int

    @property
    def prefill_rate(self) -> float:
        """r, tokens a second."""
        return self.budget / self.chunk_s

    @property
    def ttft_bound(self) -> float:
        return self.steps * self.chunk_s

    @property
    def gap_bound(self) -> float:
        return self.chunk_s

    def waits(self, policy: str) -> list[float]:
        """TTFT of short requests; those that had waited past the bound without an answer count as what they waited."""
        latencies = self.latencies[policy]
        overdue = [waited for _, waited in latencies.unanswered if waited > self.ttft_bound]
        return [ttft for _, ttft in latencies.ttfts] + overdue

    def gaps(self, policy: str) -> list[float]:
        return [gap for _, gap in self.latencies[policy].gaps]

    def keeps(self, policy: str) -> tuple[bool, bool]:
        """Whether the bounds on TTFT and on the time between tokens held; what has no figure at all broke them."""
        return (
            percentile(self.waits(policy), JUDGED) <= self.ttft_bound,
            percentile(self.gaps(policy), JUDGED) <= self.gap_bound,
        )

    @property
    def held(self) -> bool:
        return all(self.keeps(SUBJECT))

    def headings(self) -> list[str]:
        columns = [f"{name} {_percent(p)}, s" for name in ("TTFT", "between tokens") for p in PERCENTS]
        return ["policy", "short requests", "unanswered", "long prompts read", *columns, "TTFT held", "tokens held"]

    def rows(self) -> list[list[str]]:
        rows = []
        for policy, latencies in self.latencies.items():
            waits, gaps = self.waits(policy), self.gaps(policy)
            times = [f"{percentile(values, p):.2f}" for values in (waits, gaps) for p in PERCENTS]
            counts = [str(len(latencies.ttfts)), str(len(latencies.unanswered)), str(latencies.num_long)]
            held = ["yes" if kept else "no" for kept in self.keeps(policy)]
            rows.append([NAMES[policy], *counts, *times, *held])
        bounds = [*(["", f"≤ {self.ttft_bound:.2f}", ""]), *(["", f"≤ {self.gap_bound:.2f}", ""])]
        return [*rows, ["bound", "", "", "", *bounds, "", ""]]

    def verdict(self) -> str:
        ttft, gap = self.keeps(SUBJECT)
        words = "Both bounds held" if ttft and gap else "The bound on TTFT broke" if gap else "A bound broke"
        ours, fifo = (percentile(self.waits(policy), 50) for policy in (SUBJECT, RIVAL))
        return (
            f"{words}, by the {JUDGED}th percentile. B ÷ r = {self.budget} ÷ {self.prefill_rate:.0f} tokens/s = "
            f"{self.chunk_s:.2f} s, TTFT ≤ {self.steps} × that. A short request's median TTFT is {ours:.2f} s; with "
            f"FIFO prefill {fifo:.2f} s, {fifo / ours:.1f} times as long."
        )

    def setting(self) -> str:
        about = self.about
        return (
            f"{about['date']}, {about['cpu']}, {about['cores']} cores. {about['in_flight']} prompts of "
            f"{about['long_tokens']:,} tokens under way at any time, a request of {about['short_tokens']} tokens every "
            f"{about['short_every']:g} s on average, one running stream; {about['seconds']:g} s for each policy."
        )


def _percent(percent: int) -> str:
    return "worst" if percent == 100 else f"p{percent}"


def print_report(report: FairnessReport, console: Console) -> None:
    table = Table(header_style="bold")
    for i, heading in enumerate(report.headings()):
        table.add_column(heading, justify="right" if i else "left")
    for row in report.rows():
        table.add_row(*row)
    console.print(table)
    for line in (report.setting(), report.verdict()):
        console.print(line, highlight=False)


def markdown(report: FairnessReport) -> str:
    """A section for RESULTS.md."""
    headings = report.headings()
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in report.rows()]
    return "\n".join(lines) + f"\n\n{report.setting()}\n\n{report.verdict()}\n"


def as_json(report: FairnessReport) -> dict[str, Any]:
    return {
        "about": dict(report.about),
        "held": report.held,
        "prefill_rate": report.prefill_rate,
        "bounds_s": {"ttft": report.ttft_bound, "gap": report.gap_bound},
        "steps": report.steps,
        "policies": {policy: asdict(latencies) for policy, latencies in report.latencies.items()},
    }


def save(report: FairnessReport, folder: Path) -> list[Path]:
    """Write fairness.json, fairness.md and fairness.png."""
    return write("fairness", folder, as_json(report), markdown(report), partial(plot, report))


def plot(report: FairnessReport, path: Path) -> None:
    """TTFT of short requests and the stream's gaps over time, with the bounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    _panel(panels[0], report, "TTFT of a short request, s", "ttfts", report.ttft_bound)
    for policy, color in zip(report.latencies, ("C0", "C1"), strict=False):
        open_ended = report.latencies[policy].unanswered
        overdue = [(at, waited) for at, waited in open_ended if waited > report.ttft_bound]
        _dots(panels[0], overdue, color, f"{NAMES[policy]}, no answer yet", marker="^", facecolors="none")
    _panel(panels[1], report, "between two tokens of the running stream, s", "gaps", report.gap_bound)
    panels[0].legend(frameon=False, fontsize=8, loc="upper left", ncols=4)
    panels[0].margins(y=0.25)
    panels[1].set_xlabel("seconds of load")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(panel: Any, report: FairnessReport, title: str, name: str, bound: float) -> None:
    for policy, color in zip(report.latencies, ("C0", "C1"), strict=False):
        _dots(panel, getattr(report.latencies[policy], name), color, NAMES[policy])
    panel.axhline(bound, color="0.4", linewidth=1, linestyle="--")
    panel.annotate(f"bound {bound:.2f} s", (1, bound), (-2, 3), xycoords=("axes fraction", "data"),
                   textcoords="offset points", ha="right", color="0.4", fontsize=8)  # fmt: skip
    log_axis(panel)
    panel.set_title(title, loc="left", fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)


def _dots(panel: Any, dots: Sequence[tuple[float, float]], color: str, label: str, **style: Any) -> None:
    if dots:
        options = {"s": 14, "label": label, "alpha": 0.8} | ({"edgecolors": color} if style else {"color": color})
        panel.scatter([at for at, _ in dots], [value for _, value in dots], **options | style)
