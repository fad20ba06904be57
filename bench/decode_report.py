"""What a measurement of decode steps looks like: terminal table, markdown table, JSON and a plot. Measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.report import markdown, write

Rounds = dict[tuple[str, int], list[float]]  # (method, context) → ms a step, a value a round


@dataclass(frozen=True, slots=True)
class DecodeReport:
    """ms of a step by (method, context), a value a round in one order for all. The first method is the reference."""

    methods: Sequence[str]
    contexts: Sequence[int]
    rounds: Mapping[tuple[str, int], Sequence[float]]
    about: Mapping[str, Any]

    @property
    def reference(self) -> str:
        return self.methods[0]

    def milliseconds(self, method: str, context: int) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds[method, context])

    def ratio(self, method: str, context: int) -> float:
        """To the reference: the median of the rounds' ratios, for what slows a round slows both."""
        pairs = zip(self.rounds[method, context], self.rounds[self.reference, context], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    def slope(self, method: str) -> float:
        """µs a step for 1000 more tokens of context: least squares through the medians."""
        return slope(self.contexts, [self.milliseconds(method, context) for context in self.contexts])

    def slope_differences(self, method: str) -> list[float]:
        """The method's slope less the reference's, of each round."""

        def slopes(name: str) -> list[float]:
            by_round = zip(*(self.rounds[name, context] for context in self.contexts), strict=True)
            return [slope(self.contexts, values) for values in by_round]

        return [ours - theirs for ours, theirs in zip(slopes(method), slopes(self.reference), strict=True)]

    def headings(self) -> list[str]:
        times, ratios = (f"ms at {n:,}" for n in self.contexts), (f"× at {n:,}" for n in self.contexts)
        return ["method", *times, "slope", "Δ slope", *ratios]

    def rows(self) -> list[list[str]]:
        return [
            [
                method,
                *(f"{self.milliseconds(method, n):.2f}" for n in self.contexts),
                f"{self.slope(method):.0f}",
                f"{statistics.median(self.slope_differences(method)):+.0f}" if method != self.reference else "–",
                *(f"{self.ratio(method, n):.3f}" if method != self.reference else "–" for n in self.contexts),
            ]
            for method in self.methods
        ]

    def notes(self) -> list[str]:
        about, rows = self.about, self.about["rows"]
        each = "one sequence" if rows == 1 else f"{rows} sequences"
        return [
            f"{about['model']}, {about['dtype']}, trained on {about['train_length']:,} tokens: ms of a decode step of "
            f"{each} (forward and argmax, no scheduler), medians of {about['rounds']} interleaved rounds of "
            f"{about['steps']} steps, {about['threads']} thread{'s'[: about['threads'] != 1]}, {about['date']} on "
            f"{about['cpu']}.",
            f"Slope: µs a step for 1000 more tokens of context, least squares through the medians. × is the ratio to "
            f"{self.reference} and Δ slope the difference from its slope: medians over the rounds.",
            "; ".join(self._slope_note(method) for method in self.methods)
            + f". A token of context is {about['cache_bytes_per_token']:,} bytes of K and V a sequence.",
        ]

    def _slope_note(self, method: str) -> str:
        """With the rate at which that slope reads the cache; a slope of nothing or less is noise, and has none."""
        found = self.slope(method)
        num_bytes = 1000 * self.about["rows"] * self.about["cache_bytes_per_token"]
        rate = f" ({num_bytes / found / 1e3:.1f} GB/s)" if found > 0 else ""
        return f"{method} {found:.0f} µs per 1000 tokens{rate}"


def slope(contexts: Sequence[int], milliseconds: Sequence[float]) -> float:
    """µs for 1000 tokens, by least squares; 0 of a single context."""
    if len(contexts) < 2:
        return 0.0
    return 1e6 * statistics.linear_regression(contexts, milliseconds).slope


def as_json(report: DecodeReport) -> dict[str, Any]:
    results = [
        {
            "method": method,
            "slope_us_per_1000_tokens": report.slope(method),
            "slope_differences": report.slope_differences(method),
            "cells": [
                {
                    "context": context,
                    "ms": report.milliseconds(method, context),
                    "ratio": report.ratio(method, context),
                    "rounds_ms": list(report.rounds[method, context]),
                }
                for context in report.contexts
            ],
        }
        for method in report.methods
    ]
    return {"about": dict(report.about), "results": results}


def save(report: DecodeReport, folder: Path) -> list[Path]:
    """Write decode.json, decode.md and decode.png."""
    return write("decode", folder, as_json(report), markdown(report), partial(plot, report))


def plot(report: DecodeReport, path: Path) -> None:
    """ms of a step against context length, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for method in report.methods:
        line = [report.milliseconds(method, context) for context in report.contexts]
        panel.plot(report.contexts, line, marker="o", markersize=4, label=f"{method}, {report.slope(method):.0f} µs")
    panel.set_xscale("log", base=2)
    panel.set_xticks(report.contexts, [f"{context:,}" for context in report.contexts])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel("tokens of context")
    panel.set_ylabel("ms a decode step")
    rows = report.about["rows"]
    panel.set_title(f"{report.about['model']}, {rows} sequence{'s'[: rows != 1]}", loc="left")
    panel.legend(title="slope per 1000 tokens", frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
