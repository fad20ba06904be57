"""Documents read on their own: `python -m bench.reuse`.

Quality beside full attention for several numbers of tokens that are read again at their place, on loss and on tasks
whose facts lie in different documents. Or, with `--times --documents 10 --length 1500`, the time to the first token
over HTTP: cold, in another order, with one document edited, after a restart, and for each of these numbers. Seeds are
fixed; cases are the same for every variant.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prerope.rope.spec import RopeSpec
from prerope.server.models.checkpoint import resolve_checkpoint
from prerope.server.tokenizer import Tokenizer

from bench.reuse.quality import FULL, NONE, TASKS, Figures, Measured, cases, quality
from bench.reuse.times import COLD, Asked, time_to_first_token
from bench.shared import options
from bench.shared.engines import model_options, opened
from bench.shared.kept import Kept
from bench.shared.report import NOTHING, Report, Table


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("reuse", __doc__, "reuse")
    add = parser.add_argument
    model_options(parser)
    add("--rereads", type=counts_from_zero, default=[0, 8, 16, 32, 64], help="tokens read again")
    add("--cases", type=options.count, default=20, help="of each task; a quarter of them for the loss of each text")
    add("--documents", type=options.count, default=6, help="in a prompt")
    add("--length", type=options.count, default=400, help="tokens of a document")
    add("--tokens-after", type=options.count, default=400, help="of a piece of text, whose loss is measured")
    add("--text", type=Path, nargs="+", help="files of text for the loss; unset: three that Python carries")
    add("--only", choices=["loss", "tasks"], help="leave the other out")
    add("--kept", type=Path, help="file of figures that were measured before, and goes on growing")
    add("--times", action="store_true", help="measure the time to the first token instead")
    asked, console = parser.parse_args(arguments), options.console()
    if asked.times:
        tokenizer = Tokenizer.load(resolve_checkpoint(asked.model, None, console.print))
        shape = (asked.documents, asked.length, asked.rereads)
        found = asyncio.run(time_to_first_token(asked.model, tokenizer, *shape))
        data = {name: asdict(one) for name, one in found.items()}
        table = times_table(found, asked.documents, asked.length)
        report = Report("reuse-times", [table], data, lambda figure: draw_times(figure, found))
    else:
        engine, checkpoint = opened(asked, console.print, rope=RopeSpec(method="auto"), prefix_caching=True)
        measured = Measured(engine, Tokenizer.load(checkpoint), checkpoint.source)
        figures = quality(measured, asked.rereads, cases(measured.tokenizer, asked), Kept(asked.kept))
        report = Report("reuse", [quality_table(figures, asked)], figures, lambda figure: draw(figure, figures))
    report.publish(asked.out, console)
    return 0


def counts_from_zero(text: str) -> list[int]:
    return [0 if part == "0" else options.counts(part)[0] for part in text.split(",")]


def quality_table(figures: Figures, given: Any) -> Table:
    """Δ loss is paired with full attention's, case by case; ± is a standard error."""
    full, measures = figures[FULL], list(figures[FULL])
    rows = []
    for name, found in figures.items():
        cells = []
        for measure in measures:
            values = found.get(measure)
            if values is None:
                cells.append(NOTHING)
            elif measure in TASKS:
                cells.append(f"{100 * statistics.fmean(values):.0f} ± {100 * error(values):.0f}")
            else:
                delta = [one - other for one, other in zip(values, full[measure], strict=True)]
                shown = f" {statistics.fmean(delta):+.4f} ± {error(delta):.4f}" if name != FULL else ""
                cells.append(f"{statistics.fmean(values):.3f}{shown}")
        rows.append([name, *cells])
    numbers = ", ".join(f"{len(values)} of {measure}" for measure, values in full.items())
    note = (
        f"{given.documents} documents of {given.length} tokens. Tasks in percent; loss, and beside full attention's. "
    )
    return Table(["documents", *measures], rows, [note + f"Prompts: {numbers}."])


def error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def times_table(times: dict[str, Asked], num_documents: int, length: int) -> Table:
    cold = times[COLD]
    rows = [
        [name, f"{one.seconds:.2f} s", f"{cold.seconds / one.seconds:.1f}", f"{one.cpu:.1f} s", str(one.cached_tokens)]
        for name, one in times.items()
    ]
    note = (
        f"{num_documents} documents of {length} tokens over HTTP; replies are those of cold runs, token for token "
        "(where r is told: not compared)."
    )
    return Table(["request", "to the first token", "cold ÷ this", "CPU time", "tokens found"], rows, [note])


def draw(figure: Any, figures: Figures) -> None:
    figure.set_size_inches(10, 5)
    left, right = figure.subplots(1, 2)
    names = [name for name in figures if name not in (FULL, NONE)]
    for measure in figures[FULL]:
        if measure in TASKS:
            shown = [name for name in (*names, FULL) if measure in figures[name]]
            values = [[100 * one for one in figures[name][measure]] for name in shown]
            panel = right
        else:
            shown, panel = [name for name in names if measure in figures[name]], left
            full = figures[FULL][measure]
            values = [[one - other for one, other in zip(figures[n][measure], full, strict=True)] for n in shown]
        panel.errorbar(
            shown, list(map(statistics.fmean, values)), list(map(error, values)), fmt="o-", capsize=3, label=measure
        )
    left.axhline(0, color="grey", linewidth=1)
    left.set_title("loss − loss with full attention")
    right.set_title("right replies, %")
    right.set_ylim(0, 100)
    for panel in (left, right):
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08))


def draw_times(figure: Any, times: dict[str, Asked]) -> None:
    axes, names = figure.subplots(), list(times)
    for offset, (label, values) in enumerate(
        {
            "seconds to the first token": [one.seconds for one in times.values()],
            "seconds of CPU time, whole request": [one.cpu for one in times.values()],
        }.items()
    ):
        places = [place + 0.4 * offset for place in range(len(names))]
        axes.bar_label(axes.barh(places, values, height=0.38, label=label), fmt="%.1f", padding=3)
    axes.set_yticks([place + 0.2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_title("time by what was read before")
    axes.legend()


if __name__ == "__main__":
    options.run("reuse", main)
