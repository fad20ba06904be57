"""What the extrapolation measurement looks like: tables as Su has them, markdown, JSON and a plot. Measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.extrapolation_rows import EXTENSION, SU_TRAIN_LENGTH, SU_TRAINED, Row, tables
from bench.quality_report import spaced
from bench.report import markdown, print_table, write

LINES = ("Baseline", "PI-RoPE", "NTK-RoPE-mixed", "YaRN", "ReRoPE-w{half}", "dynamic_leaky-w{half}", "HFWA")
BARS = (
    *("Baseline", "PI-RoPE", "NTK-RoPE-old", "NTK-RoPE-fixed", "NTK-RoPE-mixed", "YaRN", "Self-Extend-w{half}"),
    *("ReRoPE-w{half}", "ReRoPE-w{half}-log n†", "ReRoPE-w{half}-log n", "Leaky ReRoPE-w{half}-k16-log n"),
    *("dynamic_leaky-w{half}", "dynamic_leaky-w{half}-log n", "HFWA"),
)


@dataclass(frozen=True, slots=True)
class ExtrapolationReport:
    """What is known so far: `seeds` holds one results file's content a seed, in `about["seeds"]`'s order."""

    train_length: int
    seeds: Sequence[Mapping[str, Any]]
    about: Mapping[str, Any]

    def figures(self, label: str, text: str) -> list[float]:
        """Accuracy in % over the whole length, one a seed that has been measured."""
        return [
            100 * statistics.fmean(seed["rows"][label][text]) for seed in self.seeds if label in seed.get("rows", {})
        ]

    def trained(self, variant: str) -> list[float]:
        """Accuracy in % at the trained length."""
        return [100 * seed["trained"][variant] for seed in self.seeds if variant in seed.get("trained", {})]

    def by_position(self, label: str, text: str) -> list[float]:
        """Accuracy in % in each stretch of N tokens, mean over the seeds; empty where nothing is measured."""
        found = [seed["rows"][label][text] for seed in self.seeds if label in seed.get("rows", {})]
        return [100 * statistics.fmean(column) for column in zip(*found, strict=True)]

    def of_fewer_seeds(self) -> list[str]:
        """Labels of the rows that some seed has and another has not."""
        known = [set(seed.get("rows", {})) for seed in self.seeds]
        return sorted(set().union(*known) - set.intersection(*known)) if known else []

    def sections(self) -> list[Section]:
        return [Section(self, title, rows) for title, rows in tables(self.train_length).items()]


@dataclass(frozen=True, slots=True)
class Section:
    """One table of the report."""

    report: ExtrapolationReport
    title: str
    listed: Sequence[Row]

    def headings(self) -> list[str]:
        n, long = self.report.train_length, self.report.train_length * EXTENSION
        su_long = SU_TRAIN_LENGTH * EXTENSION
        ours = [self.title, f"{n} (trained)", f"{long} repeated", f"{long} not repeated"]
        return [*ours, f"Su: {SU_TRAIN_LENGTH}", f"{su_long} repeated", f"{su_long} not repeated"]

    def rows(self) -> list[list[str]]:
        return [
            [
                row.label,
                shown(self.report.trained(row.variant)),
                *(shown(self.report.figures(row.label, text)) for text in ("repeated", "plain")),
                *(f"{figure:.2f}" if figure is not None else "–" for figure in _su(row)),
            ]
            for row in self.listed
        ]

    def notes(self) -> list[str]:
        return []


def _su(row: Row) -> tuple[float | None, ...]:
    return (None, None, None) if row.su is None else (SU_TRAINED[row.variant], *row.su)


def shown(values: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    if not values:
        return "–"
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def notes(report: ExtrapolationReport) -> list[str]:
    about, n = report.about, report.train_length
    counting = [seed["baselines"] for seed in report.seeds if "baselines" in seed]
    size = f"{about['layers']} layers, width {about['width']}, {about['heads']} heads, {about['vocabulary']:,} tokens"
    lines = [
        f"Token accuracy in %, mean ± standard deviation over seeds {', '.join(map(str, about['seeds']))}. Models of "
        f"{about['parameters']:,} parameters ({size}, smeared keys), trained from scratch on {about['steps']:,} steps "
        f"of {about['batch']} × {n} tokens of the Python standard library. Tested on {about['rows']} pieces of "
        f"held-out files, each {n * EXTENSION:,} tokens long, or its first {n} tokens {EXTENSION} times. The trained "
        f"length is measured on the tokens of the not repeated text, in pieces of {n}. Run on {about['machine']}.",
        f"log n: query i times ln(i+1)/ln {n} in training and test; log n†: times max(1, ln(i+1)/ln {n}) at test time "
        f"only. Factor {EXTENSION} where a method takes one. ReRoPE-w{n} is read with a declared trained length of "
        f"{n + 1} (its log n† with ln {n + 1}), as a window of the trained length is refused otherwise. HFWA: windows "
        f"of {about['hfwa_window']} tokens in all layers but the last.",
    ]
    if unfinished := report.of_fewer_seeds():
        lines.append(f"{len(unfinished)} rows are not of all seeds yet; a figure without ± is of one seed.")
    if counting:
        unigram, bigram = (100 * counting[0][kind] for kind in ("unigram", "bigram"))
        lines.append(
            f"Counting on the training text gets {unigram:.2f} (most frequent token) and {bigram:.2f} (most frequent "
            "successor) of the same targets."
        )
    return lines


def print_report(report: ExtrapolationReport, console: Console) -> None:
    for section in report.sections():
        print_table(section, console)
    for note in notes(report):
        console.print(note, highlight=False)


def as_json(report: ExtrapolationReport) -> dict[str, Any]:
    found = [
        {"table": section.title, "row": row.label, "training": row.variant, "su": row.su}
        | {f"{text} %": report.figures(row.label, text) for text in ("repeated", "plain")}
        | {f"{text} % by position": report.by_position(row.label, text) for text in ("repeated", "plain")}
        for section in report.sections()
        for row in section.listed
    ]
    trained = {variant: report.trained(variant) for variant in SU_TRAINED}
    return {"about": dict(report.about), "notes": notes(report), "trained length %": trained, "results": found}


def save(report: ExtrapolationReport, folder: Path) -> list[Path]:
    """Write extrapolation.json, extrapolation.md and extrapolation.png."""
    parts = [*(markdown(section) for section in report.sections()), *(note + "\n" for note in notes(report))]
    text = "\n".join(part.rstrip("\n") + "\n" for part in parts)
    return write("extrapolation", folder, as_json(report), text, partial(plot, report))


def plot(report: ExtrapolationReport, path: Path) -> None:
    """Accuracy by method, and against the position in the text for some of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (bars, plain, repeated) = pyplot.subplots(
        1, 3, figsize=(17, 6), layout="constrained", width_ratios=(4, 3, 3)
    )
    half, length = report.train_length // 2, report.train_length * EXTENSION
    _bars(bars, report, [label.format(half=half) for label in BARS])
    for panel, text, title in ((plain, "plain", "not repeated"), (repeated, "repeated", "repeated")):
        _lines(panel, report, [label.format(half=half) for label in LINES], text)
        panel.set_title(f"accuracy by position, {length:,} tokens {title}", loc="left")
    for panel in (bars, plain, repeated):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def _bars(panel: Any, report: ExtrapolationReport, labels: Sequence[str]) -> None:
    known = [label for label in labels if report.figures(label, "plain")]
    for offset, text, name, colour in ((-0.2, "plain", "not repeated", "C0"), (0.2, "repeated", "repeated", "C1")):
        values = [report.figures(label, text) for label in known]
        means = [statistics.fmean(value) for value in values]
        spreads = [statistics.stdev(value) if len(value) > 1 else 0.0 for value in values]
        places = [i + offset for i in range(len(known))]
        panel.barh(places, means, 0.38, xerr=spreads, color=colour, label=name, error_kw={"elinewidth": 1})
        for place, mean, spread in zip(places, means, spreads, strict=True):
            panel.annotate(
                f"{mean:.1f}", (mean + spread, place), (3, 0), textcoords="offset points", va="center", fontsize=8
            )
    if trained := report.trained("plain"):
        panel.axvline(
            statistics.fmean(trained), color="0.5", linestyle=":", label=f"trained length, {report.train_length}"
        )
    panel.set_yticks(range(len(known)), known)
    panel.invert_yaxis()
    panel.set_xlabel("token accuracy, %")
    panel.set_title(f"trained on {report.train_length} tokens, read at {report.train_length * EXTENSION:,}", loc="left")
    panel.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.09), ncols=3)


def _lines(panel: Any, report: ExtrapolationReport, labels: Sequence[str], text: str) -> None:
    n = report.train_length
    ends = []
    for i, label in enumerate(labels):
        if found := report.by_position(label, text):
            places = [(stretch + 0.5) * n for stretch in range(len(found))]
            panel.plot(places, found, marker="o", markersize=3, color=f"C{i}")
            ends.append((found[-1], label, f"C{i}"))
    panel.axvline(n, color="0.7", linestyle=":", zorder=0)
    panel.set_xticks([n * stretch for stretch in range(0, EXTENSION + 1, 2)])
    panel.set_xlabel("position")
    low, high = panel.get_ylim()
    for height, (_, label, colour) in zip(spaced([end[0] for end in ends], 0.045 * (high - low)), ends, strict=True):
        end = (n * (EXTENSION - 0.5), height)
        panel.annotate(label, end, (7, 0), textcoords="offset points", color=colour, va="center", fontsize=8)
