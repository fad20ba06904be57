"""What a quality measurement found: losses, and their distance from rope with no more context than was trained."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.shared.report import Report, Table, context_axis

Losses = dict[tuple[str, int], list[float]]  # (method, context length) → a loss a document, always in one order

REFERENCE = "rope, trained length"
"""The row that all others are compared with: rope with no more context than the model was trained on."""

CROWDED = 0.5  # nats above the reference: the plot leaves out what lies higher, or the rest would be one line


@dataclass(frozen=True, slots=True)
class Quality:
    """Losses in nats a token. `REFERENCE` is the first of the methods."""

    methods: Sequence[str]
    lengths: Sequence[int]
    losses: Mapping[tuple[str, int], Sequence[float]]
    about: Mapping[str, Any]

    def differences(self, method: str, length: int) -> list[float]:
        """From the reference on the same tokens: documents differ far more than methods do."""
        pairs = zip(self.losses[method, length], self.losses[REFERENCE, length], strict=True)
        return [ours - theirs for ours, theirs in pairs]

    def row(self, method: str) -> list[str]:
        losses = [_mean(self.losses[method, n], ".3f") for n in self.lengths]
        return [method, *losses, *(_mean(self.differences(method, n), "+.3f") for n in self.lengths)]

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


def _mean(values: Sequence[float], form: str) -> str:
    """With the standard deviation over the documents; one has none."""
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def report(found: Quality) -> Report:
    headings = ["method", *(f"loss at {n:,}" for n in found.lengths), *(f"Δ at {n:,}" for n in found.lengths)]
    table = Table(headings, [found.row(method) for method in found.methods], found.notes())
    results = [{"method": method, "length": n, "losses": list(losses)} for (method, n), losses in found.losses.items()]
    data = {"about": dict(found.about), "results": results}
    return Report("quality", [table], data, lambda figure: draw(found, figure))


def draw(found: Quality, figure: Any) -> None:
    """Distance from the reference against context length, a line a method; what lies far above is cut off."""
    figure.set_size_inches(9, 6.5)
    panel = figure.subplots()
    for i, method in enumerate(name for name in found.methods if name != REFERENCE):
        line = [statistics.fmean(found.differences(method, n)) for n in found.lengths]
        seen = [value if value <= CROWDED else math.nan for value in line]
        style = "-" if i < 10 else "--"
        panel.plot(found.lengths, seen, style, marker="o", markersize=4, label=f"{method} {line[-1]:+.3f}")
    panel.axvline(found.about["train_length"], color="0.7", linestyle=":", label="trained length")
    context_axis(panel, found.lengths)
    panel.set_ylabel("loss minus that of rope with the trained context, nats a token")
    panel.set_title(f"{found.about['model']}: {found.about['last']:,} tokens at the end of each context")
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
