"""Documents read on their own: `python -m bench.reuse`.

Quality beside full attention for several numbers of tokens that are read again at their place, on loss and on tasks
whose facts lie in different documents; and with --times the time to the first token, cold, in another order, with one
document edited. Seeds are fixed; cases are the same for every variant.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

from prerope.rope.spec import RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.engine.engine import Engine
from prerope.server.models.checkpoint import resolve_checkpoint
from prerope.server.tokenizer import Tokenizer
from tqdm import tqdm

from bench.reuse.quality import FULL, NONE, TASKS, Case, Measured, loss_cases, variants
from bench.reuse.times import time_to_first_token
from bench.shared.options import console, count, counts, parser, run
from bench.shared.report import Report, Table


def main(arguments: Sequence[str] | None) -> int:
    options = parser("reuse", __doc__, "reuse")
    options.add_argument("--model", help="folder, hub id or .gguf file; unset: the embedded model")
    options.add_argument("--rereads", type=counts_from_zero, default=[0, 8, 16, 32, 64], help="tokens read again")
    options.add_argument("--cases", type=count, default=20, help="of each task; a quarter of them for loss")
    options.add_argument("--documents", type=count, default=6, help="in a prompt")
    options.add_argument("--length", type=count, default=400, help="tokens of a document")
    options.add_argument("--times", action="store_true", help="measure the time to the first token too")
    given = options.parse_args(arguments)
    screen = console()
    checkpoint = resolve_checkpoint(given.model, None, screen.print)
    engine = Engine.load(checkpoint, EngineConfig(rope=RopeSpec(method="auto")), screen.print)
    measured = Measured(engine, Tokenizer.load(checkpoint))
    figures = quality(measured, given.rereads, given.cases, given.documents, given.length)
    tables = [quality_table(figures, given)]
    data: dict[str, Any] = {"quality": figures}
    if given.times:
        data["times"] = time_to_first_token(engine, measured.tokenizer)
        tables.append(times_table(data["times"]))
    report = Report("reuse", tables, data, lambda figure: draw(figure, figures))
    for table in tables:
        table.show(screen)
    screen.print(*report.save(given.out), sep="\n")
    return 0


def counts_from_zero(text: str) -> list[int]:
    return [0 if part == "0" else counts(part)[0] for part in text.split(",")]


def quality(
    measured: Measured, rereads: Sequence[int], num_cases: int, num_documents: int, length: int
) -> dict[str, dict[str, list[float]]]:
    """variant → measure → one figure a case."""
    tokenizer, figures = measured.tokenizer, dict[str, dict[str, list[float]]]()
    losses = list(loss_cases(tokenizer, max(1, num_cases // 4), num_documents, length, 400))
    tasks = {
        name: [make(tokenizer, random.Random(seed), num_documents, length) for seed in range(num_cases)]
        for name, make in TASKS.items()
    }
    kinds = {**variants(rereads), NONE: None}
    with tqdm(total=len(kinds) * len(losses) + (len(kinds) - 1) * num_cases * len(tasks), unit="case") as bar:
        for name, reread in kinds.items():
            found = figures[name] = {"loss": []}
            for case in losses:
                shown = Case([], case.rest) if name == NONE else case
                found["loss"].append(measured.loss(shown, reread))
                bar.update()
            for task, cases in tasks.items() if name != NONE else ():
                found[task] = []
                for case in cases:
                    found[task].append(measured.is_right(case, reread))
                    bar.update()
    return figures


def quality_table(figures: dict[str, dict[str, list[float]]], given: Any) -> Table:
    """Δ loss is paired with full attention's, case by case; ± is a standard error."""
    full = figures[FULL]
    rows = []
    for name, found in figures.items():
        delta = [one - other for one, other in zip(found["loss"], full["loss"], strict=True)]
        cells = [f"{statistics.fmean(found['loss']):.3f}", f"{statistics.fmean(delta):+.4f} ± {error(delta):.4f}"]
        cells += [
            f"{100 * statistics.fmean(found[task]):.0f} ± {100 * error(found[task]):.0f}" if task in found else "–"
            for task in TASKS
        ]
        rows.append([name, *cells])
    note = f"{given.documents} documents of {given.length} tokens; tasks in percent of {given.cases} prompts."
    return Table(["documents", "loss", "Δ loss", *TASKS], rows, [note])


def error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def times_table(times: dict[str, float]) -> Table:
    rows = [[name, f"{seconds:.2f} s", f"{times['cold'] / seconds:.1f}"] for name, seconds in times.items()]
    return Table(["request", "to the first token", "cold ÷ this"], rows)


def draw(figure: Any, figures: dict[str, dict[str, list[float]]]) -> None:
    left, right = figure.subplots(1, 2)
    names = [name for name in figures if name not in (FULL, NONE)]
    deltas = [[a - b for a, b in zip(figures[n]["loss"], figures[FULL]["loss"], strict=True)] for n in names]
    left.errorbar(names, [statistics.fmean(d) for d in deltas], [error(d) for d in deltas], fmt="o", capsize=3)
    left.axhline(0, color="grey", linewidth=1)
    left.set_title("loss − loss with full attention")
    for task in TASKS:
        shown = [FULL, *names]
        right.errorbar(
            shown,
            [100 * statistics.fmean(figures[n][task]) for n in shown],
            [100 * error(figures[n][task]) for n in shown],
            fmt="o-",
            capsize=3,
            label=task,
        )
    right.set_title("right replies, %")
    right.tick_params(axis="x", rotation=30)
    left.tick_params(axis="x", rotation=30)
    right.legend()


if __name__ == "__main__":
    run("reuse", main)
