"""Speed of prefill attention on the CPU: the C kernel beside the torch path, one layer, in GFLOP/s.

    python -m bench.attention --shapes smollm2 --contexts 8192 --methods rerope

FLOPs are 4·D a visible (row, key, query head): what any exact method must do, so that work done twice or on masked keys
counts as time and not as work. The step's plan (tables of angles) is made once and left out, as it is shared by all
layers. With one thread, time is the thread's CPU time, which a busy neighbour does not lengthen as it does wall time;
of several runs the best counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from prerope.cache.attention.dispatch import paged_attention
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.cache.kernels.build import library, prepare
from prerope.rope.model import ModelPositions
from prerope.rope.reading import PositionMethod
from rich.console import Console
from rich.table import Table

from bench.machine import describe_machine
from bench.shapes import SHAPES, AttentionShape

BLOCK_SIZE = 16
LEAST_SECONDS, LEAST_RUNS = 1.0, 3


@dataclass(frozen=True, slots=True)
class Speed:
    """One row of the report, in GFLOP/s."""

    model: str
    method: str
    chunk: int
    context: int
    kernel: float
    torch: float | None


@dataclass(frozen=True, slots=True)
class Step:
    """The last `chunk` rows of a context of `length` tokens."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    metadata: AttentionMetadata
    flops: float

    def attend(self) -> None:
        options = AttentionOptions(self.query.shape[-1] ** -0.5, "")
        paged_attention(self.query, self.keys, self.values, self.metadata, options)


def make_step(model: AttentionShape, method: PositionMethod, chunk: int, length: int) -> Step:
    blocks = -(-length // BLOCK_SIZE)
    keys, values = torch.randn(2, blocks, BLOCK_SIZE, model.kv_heads, model.head_dim).bfloat16()
    query = torch.randn(chunk, model.query_heads, model.head_dim).bfloat16()
    positions = ModelPositions({"": method}, "")
    sequence = SequenceRows(0, chunk, length - chunk, torch.randperm(blocks), positions)
    pairs = chunk * (length - chunk) + chunk * (chunk + 1) // 2
    metadata = AttentionMetadata([sequence], torch.zeros(0, dtype=torch.int64), BLOCK_SIZE)
    return Step(query, keys, values, metadata, 4.0 * model.head_dim * model.query_heads * pairs)


def best_seconds(call: Callable[[], None], threads: int) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter
    call()  # plans, and pages touched for the first time
    taken: list[float] = []
    while len(taken) < LEAST_RUNS or sum(taken) < LEAST_SECONDS:
        start = clock()
        call()
        taken.append(clock() - start)
    return min(taken)


@contextmanager
def only_torch() -> Iterator[None]:
    with patch("prerope.cache.cpu.attention.can_prefill", return_value=False):
        yield


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> list[Speed]:
    speeds = []
    for name in options.models:
        model = SHAPES[name]
        for method in options.methods:
            resolved = model.method(method)
            for chunk in options.chunks:
                for length in options.contexts:
                    step = make_step(model, resolved, min(chunk, length), length)
                    kernel = step.flops / best_seconds(step.attend, options.threads) / 1e9
                    with only_torch():
                        bands = None if options.no_torch else best_seconds(step.attend, options.threads)
                    in_torch = None if bands is None else step.flops / bands / 1e9
                    speeds.append(Speed(name, method, chunk, length, kernel, in_torch))
                    say(f"{name} {method} {chunk} rows of {length}: {kernel:.0f} GFLOP/s")
    return speeds


def print_table(speeds: Sequence[Speed], threads: int, console: Console) -> None:
    table = Table(title=f"Prefill attention, GFLOP/s, {threads} thread{'s'[: threads != 1]}")
    for heading in ("model", "method"):
        table.add_column(heading)
    for heading in ("rows", "context", "kernel", "torch", "ratio"):
        table.add_column(heading, justify="right")
    for s in speeds:
        beside = ("–", "–") if s.torch is None else (f"{s.torch:.0f}", f"{s.kernel / s.torch:.2f}")
        table.add_row(s.model, s.method, f"{s.chunk:,}", f"{s.context:,}", f"{s.kernel:.0f}", *beside)
    console.print(table)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.attention", description="Speed of prefill attention on the CPU.")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=["rope", "rerope", "dynamic_leaky"])
    parser.add_argument("--chunks", nargs="+", type=int, default=[512, 2048], help="rows of a chunk")
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 8192, 16384, 32768], help="tokens to its end")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-torch", action="store_true", help="only the kernel")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for attention.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    told = prepare(None)
    if library() is None:
        print(f"bench.attention: {told}", file=sys.stderr)
        return 1
    console = Console()
    speeds = measure(options, lambda line: console.print(line, highlight=False))
    print_table(speeds, options.threads, console)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"machine": describe_machine(), "threads": options.threads, "speeds": [asdict(s) for s in speeds]}
    (options.out / "attention.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
