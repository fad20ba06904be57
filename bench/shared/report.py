"""The one writer of reports: tables for the terminal and for RESULTS.md, the figures as JSON, and a plot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

NOTHING = "–"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.titlelocation": "left"}


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as they are shown, notes below them. `left`: the columns that are words; the first always is."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    left: Sequence[int] = (0,)

    def markdown(self) -> str:
        """A part of a section of RESULTS.md."""
        rules = ["---" if i in self.left else "---:" for i in range(len(self.headings))]
        cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in self.rows)
        lines = ["| " + " | ".join(self.headings) + " |", "|" + "|".join(rules) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in cells]
        return "\n\n".join(["\n".join(lines), *filter(None, self.notes)]) + "\n"

    def show(self, console: Console) -> None:
        console.print(Markdown(self.markdown()))


@dataclass(frozen=True, slots=True)
class Report:
    """What a measurement found. `draw` is given an empty matplotlib figure; without it there is no plot."""

    name: str
    tables: Sequence[Table]
    data: Mapping[str, Any]
    draw: Callable[[Any], None] | None = None

    def save(self, folder: Path) -> list[Path]:
        """NAME.json, NAME.md and NAME.png; their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        data, text, plot = (folder / f"{self.name}.{suffix}" for suffix in ("json", "md", "png"))
        data.write_text(json.dumps(self.data, indent=1, default=str) + "\n", encoding="utf-8")
        text.write_text("\n".join(table.markdown() for table in self.tables), encoding="utf-8")
        if self.draw is None:
            return [data, text]
        import matplotlib as mpl
        from matplotlib.figure import Figure

        with mpl.rc_context(STYLE):
            figure = Figure(layout="constrained")
            self.draw(figure)
            figure.savefig(plot, dpi=150, bbox_inches="tight")
        return [data, text, plot]

    def publish(self, folder: Path, console: Console) -> None:
        """Show the tables, write the files and say which."""
        for table in self.tables:
            table.show(console)
        for path in self.save(folder):
            console.print(f"wrote {path.name} in {folder.name}/")


@dataclass(frozen=True, slots=True)
class Target:
    """A figure to reach; one that is missed is told and fails nothing. found: by case, of which the worst counts."""

    name: str
    limit: float
    at_least: bool
    found: Mapping[str, float] = field(default_factory=dict)
    form: str = "{:.2f}"

    @property
    def worst(self) -> str | None:
        return (min if self.at_least else max)(self.found, key=self.found.__getitem__) if self.found else None

    @property
    def verdict(self) -> str:
        if self.worst is None:
            return "not measured"
        value = self.found[self.worst]
        return "reached" if (value >= self.limit if self.at_least else value <= self.limit) else "missed"

    def row(self) -> list[str]:
        wanted = ("≥ " if self.at_least else "≤ ") + self.form.format(self.limit)
        found = NOTHING if self.worst is None else self.form.format(self.found[self.worst])
        return [self.name, wanted, found, self.worst or NOTHING, self.verdict]


def told(error: BaseException) -> str:
    """In a cell or a note."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def counted(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number:,} {noun}{'s'[: number != 1]}"


def target_data(targets: Sequence[Target]) -> list[dict[str, Any]]:
    return [asdict(target) | {"verdict": target.verdict} for target in targets]


def target_table(targets: Sequence[Target]) -> Table:
    verdicts = Counter(target.verdict for target in targets)
    note = "Targets: " + ", ".join(f"{verdicts[name]} {name}" for name in ("reached", "missed", "not measured"))
    return Table(["target", "wanted", "found", "worst case", "verdict"], [target.row() for target in targets], [note])


def plain_log_axis(panel: Any) -> None:
    """A logarithmic y axis with plain numbers."""
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")


def context_axis(panel: Any, contexts: Sequence[int]) -> None:
    """An x axis of context lengths, in powers of two."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
    panel.minorticks_off()
    panel.set_xlabel("tokens of context")
