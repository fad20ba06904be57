"""What a fairness measurement found: whether the bounds held, beside FIFO prefill, and every latency over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.fairness.load import Latencies
from bench.shared.report import Report, Table, plain_log_axis

JUDGED = 99
PERCENTS = {50: "p50", JUDGED: "p99", 100: "worst"}
SUBJECT, RIVAL = "ours", "fifo"
NAMES = {SUBJECT: "ours", RIVAL: "FIFO prefill"}


def percentile(values: Sequence[float], percent: int) -> float:
    return float(np.percentile(values, percent)) if values else float("nan")


@dataclass(frozen=True, slots=True)
class Fairness:
    """Latencies by policy, the budget, and the two figures that the bound is made of.

    Attributes:
        chunk_s: B ÷ r, the longest that a chunk of the whole budget took; the bound between two tokens.
        steps: of the bound on TTFT.
    """

    about: Mapping[str, Any]
    latencies: Mapping[str, Latencies]
    budget: int
    chunk_s: float
    steps: int

    @property
    def ttft_bound(self) -> float:
        return self.steps * self.chunk_s

    def overdue(self, policy: str) -> list[tuple[float, float]]:
        """Short requests that had waited past the bound without an answer."""
        return [(at, waited) for at, waited in self.latencies[policy].unanswered if waited > self.ttft_bound]

    def waits(self, policy: str) -> list[float]:
        """TTFT of short requests; the overdue count as what they had waited."""
        return [seconds for _, seconds in [*self.latencies[policy].ttfts, *self.overdue(policy)]]

    def gaps(self, policy: str) -> list[float]:
        return [gap for _, gap in self.latencies[policy].gaps]

    def keeps(self, policy: str) -> tuple[bool, bool]:
        """Whether the bounds on TTFT and on the time between tokens held; what has no figure at all broke them."""
        waits, gaps = (percentile(values, JUDGED) for values in (self.waits(policy), self.gaps(policy)))
        return waits <= self.ttft_bound, gaps <= self.chunk_s

    @property
    def held(self) -> bool:
        return all(self.keeps(SUBJECT))

    def row(self, policy: str) -> list[str]:
        latencies, values = self.latencies[policy], (self.waits(policy), self.gaps(policy))
        counts = [str(len(latencies.ttfts)), str(len(latencies.unanswered)), str(latencies.num_long)]
        held = ["yes" if kept else "no" for kept in self.keeps(policy)]
        return [NAMES[policy], *counts, *(f"{percentile(v, p):.2f}" for v in values for p in PERCENTS), *held]

    def notes(self) -> list[str]:
        about, held = self.about, self.held
        ours, fifo = (percentile(self.waits(policy), 50) for policy in (SUBJECT, RIVAL))
        return [
            f"{about['date']}, {about['cpu']}, {about['cores']} cores. {about['in_flight']} prompts of "
            f"{about['long_tokens']:,} tokens under way at any time, a request of {about['short_tokens']} tokens every "
            f"{about['short_every']:g} s on average, one running stream; {about['seconds']:g} s for each policy.",
            f"{'Both bounds held' if held else 'A bound broke'}, by the {JUDGED}th percentile. B ÷ r = {self.budget} ÷ "
            f"{self.budget / self.chunk_s:.0f} tokens/s = {self.chunk_s:.2f} s, TTFT ≤ {self.steps} × that. A short "
            f"request's median TTFT is {ours:.2f} s; with FIFO prefill {fifo:.2f} s, {fifo / ours:.1f} times as long.",
        ]


def report(found: Fairness) -> Report:
    columns = [f"{name} {percent}, s" for name in ("TTFT", "between tokens") for percent in PERCENTS.values()]
    headings = ["policy", "short requests", "unanswered", "long prompts read", *columns, "TTFT held", "tokens held"]
    bound = ["bound", *[""] * 4, f"≤ {found.ttft_bound:.2f}", "", "", f"≤ {found.chunk_s:.2f}", *[""] * 3]
    table = Table(headings, [*map(found.row, found.latencies), bound], found.notes())
    data = asdict(found) | {"held": found.held, "bounds_s": {"ttft": found.ttft_bound, "gap": found.chunk_s}}
    return Report("fairness", [table], data, lambda figure: draw(found, figure))


def draw(found: Fairness, figure: Any) -> None:
    """TTFT of short requests and the stream's gaps over time, with the bounds."""
    figure.set_size_inches(9, 7)
    ttft, gaps = figure.subplots(2, 1, sharex=True)
    for color, (policy, latencies) in zip(("C0", "C1"), found.latencies.items(), strict=False):
        hollow = {"marker": "^", "facecolors": "none", "edgecolors": color}
        for panel, dots, label, style in (
            (ttft, latencies.ttfts, NAMES[policy], {"color": color}),
            (ttft, found.overdue(policy), f"{NAMES[policy]}, no answer yet", hollow),
            (gaps, latencies.gaps, NAMES[policy], {"color": color}),
        ):
            if dots:
                panel.scatter(*zip(*dots, strict=True), s=14, alpha=0.8, label=label, **style)
    for panel, title, bound in (
        (ttft, "TTFT of a short request, s", found.ttft_bound),
        (gaps, "between two tokens of the running stream, s", found.chunk_s),
    ):
        panel.axhline(bound, color="0.4", linewidth=1, linestyle="--")
        panel.annotate(f"bound {bound:.2f} s", (1, bound), (-2, 3), xycoords=("axes fraction", "data"),
                       textcoords="offset points", ha="right", color="0.4", fontsize=8)  # fmt: skip
        plain_log_axis(panel)
        panel.set_title(title, fontsize=10)
    ttft.margins(y=0.25)
    ttft.legend(fontsize=8, loc="upper left", ncols=4)
    gaps.set_xlabel("seconds of load")
