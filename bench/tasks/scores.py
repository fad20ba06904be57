"""Scores of replies, their means with standard errors, the effective length of a method, and tables of these.

Which method does the most tasks is chosen on half of the seeds and reported on the others.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prerope.rope.spec import RopeSpec

from bench.shared.choice import AUTO, Choice
from bench.shared.options import Method
from bench.shared.report import NOTHING, Report, Table
from bench.tasks.families import ENDS_WITHOUT_EXAMPLE

EFFECTIVE = 0.85
"""A length counts as read while the score there is at least this share of that at a quarter of the trained length."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One reply. sheet: what stands for the text that it was asked of; replies about one sheet go together."""

    method: str
    family: str
    length: int
    seed: int
    depth: float | None
    sheet: str
    score: float


@dataclass(frozen=True, slots=True)
class Mean:
    """With its standard error; None where there is one sheet a family."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{100 * self.value:.0f}" + ("" if self.error is None else f" ± {100 * self.error:.0f}")


def mean(scored: Iterable[Scored]) -> Mean | None:
    """The mean over families of the mean over sheets of the mean over a sheet's questions: each family counts once."""
    sheets: dict[tuple[str, str], list[float]] = defaultdict(list)
    for one in scored:
        sheets[one.family, one.sheet].append(one.score)
    families: dict[str, list[float]] = defaultdict(list)
    for (family, _), scores in sheets.items():
        families[family].append(statistics.fmean(scores))
    if not families:
        return None
    value = statistics.fmean(statistics.fmean(of_sheets) for of_sheets in families.values())
    if any(len(of_sheets) < 2 for of_sheets in families.values()):
        return Mean(value, None)
    variance = sum(statistics.variance(of_sheets) / len(of_sheets) for of_sheets in families.values())
    return Mean(value, math.sqrt(variance) / len(families))


@dataclass(slots=True)
class Scores:
    """All replies of a run."""

    methods: Sequence[str]
    families: Sequence[str]
    lengths: Sequence[int]
    train_length: int
    replies: list[Scored] = field(default_factory=list)

    def mean(self, keep: Callable[[Scored], bool]) -> Mean | None:
        return mean(one for one in self.replies if keep(one))

    def at(self, method: str, length: int, family: str | None = None) -> Mean | None:
        """Over all families, or of one."""
        return self.mean(lambda s: s.method == method and s.length == length and family in (None, s.family))

    def at_depth(self, method: str, length: int, depth: float) -> Mean | None:
        return self.mean(lambda one: (one.method, one.length, one.depth) == (method, length, depth))

    def depths(self) -> list[float]:
        return sorted({one.depth for one in self.replies if one.depth is not None})

    def effective_length(self, method: str, family: str | None = None) -> int | None:
        """The longest length up to which no score is below `EFFECTIVE` of that at a quarter of the trained length.

        None where the quarter was not measured, or nothing is scored there.
        """
        quarter = self.at(method, self.train_length // 4, family)
        if quarter is None or quarter.value == 0:
            return None
        longest = self.train_length // 4
        for length in sorted(n for n in self.lengths if n >= self.train_length // 4):
            found = self.at(method, length, family)
            if found is None or found.value < EFFECTIVE * quarter.value:
                break
            longest = length
        return longest


def report(scores: Scores, about: Mapping[str, Any]) -> Report:
    tables = [by_length(scores, about), by_family(scores)]
    if scores.depths():
        tables.append(by_depth(scores))
    data = {"about": dict(about), "replies": [asdict(one) for one in scores.replies]}
    return Report("tasks", tables, data, (lambda figure: draw(scores, about, figure)) if scores.depths() else None)


def by_length(scores: Scores, about: Mapping[str, Any]) -> Table:
    """A row a method: the mean over all families."""
    without = " and ".join(ENDS_WITHOUT_EXAMPLE)
    note = (
        f"{about['model']}, trained on {scores.train_length:,} tokens. Score in per cent ± standard error over "
        f"sheets, the mean of {', '.join(scores.families)}; {about['seeds']} seeds, depths {about['depths']}, "
        f"{about['shots']} few-shot examples ({without}: none). Effective: the longest length up to which no score is "
        f"below {EFFECTIVE:.0%} of that at a quarter of the trained length. {about['date']}, {about['cpu']}."
    )
    rows = [[method, *_cells(scores, method)] for method in scores.methods]
    return Table(["method", *(f"{n:,}" for n in scores.lengths), "effective"], rows, [note])


def by_family(scores: Scores) -> Table:
    rows = [[method, name, *_cells(scores, method, name)] for method in scores.methods for name in scores.families]
    return Table(["method", "task", *(f"{n:,}" for n in scores.lengths), "effective"], rows, left=(0, 1))


def _cells(scores: Scores, method: str, family: str | None = None) -> list[str]:
    """A score a length, and the effective length; the longest that was measured may not be the longest there is."""
    effective = scores.effective_length(method, family)
    most = "≥ " if effective == max(scores.lengths) else ""
    told = NOTHING if effective is None else f"{most}{effective:,}"
    return [*(str(scores.at(method, n, family) or NOTHING) for n in scores.lengths), told]


def by_depth(scores: Scores) -> Table:
    """Of the families that ask for facts at a depth."""
    rows = [
        [method, f"{depth:.2f}", *(str(scores.at_depth(method, n, depth) or NOTHING) for n in scores.lengths)]
        for method in scores.methods
        for depth in scores.depths()
    ]
    return Table(["method", "depth", *(f"{n:,}" for n in scores.lengths)], rows)


def draw(scores: Scores, about: Mapping[str, Any], figure: Any) -> None:
    """A map a method: lengths across, depths down, green where the fact was found and red where not."""
    methods, lengths, depths = scores.methods, scores.lengths, scores.depths()
    columns = min(3, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure.set_size_inches(1.4 + columns * (0.8 + 0.55 * len(lengths)), 0.8 + rows * (0.9 + 0.24 * len(depths)))
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for panel, method in zip(panels.flat, methods, strict=False):
        found = [[scores.at_depth(method, n, depth) for n in lengths] for depth in depths]
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


def choose(scores: Scores, methods: Sequence[Method], num_seeds: int) -> Choice:
    """`auto` is one of the methods; the first half of the seeds is searched. A tie goes to `auto`."""

    def found(spec: RopeSpec, seeds: range) -> Mean:
        mean = scores.mean(lambda one: one.method == labels[spec] and one.seed in seeds)
        assert mean is not None, "every method was asked with every seed"
        return mean

    labels = {method.spec: method.label for method in methods}
    searched, held_out = range(num_seeds // 2), range(num_seeds // 2, num_seeds)
    tried = [(spec, found(spec, searched)) for spec in labels]
    tried.sort(key=lambda pair: (-pair[1].value, pair[0] != AUTO))
    ours, auto = found(tried[0][0], held_out), found(AUTO, held_out)
    gain, shown = ours.value - auto.value, [(spec, str(mean)) for spec, mean in tried]
    return Choice(shown, str(ours), str(auto), gain, f"{100 * gain:+.0f} points", ours.error or 0.0)
