"""Speed of prefill attention on the CPU: the C kernel, one layer, in GFLOP/s.

    python -m bench.attention --shapes smollm2 --contexts 8192 --methods rerope

FLOPs are 4·D a visible (row, key, query head): what any exact method must do, so that work done twice or on masked keys
counts as time and not as work. The step's plan (tables of angles) is made once and left out, as it is shared by all
layers. With one thread, time is the thread's CPU time, which a busy neighbour does not lengthen as it does wall time;
of several runs the best counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from prerope.cache.attention.dispatch import paged_attention
from prerope.cache.kernels.build import library
from prerope.server.models.cpu.build import prepare

from bench import BenchError
from bench.kernels.cases import make_step, prefill_flops
from bench.shared import options
from bench.shared.clock import clock_of, seconds_of
from bench.shared.machine import describe_machine
from bench.shared.report import Report, Table, counted
from bench.shared.shapes import SHAPES

BLOCK_SIZE = 16
LEAST_SECONDS, LEAST_RUNS = 1.0, 3


def best_seconds(call: Callable[[], object], threads: int) -> float:
    call()  # plans, and pages touched for the first time
    taken: list[float] = []
    while len(taken) < LEAST_RUNS or sum(taken) < LEAST_SECONDS:
        taken.append(seconds_of(call, clock_of(threads)))
    return min(taken)


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
    console, found, rows = options.console(), [], []
    for name, method, chunk, context in itertools.product(asked.shapes, asked.methods, asked.chunks, asked.contexts):
        chunk, shape = min(chunk, context), SHAPES[name]
        start = context - chunk
        step = make_step(shape, method, [(start, chunk)], BLOCK_SIZE, torch.bfloat16, torch.device("cpu"))
        attend = partial(paged_attention, step.query, step.keys, step.values, step.metadata, step.options)
        speed = prefill_flops(shape, chunk, start) / best_seconds(attend, asked.threads) / 1e9
        found.append({"shape": name, "method": method, "chunk": chunk, "context": context, "kernel": speed})
        rows.append([name, method, f"{chunk:,}", f"{context:,}", f"{speed:.0f}"])
        console.print(f"{name} {method} {chunk} rows of {context}: {speed:.0f} GFLOP/s")
    note = f"Prefill attention, {counted(asked.threads, 'thread')}."
    table = Table(["shape", "method", "rows", "context", "GFLOP/s"], rows, [note], left=(0, 1))
    data = {"machine": describe_machine(), "threads": asked.threads, "speeds": found}
    Report("attention", [table], data).publish(asked.out, console)
    return 0


if __name__ == "__main__":
    options.run("attention", main)
