"""What the extrapolation measurement found: tables as Su has them, and accuracy by method and by position."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.extrapolation.rows import EXTENSION, SU_TRAIN_LENGTH, SU_TRAINED, Row, tables
from bench.shared.report import NOTHING, Report, Table, label_ends

LINES = ("Baseline", "PI-RoPE", "NTK-RoPE-mixed", "YaRN", "ReRoPE-w{half}", "dynamic_leaky-w{half}", "HFWA")
BARS = (
    *("Baseline", "PI-RoPE", "NTK-RoPE-old", "NTK-RoPE-fixed", "NTK-RoPE-mixed", "YaRN", "Self-Extend-w{half}"),
    *("ReRoPE-w{half}", "ReRoPE-w{half}-log n†", "ReRoPE-w{half}-log n", "Leaky ReRoPE-w{half}-k16-log n"),
    *("dynamic_leaky-w{half}", "dynamic_leaky-w{half}-log n", "HFWA"),
)


@dataclass(frozen=True, slots=True)
class Extrapolated:
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

    def table(self, title: str, rows: Sequence[Row]) -> Table:
        n, long, su_long = self.train_length, self.train_length * EXTENSION, SU_TRAIN_LENGTH * EXTENSION
        ours = [title, f"{n} (trained)", f"{long} repeated", f"{long} not repeated"]
        headings = [*ours, f"Su: {SU_TRAIN_LENGTH}", f"{su_long} repeated", f"{su_long} not repeated"]
        return Table(headings, [self._row(row) for row in rows])

    def _row(self, row: Row) -> list[str]:
        ours = [self.trained(row.variant), *(self.figures(row.label, text) for text in ("repeated", "plain"))]
        su = [NOTHING] * 3 if row.su is None else [f"{figure:.2f}" for figure in (SU_TRAINED[row.variant], *row.su)]
        return [row.label, *map(shown, ours), *su]


def shown(values: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    if not values:
        return NOTHING
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def notes(found: Extrapolated) -> list[str]:
    about, n = found.about, found.train_length
    counting = [seed["baselines"] for seed in found.seeds if "baselines" in seed]
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
    if unfinished := found.of_fewer_seeds():
        lines.append(f"{len(unfinished)} rows are not of all seeds yet; a figure without ± is of one seed.")
    if counting:
        unigram, bigram = (100 * counting[0][kind] for kind in ("unigram", "bigram"))
        lines.append(
            f"Counting on the training text gets {unigram:.2f} (most frequent token) and {bigram:.2f} (most frequent "
            "successor) of the same targets."
        )
    return lines


def report(found: Extrapolated) -> Report:
    listed = tables(found.train_length)
    rows = [
        {"table": title, "row": row.label, "training": row.variant, "su": row.su}
        | {f"{text} %": found.figures(row.label, text) for text in ("repeated", "plain")}
        | {f"{text} % by position": found.by_position(row.label, text) for text in ("repeated", "plain")}
        for title, rows in listed.items()
        for row in rows
    ]
    trained = {variant: found.trained(variant) for variant in SU_TRAINED}
    shown_tables = [found.table(title, rows) for title, rows in listed.items()]
    shown_tables[-1] = replace(shown_tables[-1], notes=notes(found))
    data = {"about": dict(found.about), "notes": notes(found), "trained length %": trained, "results": rows}
    return Report("extrapolation", shown_tables, data, lambda figure: draw(found, figure))


def draw(found: Extrapolated, figure: Any) -> None:
    """Accuracy by method, and against the position in the text for some of them."""
    figure.set_size_inches(17, 6)
    bars, plain, repeated = figure.subplots(1, 3, width_ratios=(4, 3, 3))
    half, length = found.train_length // 2, found.train_length * EXTENSION
    _bars(bars, found, [label.format(half=half) for label in BARS])
    for panel, text, title in ((plain, "plain", "not repeated"), (repeated, "repeated", "repeated")):
        _lines(panel, found, [label.format(half=half) for label in LINES], text)
        panel.set_title(f"accuracy by position, {length:,} tokens {title}")


def _bars(panel: Any, found: Extrapolated, labels: Sequence[str]) -> None:
    known = [label for label in labels if found.figures(label, "plain")]
    for offset, text, name, colour in ((-0.2, "plain", "not repeated", "C0"), (0.2, "repeated", "repeated", "C1")):
        values = [found.figures(label, text) for label in known]
        means = [statistics.fmean(value) for value in values]
        spreads = [statistics.stdev(value) if len(value) > 1 else 0.0 for value in values]
        places = [i + offset for i in range(len(known))]
        bars = panel.barh(places, means, 0.38, xerr=spreads, color=colour, label=name, error_kw={"elinewidth": 1})
        panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    if trained := found.trained("plain"):
        label = f"trained length, {found.train_length}"
        panel.axvline(statistics.fmean(trained), color="0.5", linestyle=":", label=label)
    panel.set_yticks(range(len(known)), known)
    panel.invert_yaxis()
    panel.set_xlabel("token accuracy, %")
    panel.set_title(f"trained on {found.train_length} tokens, read at {found.train_length * EXTENSION:,}")
    panel.legend(loc="upper center", bbox_to_anchor=(0.4, -0.09), ncols=3)


def _lines(panel: Any, found: Extrapolated, labels: Sequence[str], text: str) -> None:
    n, ends = found.train_length, []
    for i, label in enumerate(labels):
        if line := found.by_position(label, text):
            places = [(stretch + 0.5) * n for stretch in range(len(line))]
            panel.plot(places, line, marker="o", markersize=3, color=f"C{i}")
            ends.append((line[-1], label, f"C{i}"))
    panel.axvline(n, color="0.7", linestyle=":", zorder=0)
    panel.set_xticks([n * stretch for stretch in range(0, EXTENSION + 1, 2)])
    panel.set_xlabel("position")
    label_ends(panel, n * (EXTENSION - 0.5), ends, 0.045)
