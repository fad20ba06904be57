"""Speed of prefill attention on the CPU: the C kernel, one layer, in GFLOP/s.

    python -m bench.attention --shapes smollm2 --contexts 8192 --methods rerope

FLOPs are 4·D a visible (row, key, query head): what any exact method must do, so that work done twice or on masked keys
counts as time and not as work. The step's plan (tables of angles) is made once and left out, as it is shared by all
layers. With one thread, time is the thread's CPU time, which a busy neighbour does not lengthen as it does wall time;
of several runs the best counts.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from prerope.cache.attention.dispatch import paged_attention
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions, SequenceRows
from prerope.cache.kernels.build import library
from prerope.rope.model import ModelPositions
from prerope.rope.reading import PositionMethod
from prerope.server.models.cpu.build import prepare

from bench import BenchError
from bench.shared import options
from bench.shared.machine import describe_machine
from bench.shared.report import Report, Table
from bench.shared.shapes import SHAPES, AttentionShape

BLOCK_SIZE = 16
LEAST_SECONDS, LEAST_RUNS = 1.0, 3


@dataclass(frozen=True, slots=True)
class Step:
    """The last rows of a context."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    metadata: AttentionMetadata
    flops: float

    def attend(self) -> None:
        layer = AttentionOptions(self.query.shape[-1] ** -0.5, "")
        paged_attention(self.query, self.keys, self.values, self.metadata, layer)


def make_step(shape: AttentionShape, method: PositionMethod, chunk: int, length: int) -> Step:
    """The last `chunk` rows of a context of `length` tokens, its blocks scattered over the cache."""
    blocks = -(-length // BLOCK_SIZE)
    keys, values = torch.randn(2, blocks, BLOCK_SIZE, shape.kv_heads, shape.head_dim).bfloat16()
    query = torch.randn(chunk, shape.query_heads, shape.head_dim).bfloat16()
    positions = ModelPositions({"": method}, "")
    sequence = SequenceRows(0, chunk, length - chunk, torch.randperm(blocks), positions)
    pairs = chunk * (length - chunk) + chunk * (chunk + 1) // 2
    metadata = AttentionMetadata([sequence], torch.zeros(0, dtype=torch.int64), BLOCK_SIZE)
    return Step(query, keys, values, metadata, 4.0 * shape.head_dim * shape.query_heads * pairs)


def best_seconds(call: Callable[[], None], threads: int) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter
    call()  # plans, and pages touched for the first time
    taken: list[float] = []
    while len(taken) < LEAST_RUNS or sum(taken) < LEAST_SECONDS:
        start = clock()
        call()
        taken.append(clock() - start)
    return min(taken)


@dataclass(frozen=True, slots=True)
class Speed:
    """One row of the report, in GFLOP/s."""

    shape: str
    method: str
    chunk: int
    context: int
    kernel: float


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("attention", __doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--methods", nargs="+", default=["rope", "rerope", "dynamic_leaky"])
    add("--chunks", nargs="+", type=options.count, default=[512, 2048], help="rows of a chunk")
    add("--contexts", nargs="+", type=options.count, default=[2048, 8192, 16384, 32768], help="tokens to its end")
    add("--threads", type=options.count, default=1)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    told = prepare(None)
    if library() is None:
        raise BenchError(told)
    console, speeds = options.console(), []
    for name, method, chunk, length in itertools.product(asked.shapes, asked.methods, asked.chunks, asked.contexts):
        step = make_step(SHAPES[name], SHAPES[name].method(method), min(chunk, length), length)
        speed = step.flops / best_seconds(step.attend, asked.threads) / 1e9
        speeds.append(Speed(name, method, chunk, length, speed))
        console.print(f"{name} {method} {chunk} rows of {length}: {speed:.0f} GFLOP/s")
    rows = [[s.shape, s.method, f"{s.chunk:,}", f"{s.context:,}", f"{s.kernel:.0f}"] for s in speeds]
    note = f"Prefill attention, {asked.threads} thread{'s'[: asked.threads != 1]}."
    table = Table(["shape", "method", "rows", "context", "GFLOP/s"], rows, [note], left=(0, 1))
    found = {"machine": describe_machine(), "threads": asked.threads, "speeds": [asdict(speed) for speed in speeds]}
    Report("attention", [table], found).publish(asked.out, console)
    return 0


if __name__ == "__main__":
    options.run("attention", main)
