"""Time of a decode step against context length, for each position method, with nothing prefilled.

    python -m bench.decode --methods rope,rerope,yarn,dynamic_leaky --contexts 1024,2048,4096,8192,16384,32768

Random keys and values are written into the engine's cache once; all methods read the same ones, since raw keys know no
method. A step is what the engine does for a decode: the batch as tensors, the model's forward, the largest logit. The
steps of a cell are consecutive and end at its context, as in a generation; the first is left out. The scheduler and
the reply are not timed: they know nothing of the context.

Machines are noisy, so cells are measured in rounds, methods of one context beside each other and in another order each
round, and methods are compared within a round: a ratio is the median of the rounds' ratios, not a ratio of medians.
A served process also sets GOMP_SPINCOUNT (`server.machine.threads.SPIN_COUNT`): set it in the shell to measure with it.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from prerope.cache.attention.selection import selects_from
from prerope.rope.model import ModelPositions
from prerope.rope.spec import RopeSpec
from prerope.server.engine.engine import Engine
from prerope.server.models.checkpoint import checkpoint_name
from prerope.server.models.model import Chunk, build_batch
from tqdm import tqdm

from bench.shared import options
from bench.shared.clock import over, seconds_of
from bench.shared.engines import fill, model_options, opened
from bench.shared.machine import describe_machine
from bench.shared.options import method_list
from bench.shared.report import NOTHING, Report, Table, context_axis, counted

DEFAULT_METHODS = "rope,rerope,yarn,dynamic_leaky"
DEFAULT_CONTEXTS = "1024,2048,4096,8192,16384,32768"
Rounds = Mapping[tuple[str, int], list[float]]  # (method, context) → ms a step, a value a round
CACHE_SHARE = 0.8  # of free memory: refused beyond, not swapped


class Decoding:
    """Rows of one length that decode side by side, each with cache blocks of its own, in no order."""

    def __init__(self, engine: Engine, rows: int, seed: int = 0) -> None:
        self._engine = engine
        self._block_size = engine.config.block_size
        per_row = -(-engine.info.max_model_len // self._block_size)
        shuffled = torch.randperm(rows * per_row, generator=torch.Generator().manual_seed(seed))
        self._tables: list[list[int]] = shuffled.view(rows, per_row).tolist()
        self._tokens = [0] * rows

    def step(self, positions: ModelPositions, context: int) -> None:
        """One token a row, the last of `context`; the tokens it gives are the next step's."""
        chunks = [
            Chunk.of([token], context - 1, table, positions, 1, selects_from=selects_from(positions.select, 0))
            for token, table in zip(self._tokens, self._tables, strict=True)
        ]
        batch = build_batch(chunks, self._block_size, self._engine.model.device)
        self._tokens = self._engine.model.forward(batch, self._engine.storage).argmax(-1).tolist()

    def seconds(self, positions: ModelPositions, context: int, steps: int) -> float:
        """Median of `steps` steps that end at `context`, after one that is not counted. A step ends when its tokens
        have arrived, on a GPU too."""
        lengths = range(context - steps, context + 1)
        taken = [seconds_of(partial(self.step, positions, length)) for length in lengths]
        return statistics.median(taken[1:])


def cells(
    contexts: Sequence[int], methods: Sequence[str], rounds: int, seed: int = 0
) -> Iterator[tuple[int, int, str]]:
    """(round, context, method): every cell once a round, a context's methods in a row; each round in a new order."""
    draw = random.Random(seed)
    for number in range(rounds):
        for context in draw.sample(contexts, len(contexts)):
            for method in draw.sample(methods, len(methods)):
                yield number, context, method


def measure(engine: Engine, asked: argparse.Namespace) -> Rounds:
    """ms a step by (method, context), a value a round."""
    positions = {method.label: engine.resolve_positions(method.spec) for method in asked.methods}
    decoding = Decoding(engine, asked.rows)
    fill(engine)
    for method in positions:  # pages touched and scratch made, for the longest step
        decoding.step(positions[method], asked.contexts[-1])
    found: Rounds = {(method, context): [] for method in positions for context in asked.contexts}
    total = asked.rounds * len(found)
    with tqdm(cells(asked.contexts, list(positions), asked.rounds), total=total, unit=" cells") as bar:
        for number, context, method in bar:
            bar.set_description(f"round {number + 1}, {context:,} tokens, {method}", refresh=False)
            found[method, context].append(1e3 * decoding.seconds(positions[method], context, asked.steps))
    return found


def open_engine(asked: argparse.Namespace, say: Callable[[str], None]) -> Engine:
    """With room for all rows at the longest context and no more, and for bounds where any choose. Of memory there is
    a bound only, since the engine takes what max_num_seqs sequences need; on a GPU it is the engine's own."""
    on_gpu = asked.device.startswith("cuda") or (asked.device == "auto" and torch.cuda.is_available())
    engine, _ = opened(
        asked,
        say,
        rope=RopeSpec(select=max((method.spec.select or 0 for method in asked.methods), default=0) or None),
        max_model_len=asked.contexts[-1],
        max_num_seqs=asked.rows,
        max_batched_tokens=max(512, asked.rows),
        kv_cache_memory=None if on_gpu else int(psutil.virtual_memory().available * CACHE_SHARE),
    )
    return engine


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("decode", __doc__)
    add = parser.add_argument
    add("--methods", type=method_list, default=DEFAULT_METHODS, metavar="A,B", help="compared with the first")
    add("--contexts", type=options.counts, default=DEFAULT_CONTEXTS, metavar="N,N", help="tokens at a cell's last step")
    add("--rows", type=options.count, default=1, help="sequences that decode side by side")
    add("--rounds", type=options.count, default=20, help="figures are medians of these")
    add("--steps", type=options.count, default=5, help="of a cell in a round")
    model_options(parser)
    asked = parser.parse_args(arguments)
    asked.contexts = sorted(set(asked.contexts))
    if asked.contexts[0] <= asked.steps:
        parser.error(f"--contexts {asked.contexts[0]}: must be more than the {asked.steps} --steps that end there")
    return asked


@dataclass(frozen=True, slots=True)
class Decoded:
    """ms of a step by (method, context), a value a round in one order for all. The first method is the reference."""

    methods: Sequence[str]
    contexts: Sequence[int]
    rounds: Rounds
    about: Mapping[str, Any]

    @property
    def reference(self) -> str:
        return self.methods[0]

    def milliseconds(self, method: str, context: int) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds[method, context])

    def ratio(self, method: str, context: int) -> float:
        return over(self.rounds[method, context], self.rounds[self.reference, context])

    def slope(self, method: str) -> float:
        """µs a step for 1000 more tokens of context: least squares through the medians."""
        return slope(self.contexts, [self.milliseconds(method, context) for context in self.contexts])

    def slope_differences(self, method: str) -> list[float]:
        """The method's slope less the reference's, of each round: the slope of the differences."""
        found = []
        for ours, theirs in zip(self._by_round(method), self._by_round(self.reference), strict=True):
            found.append(slope(self.contexts, [one - other for one, other in zip(ours, theirs, strict=True)]))
        return found

    def _by_round(self, method: str) -> Iterator[tuple[float, ...]]:
        return zip(*(self.rounds[method, context] for context in self.contexts), strict=True)

    def row(self, method: str) -> list[str]:
        times = [f"{self.milliseconds(method, n):.2f}" for n in self.contexts]
        compared = [f"{statistics.median(self.slope_differences(method)):+.0f}"]
        compared += [f"{self.ratio(method, n):.3f}" for n in self.contexts]
        if method == self.reference:
            compared = [NOTHING] * len(compared)
        return [method, *times, f"{self.slope(method):.0f}", *compared]

    def notes(self) -> list[str]:
        about = self.about
        return [
            f"{about['model']}, {about['dtype']}, trained on {about['train_length']:,} tokens: ms of a decode step of "
            f"{counted(about['rows'], 'sequence')} (forward and argmax, no scheduler), medians of {about['rounds']} "
            f"interleaved rounds of {about['steps']} steps, {counted(about['threads'], 'thread')}, {about['date']} on "
            f"{about['cpu']}.",
            f"Slope: µs a step for 1000 more tokens of context, least squares through the medians. × is the ratio to "
            f"{self.reference} and Δ slope the difference from its slope: medians over the rounds.",
            "; ".join(self._slope_note(method) for method in self.methods)
            + f". A token of context is {about['cache_bytes_per_token']:,} bytes of K and V a sequence.",
        ]

    def _slope_note(self, method: str) -> str:
        """With the rate at which that slope reads the cache; a slope of nothing or less is noise, and has none."""
        found = self.slope(method)
        num_bytes = 1000 * self.about["rows"] * self.about["cache_bytes_per_token"]
        rate = f" ({num_bytes / found / 1e3:.1f} GB/s)" if found > 0 else ""
        return f"{method} {found:.0f} µs per 1000 tokens{rate}"


def slope(contexts: Sequence[int], milliseconds: Sequence[float]) -> float:
    """µs for 1000 tokens, by least squares; 0 of a single context."""
    if len(contexts) < 2:
        return 0.0
    return 1e6 * statistics.linear_regression(contexts, milliseconds).slope


def report(found: Decoded) -> Report:
    times, ratios = (f"ms at {n:,}" for n in found.contexts), (f"× at {n:,}" for n in found.contexts)
    headings = ["method", *times, "slope", "Δ slope", *ratios]
    table = Table(headings, [found.row(method) for method in found.methods], found.notes())
    cells = [{"method": m, "context": n, "rounds_ms": list(ms)} for (m, n), ms in found.rounds.items()]
    data = {"about": dict(found.about), "cells": cells}
    return Report("decode", [table], data, lambda figure: draw(found, figure))


def draw(found: Decoded, figure: Any) -> None:
    """ms of a step against context length, a line a method."""
    figure.set_size_inches(8, 5)
    panel = figure.subplots()
    for method in found.methods:
        line = [found.milliseconds(method, context) for context in found.contexts]
        panel.plot(found.contexts, line, marker="o", markersize=4, label=f"{method}, {found.slope(method):.0f} µs")
    context_axis(panel, found.contexts)
    title = f"{found.about['model']}, {counted(found.about['rows'], 'sequence')}"
    panel.set(ylim=(0, None), ylabel="ms a decode step", title=title)
    panel.legend(title="slope per 1000 tokens")


def main(arguments: Sequence[str] | None) -> int:
    asked, console = parse_arguments(arguments), options.console()
    about = describe_machine()
    engine = open_engine(asked, console.print)
    token_bytes = sum(layer.shape.token_bytes(engine.storage.keys[0].dtype) for layer in engine.model.layers)
    about |= {"model": checkpoint_name(asked.model), "dtype": engine.info.dtype, "device": engine.info.device}
    about |= {name: getattr(asked, name) for name in ("rows", "rounds", "steps", "threads")}
    about |= {"train_length": engine.info.train_length, "cache_bytes_per_token": token_bytes}
    found = Decoded([method.label for method in asked.methods], asked.contexts, measure(engine, asked), about)
    report(found).publish(asked.out, console)
    return 0


if __name__ == "__main__":
    options.run("decode", main)
