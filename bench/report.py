"""What reports share: a terminal table, a markdown table, and the three files that each leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.table import Table


class Tabular(Protocol):
    """What can be printed: the first column names a row."""

    def headings(self) -> list[str]: ...
    def rows(self) -> list[list[str]]: ...
    def notes(self) -> list[str]: ...


Shown = TypeVar("Shown", bound=Tabular)


def print_table(report: Tabular, console: Console) -> None:
    table = Table(header_style="bold")
    for i, heading in enumerate(report.headings()):
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    for row in report.rows():
        table.add_row(*row)
    console.print(table)
    for note in report.notes():
        console.print(note, highlight=False)


def publish(report: Shown, save: Callable[[Shown, Path], list[Path]], folder: Path, console: Console) -> None:
    """Print the table, write the files and say which."""
    print_table(report, console)
    for path in save(report, folder):
        console.print(f"wrote {path.name} in {folder.name}/", highlight=False)


def markdown(report: Tabular) -> str:
    """A section for RESULTS.md."""
    headings = report.headings()
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in report.rows()]
    return "\n".join(lines) + "\n\n" + "\n\n".join(report.notes()) + "\n"


def write(name: str, folder: Path, data: Mapping[str, Any], text: str, plot: Callable[[Path], None]) -> list[Path]:
    """NAME.json of `data`, NAME.md of `text` and NAME.png, which `plot` draws; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
    paths[0].write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(text, encoding="utf-8")
    plot(paths[2])
    return paths
