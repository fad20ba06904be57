"""What a quality measurement looks like: a terminal table, a markdown table, JSON and a plot. Measures nothing."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.report import markdown, write

Losses = dict[tuple[str, int], list[float]]  # (method, context length) → a loss a document, always in one order

REFERENCE = "rope, trained length"
"""The row that all others are compared with: rope with no more context than the model was trained on."""

CROWDED = 0.5  # nats above the reference: the plot cuts off what lies higher and says so, or the rest would be one line


@dataclass(frozen=True, slots=True)
class QualityReport:
    """Losses in nats a token. `REFERENCE` is the first of the methods."""

    methods: Sequence[str]
    lengths: Sequence[int]
    losses: Mapping[tuple[str, int], Sequence[float]]
    about: Mapping[str, Any]

    def mean(self, method: str, length: int) -> float:
        return statistics.fmean(self.losses[method, length])

    def spread(self, method: str, length: int) -> float:
        """Standard deviation over the documents; 0 of a single one."""
        return _deviation(self.losses[method, length])

    def difference(self, method: str, length: int) -> tuple[float, float]:
        """From the reference on the same tokens: mean and standard deviation of the differences.

        Documents differ far more than methods do, so this is the figure to compare methods by.
        """
        reference = self.losses[REFERENCE, length]
        differences = [ours - theirs for ours, theirs in zip(self.losses[method, length], reference, strict=True)]
        return statistics.fmean(differences), _deviation(differences)

    def headings(self) -> list[str]:
        return ["method", *(f"loss at {n:,}" for n in self.lengths), *(f"Δ at {n:,}" for n in self.lengths)]

    def rows(self) -> list[list[str]]:
        return [
            [
                method,
                *(self._loss(method, n) for n in self.lengths),
                *(self._difference(method, n) for n in self.lengths),
            ]
            for method in self.methods
        ]

    def _loss(self, method: str, length: int) -> str:
        return _with_spread(f"{self.mean(method, length):.3f}", self.spread(method, length), self._alone)

    def _difference(self, method: str, length: int) -> str:
        mean, spread = self.difference(method, length)
        return _with_spread(f"{mean:+.3f}", spread, self._alone)

    @property
    def _alone(self) -> bool:
        return len(self.about["documents"]) == 1

    def notes(self) -> list[str]:
        about, documents = self.about, len(self.about["documents"])
        spread = f", mean ± standard deviation over {documents} documents" if documents > 1 else ""
        return [
            f"{about['model']}, {about['dtype']}, trained on {about['train_length']:,} tokens. Loss in nats a token of "
            f"the {about['last']:,} tokens that end at each length{spread}; Δ is the difference from rope on the same "
            f"tokens with at most {about['train_length']:,} tokens of context. Measured "
            f"{about['date']} on {about['cpu']}.",
            "Documents: " + "; ".join(about["documents"]) + ".",
        ]


def _with_spread(mean: str, spread: float, alone: bool) -> str:
    """One document has no spread to show."""
    return mean if alone else f"{mean} ± {spread:.3f}"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def as_json(report: QualityReport) -> dict[str, Any]:
    results = [
        {"method": method, "length": length, "losses": list(report.losses[method, length])}
        for method in report.methods
        for length in report.lengths
    ]
    return {"about": dict(report.about), "results": results}


def save(report: QualityReport, folder: Path) -> list[Path]:
    """Write quality.json, quality.md and quality.png."""
    return write("quality", folder, as_json(report), markdown(report), partial(plot, report))


def plot(report: QualityReport, path: Path) -> None:
    """Distance from the reference against context length: a line a method, named at its right end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(9, 6.5), layout="constrained")
    methods = [method for method in report.methods if method != REFERENCE]
    lines = {method: [report.difference(method, length)[0] for length in report.lengths] for method in methods}
    ends = []
    for i, (method, line) in enumerate(lines.items()):
        colour = f"C{i % 10}"
        panel.plot(report.lengths, line, marker="o", markersize=4, color=colour, linestyle="-" if i < 10 else "--")
        above = f" ({line[-1]:+.2f}, above the plot)" if line[-1] > CROWDED else f" {line[-1]:+.3f}"
        height = min(line[-1], CROWDED + 1e-6 * line[-1])  # what is above the plot is named in its order
        ends.append((height, f"{method}{above}", colour))
    everything = [min(value, CROWDED) for line in lines.values() for value in line]
    margin = 0.08 * (max(everything) - min(everything)) or 0.1
    low, high = min(everything) - margin, max(everything) + margin
    panel.set_ylim(low, high)
    heights = spaced([height for height, _, _ in ends], 0.035 * (high - low))
    for height, (_, label, colour) in zip(heights, ends, strict=True):
        panel.annotate(
            label,
            (report.lengths[-1], height),
            (9, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
    _dress(panel, report)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def _dress(panel: Any, report: QualityReport) -> None:
    trained = report.about["train_length"]
    if report.lengths[0] <= trained <= report.lengths[-1]:
        panel.axvline(trained, color="0.7", linestyle=":", zorder=0)
        panel.annotate("trained length", (trained, 1), (4, -10), xycoords=("data", "axes fraction"),
                       textcoords="offset points", color="0.5", fontsize=8)  # fmt: skip
    if len(report.lengths) > 1:
        panel.set_xscale("log", base=2)
    panel.set_xticks(report.lengths, [f"{length:,}" for length in report.lengths])
    panel.minorticks_off()
    panel.set_xlabel("tokens of context")
    panel.set_ylabel("loss minus that of rope with the trained context, nats a token")
    panel.set_title(f"{report.about['model']}: {report.about['last']:,} tokens at the end of each context", loc="left")
    panel.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    panel.spines[["top", "right"]].set_visible(False)


def spaced(heights: Sequence[float], least: float) -> list[float]:
    """The heights, in their order, moved apart so that labels at them do not overlap; each by as little as it takes."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for _ in range(100):
        moved = False
        for below, above in itertools.pairwise(order):
            overlap = least - (placed[above] - placed[below])
            if overlap > 1e-9:
                placed[below] -= overlap / 2
                placed[above] += overlap / 2
                moved = True
        if not moved:
            break
    return placed
