"""Documents read on their own: `python -m bench.reuse`.

Quality beside full attention for several numbers of tokens that are read again at their place, on loss and on tasks
whose facts lie in different documents. Or, with `--times --documents 10 --length 1500`, the time to the first token
over HTTP: cold, in another order, with one document edited, after a restart. Seeds are fixed; cases are the same for
every variant.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prerope.rope.spec import RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.engine.loading import load_engine
from prerope.server.models.checkpoint import Checkpoint, resolve_checkpoint
from prerope.server.tokenizer import Tokenizer
from tqdm import tqdm

from bench.reuse.quality import FULL, LOSS, NONE, TASKS, Case, Measured, loss_cases, texts, variants
from bench.reuse.times import COLD, Asked, time_to_first_token
from bench.shared.kept import Kept, key_of
from bench.shared.options import console, count, counts, parser, run
from bench.shared.report import NOTHING, Report, Table

Figures = dict[str, dict[str, list[float]]]
"""Variant → measure → one figure a case."""


def main(arguments: Sequence[str] | None) -> int:
    options = parser("reuse", __doc__, "reuse")
    options.add_argument("--model", help="folder, hub id or .gguf file; unset: the embedded model")
    options.add_argument("--rereads", type=counts_from_zero, default=[0, 8, 16, 32, 64], help="tokens read again")
    options.add_argument(
        "--cases", type=count, default=20, help="of each task; a quarter of them for the loss of each text"
    )
    options.add_argument("--documents", type=count, default=6, help="in a prompt")
    options.add_argument("--length", type=count, default=400, help="tokens of a document")
    options.add_argument("--kept", type=Path, help="file of figures that were measured before, and goes on growing")
    options.add_argument("--times", action="store_true", help="measure the time to the first token instead")
    given = options.parse_args(arguments)
    screen = console()
    checkpoint = resolve_checkpoint(given.model, None, screen.print)
    tokenizer = Tokenizer.load(checkpoint)
    report = times(given, tokenizer) if given.times else quality_report(given, checkpoint, tokenizer, screen.print)
    for table in report.tables:
        table.show(screen)
    screen.print(*report.save(given.out), sep="\n")
    return 0


def times(given: Any, tokenizer: Tokenizer) -> Report:
    """Time to the first token."""
    found = asyncio.run(time_to_first_token(given.model, tokenizer, given.documents, given.length))
    data = {name: asdict(one) for name, one in found.items()}
    return Report("reuse-times", [times_table(found, given.documents, given.length)], data)


def quality_report(given: Any, checkpoint: Checkpoint, tokenizer: Tokenizer, say: Callable[[str], None]) -> Report:
    engine = load_engine(checkpoint, EngineConfig(rope=RopeSpec(method="auto")), say)
    tests = cases(tokenizer, given.cases, given.documents, given.length)
    figures = quality(
        Measured(engine, tokenizer), given.rereads, tests, None if given.kept is None else Kept(given.kept)
    )
    return Report("reuse", [quality_table(figures, given)], figures, lambda figure: draw(figure, figures))


def counts_from_zero(text: str) -> list[int]:
    return [0 if part == "0" else counts(part)[0] for part in text.split(",")]


def quality(
    measured: Measured, rereads: Sequence[int], tests: Sequence[tuple[str, Case]], kept: Kept | None
) -> Figures:
    """One figure a case, of every variant; what is kept is not measured again."""
    figures = {name: defaultdict[str, list[float]](list) for name in (*variants(rereads), NONE)}
    numbers = Counter[str]()
    for measure, case in tqdm(tests, unit="case"):
        number, numbers[measure] = numbers[measure], numbers[measure] + 1
        for name, reread in {**variants(rereads), **({NONE: None} if case.answer is None else {})}.items():
            key = key_of(measure, number, name)
            known = kept.get(key) if kept is not None else None
            figure = (
                known["figure"] if known else measured.figure(Case([], case.rest) if name == NONE else case, reread)
            )
            if kept is not None and known is None:
                kept.add(key, {"measure": measure, "case": number, "variant": name, "figure": figure})
            figures[name][measure].append(figure)
    return {name: dict(found) for name, found in figures.items()}


def cases(tokenizer: Tokenizer, count: int, num_documents: int, length: int) -> list[tuple[str, Case]]:
    """Of all measures in turn, so that a run that was ended has some of each."""
    tests = [
        *(
            [(name, make(tokenizer, random.Random(seed), num_documents, length)) for seed in range(count)]
            for name, make in TASKS.items()
        ),
        *(
            [
                (LOSS.format(name), case)
                for case in loss_cases(tokenizer, text, max(2, count // 4), num_documents, length, 300)
            ]
            for name, text in texts()
        ),
    ]
    places = sorted(
        (place / len(group), index, place) for index, group in enumerate(tests) for place in range(len(group))
    )
    return [tests[index][place] for _, index, place in places]


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
    note = f"{num_documents} documents of {length} tokens over HTTP; replies are those of cold runs, token for token."
    return Table(["request", "to the first token", "cold ÷ this", "CPU time", "tokens found"], rows, [note])


def draw(figure: Any, figures: Figures) -> None:
    left, right = figure.subplots(1, 2)
    names = [name for name in figures if name not in (FULL, NONE)]
    for measure in figures[FULL]:
        if measure in TASKS:
            shown = [FULL, *names]
            values = [[100 * one for one in figures[name][measure]] for name in shown]
            panel = right
        else:
            shown, panel = names, left
            full = figures[FULL][measure]
            values = [[one - other for one, other in zip(figures[n][measure], full, strict=True)] for n in names]
        panel.errorbar(
            shown, list(map(statistics.fmean, values)), list(map(error, values)), fmt="o-", capsize=3, label=measure
        )
    left.axhline(0, color="grey", linewidth=1)
    left.set_title("loss − loss with full attention")
    right.set_title("right replies, %")
    for panel in (left, right):
        panel.tick_params(axis="x", rotation=30)
        panel.legend()


if __name__ == "__main__":
    run("reuse", main)
