"""What a run of tasks found: tables of score against length and depth, effective lengths, and length × depth maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bench.shared.report import NOTHING, Report, Table
from bench.tasks.families import ENDS_WITHOUT_EXAMPLE
from bench.tasks.scores import EFFECTIVE, Mean, Scores


def report(scores: Scores, about: Mapping[str, Any]) -> Report:
    tables = [by_length(scores, about), by_family(scores)]
    if scores.depths():
        tables.append(by_depth(scores))
    data = {"about": dict(about), "replies": [asdict(one) for one in scores.replies]}
    return Report("tasks", tables, data, (lambda figure: draw(scores, about, figure)) if scores.depths() else None)


def by_length(scores: Scores, about: Mapping[str, Any]) -> Table:
    """A row a method: the mean over all families."""
    rows = [
        [
            method,
            *(_cell(scores.at(method, n)) for n in scores.lengths),
            _tokens(scores.effective_length(method), scores),
        ]
        for method in scores.methods
    ]
    without = " and ".join(ENDS_WITHOUT_EXAMPLE)
    note = (
        f"{about['model']}, trained on {scores.train_length:,} tokens. Score in per cent ± standard error over "
        f"sheets, the mean of {', '.join(scores.families)}; {about['seeds']} seeds, depths {about['depths']}, "
        f"{about['shots']} few-shot examples ({without}: none). Effective: the longest length up to which no score is "
        f"below {EFFECTIVE:.0%} of that at a quarter of the trained length. {about['date']}, {about['cpu']}."
    )
    return Table(["method", *(f"{n:,}" for n in scores.lengths), "effective"], rows, [note])


def by_family(scores: Scores) -> Table:
    rows = [
        [method, family, *(_cell(scores.at(method, n, family)) for n in scores.lengths),
         _tokens(scores.effective_length(method, family), scores)]
        for method in scores.methods for family in scores.families
    ]  # fmt: skip
    return Table(["method", "task", *(f"{n:,}" for n in scores.lengths), "effective"], rows, left=(0, 1))


def by_depth(scores: Scores) -> Table:
    """Of the families that ask for facts at a depth."""
    rows = []
    for method in scores.methods:
        for depth in scores.depths():
            cells = [_cell(_at_depth(scores, method, n, depth)) for n in scores.lengths]
            rows.append([method, f"{depth:.2f}", *cells])
    return Table(["method", "depth", *(f"{n:,}" for n in scores.lengths)], rows)


def _at_depth(scores: Scores, method: str, length: int, depth: float) -> Mean | None:
    return scores.mean(lambda one: one.method == method and one.length == length and one.depth == depth)


def _cell(found: Mean | None) -> str:
    return NOTHING if found is None else str(found)


def _tokens(length: int | None, scores: Scores) -> str:
    """The longest that was measured may not be the longest there is."""
    if length is None:
        return NOTHING
    return f"≥ {length:,}" if length == max(scores.lengths) else f"{length:,}"


def draw(scores: Scores, about: Mapping[str, Any], figure: Any) -> None:
    """A map a method: lengths across, depths down, green where the fact was found and red where not."""
    methods, lengths, depths = scores.methods, scores.lengths, scores.depths()
    columns = min(3, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure.set_size_inches(1.4 + columns * (0.8 + 0.55 * len(lengths)), 0.8 + rows * (0.9 + 0.24 * len(depths)))
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for panel, method in zip(panels.flat, methods, strict=False):
        found = [[_at_depth(scores, method, n, depth) for n in lengths] for depth in depths]
        values = [[math.nan if cell is None else 100 * cell.value for cell in row] for row in found]
        image = panel.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        panel.set_title(method, fontsize=9)
        panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45, fontsize=7)
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
        inside = sum(n <= scores.train_length for n in lengths)
        if 0 < inside < len(lengths):
            panel.axvline(inside - 0.5, color="0.2", linestyle=":", linewidth=1)
    for panel in list(panels.flat)[len(methods) :]:
        panel.set_axis_off()
    figure.supxlabel("tokens of the prompt (dotted: the trained length)", fontsize=8)
    figure.supylabel("depth of the fact", fontsize=8)
    figure.suptitle(f"{about['model']}: facts found, per cent", fontsize=10)
    figure.colorbar(image, ax=panels, shrink=0.8)
