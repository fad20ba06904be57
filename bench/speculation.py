"""What speculation gains where a text comes again, and costs where none does; and that no token differs.

    python -m bench.speculation --threads 2

Two tasks, of the default model or --model, on one engine in this process, for each number of streams:

    copying        a passage, and its beginning once more: greedy
    free writing   "Write a story …": drawn at temperature 0.8, seeded

Each is run without speculation and with it, --rounds times; figures are medians of milliseconds a token of a stream,
prefill left out; of one thread it is CPU time, which busy neighbours lengthen less. A token that differs is an error.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from prerope.server.api.chat.template import render_chat
from prerope.server.engine.engine import Engine
from prerope.server.engine.sequence import EngineRequest, SamplingParams
from prerope.server.tokenizer import Tokenizer

from bench import BenchError
from bench.shared import options
from bench.shared.clock import clock_of
from bench.shared.engines import model_options, opened
from bench.shared.machine import describe_machine
from bench.shared.report import Report, Table
from bench.shared.text import Library

SUBJECTS = ("a lighthouse keeper", "two rival bakers", "the last train home", "a robot that collects rain",
            "a village on stilts", "an honest thief", "a missing violin", "the first snow")  # fmt: skip
BEGINNING = 24
"""Tokens of the passage that are said once more, for the model to go on with."""
Streams = list[tuple[list[int], SamplingParams]]


@dataclass(slots=True)
class Runs:
    """Of one task with speculation, or without."""

    ms: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


def copying(tokenizer: Tokenizer, count: int, asked: argparse.Namespace, draw: random.Random) -> Streams:
    library = Library(lambda text: tokenizer.encode(text, add_special_tokens=False))
    sampling = SamplingParams(max_tokens=asked.tokens, temperature=0.0, ignore_eos=True)
    passages = [library.ids(draw, asked.passage) for _ in range(count)]
    again = tokenizer.encode("\n\n", add_special_tokens=False)
    return [([*passage, *again, *passage[:BEGINNING]], sampling) for passage in passages]


def free_writing(tokenizer: Tokenizer, count: int, asked: argparse.Namespace, draw: random.Random) -> Streams:
    found = []
    for number in range(count):
        seed = draw.getrandbits(32)
        sampling = SamplingParams(max_tokens=asked.tokens, temperature=0.8, seed=seed, ignore_eos=True)
        content = f"Write a long story about {SUBJECTS[number % len(SUBJECTS)]}."
        text = render_chat(tokenizer, [{"role": "user", "content": content}])
        found.append((tokenizer.encode(text, add_special_tokens=False), sampling))
    return found


TASKS = {"copying": copying, "free writing": free_writing}


def run(engine: Engine, streams: Streams, runs: Runs, *, speculation: bool) -> list[list[int]]:
    """The tokens of each; the time of a token is taken from when all have their first."""
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(streams))}
    for name, (prompt, sampling) in zip(tokens, streams, strict=True):
        engine.add(EngineRequest(name, prompt, sampling, speculation=speculation))
    while not all(tokens.values()):
        take(engine, tokens)
    clock = clock_of(torch.get_num_threads())
    had, before, began = sum(map(len, tokens.values())), engine.stats(), clock()
    while engine.has_work():
        take(engine, tokens)
    seconds, after = clock() - began, engine.stats()
    runs.ms.append(1e3 * seconds * len(streams) / (sum(map(len, tokens.values())) - had))
    runs.drafted += after.drafted_tokens - before.drafted_tokens
    runs.accepted += after.accepted_tokens - before.accepted_tokens
    return list(tokens.values())


def take(engine: Engine, tokens: dict[str, list[int]]) -> None:
    for name, output in engine.step():
        tokens[name] += output.token_ids


def compare(engine: Engine, tokenizer: Tokenizer, asked: argparse.Namespace) -> Iterator[list[str]]:
    """Rows of the table."""
    for count in asked.streams:
        for task, make in TASKS.items():
            runs, draw = {False: Runs(), True: Runs()}, random.Random(asked.seed)
            for _ in range(asked.rounds):
                streams = make(tokenizer, count, asked, draw)
                off, on = (run(engine, streams, runs[speculation], speculation=speculation) for speculation in runs)
                if off != on:
                    raise BenchError(f"{task} × {count}: with speculation another token was chosen")
            without, with_it = (statistics.median(one.ms) for one in runs.values())
            figures = [f"{without:.2f}", f"{with_it:.2f}", f"{without / with_it:.2f}x"]
            yield [task, str(count), *figures, str(runs[True].drafted), str(runs[True].accepted)]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("speculation", __doc__)
    add = parser.add_argument
    model_options(parser)
    add("--streams", nargs="+", type=options.count, default=[1, 8])
    add("--passage", type=options.count, default=300, help="tokens that are copied from")
    add("--tokens", type=options.count, default=128, help="tokens generated a stream")
    add("--rounds", type=options.count, default=3)
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None) -> int:
    asked, console = parse_arguments(arguments), options.console()
    engine, checkpoint = opened(asked, console.print, kv_cache_memory=2**29)
    rows = []
    for row in compare(engine, Tokenizer.load(checkpoint), asked):
        console.print("  ".join(row))
        rows.append(row)
    header = ["task", "streams", "ms/token without", "with", "gain", "drafted", "accepted"]
    told = {name: getattr(asked, name) for name in ("threads", "streams", "passage", "tokens", "rounds", "seed")}
    table = Table(header, rows, [f"{asked.threads} threads, {engine.info.dtype} on {engine.info.device}; medians."])
    data = {"machine": describe_machine(), "options": told, "rows": rows}
    Report("speculation", [table], data).publish(asked.out, console)
    return 0


if __name__ == "__main__":
    options.run("speculation", main)
