"""Speed of the GPU kernels: one layer, each shape and method, beside the machine's own limits and other kernels.

    python -m bench.kernels            # on a GPU; under eight minutes on an H100
    python -m bench.kernels --toy      # under Triton's interpreter on the CPU: proves the program, measures nothing

First it checks that results are right: at most twice the error of a plain torch run in the same dtype against fp32.
Each call is captured in a CUDA graph and replayed, the L2 cache flushed before; of several replays the median counts.
The step's plan is shared by all layers and left out. SDPA reads contiguous keys and rotates nothing.
A case that fails is reported and the others go on; the exit status tells.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import OUTPUT_FOLDER, WIDTH
from bench.kernels_cases import FULL, RAW, TOY, Plan, Step, decode_steps, low_precision, make_step, prefill_flops
from bench.kernels_peers import peers
from bench.machine import describe_machine
from cache.cuda import cuda_attention, cuda_store
from cache.reference import reference_attention

REPEATS = 15
FLUSHED_BYTES = 256 * 2**20
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Result:
    """One row. work: bytes of decode and store, FLOPs of prefill; share: of the measured copy or matmul rate."""

    kernel: str
    model: str
    method: str
    batch: int
    context: int
    seconds: float
    work: float
    share: float
    over_raw: float | None = None  # this time over the same kernel's without rotation
    over: dict[str, float] = field(default_factory=dict)  # and over a peer's


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device, repeats: int = REPEATS) -> None:
        self._on_gpu, self._repeats = device.type == "cuda", repeats
        self._flushed = torch.empty(FLUSHED_BYTES if self._on_gpu else 0, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        """The median of one call."""
        call()  # compiles, and plans the step
        if not self._on_gpu:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return statistics.median(self._replay(graph) for _ in range(self._repeats))

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flushed.zero_()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class Bench:
    """Runs cases and keeps what they gave: `results`, and `failures` by case."""

    def __init__(self, plan: Plan, device: torch.device, say: Callable[[str], None]) -> None:
        self.plan, self.device, self.say = plan, device, say
        self.clock = Clock(device)
        self.results: list[Result] = []
        self.failures: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self.rates = {"copy bytes/s": self._copy_rate(), "matmul FLOP/s": self._matmul_rate()}

    def run(self, until: float) -> None:
        for case, call in self._cases():
            if time.monotonic() > until:
                self.failures[case] = "left out: the time was up"
                continue
            try:
                call()
            except Exception as error:  # a case that fails must not stop the others
                self.failures[case] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                self.say(f"{case}: {self.failures[case]}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _cases(self) -> list[tuple[str, Callable[[], None]]]:
        """The checks first."""
        plan, cases = self.plan, list[tuple[str, Callable[[], None]]]()
        for name in plan.models:
            cases += [(f"check {name} {method}", partial(self._check, name, method)) for method in plan.methods]
        for name, batch, context in decode_steps(plan, DTYPE):
            read = float(batch * context * plan.models[name].key_bytes(DTYPE))
            last_rows = [(context - 1, 1)] * batch
            call = partial(self._attend, "decode", name, last_rows, read, self.rates["copy bytes/s"])
            cases.append((f"decode {name} {batch} x {context}", call))
        for name, model in plan.models.items():
            for count in plan.prefill:
                flops = prefill_flops(model, count)
                call = partial(self._attend, "prefill", name, [(0, count)], flops, self.rates["matmul FLOP/s"])
                cases.append((f"prefill {name} {count}", call))
            cases.append((f"store {name}", partial(self._store, name)))
        return cases

    def _step(self, name: str, method: str, rows: list[tuple[int, int]]) -> Step:
        return make_step(self.plan.models[name], method, rows, self.plan.block_size, DTYPE, self.device)

    def _check(self, name: str, method: str) -> None:
        """Decoded rows and chunks of unlike lengths together."""
        step = self._step(name, method, list(self.plan.checked))
        truth = reference_attention(
            step.query.float(), step.keys.float(), step.values.float(), step.metadata, step.options
        )
        ours = _largest(_attended(step), truth)
        allowed = 2 * _largest(low_precision(step), truth)
        self.errors[f"{name} {method}"] = ours / allowed * 2
        if not ours <= allowed:
            raise ArithmeticError(
                f"the error is {ours:.2e}; at most {allowed:.2e}, twice a plain torch run's, is right"
            )

    def _attend(self, kernel: str, name: str, rows: list[tuple[int, int]], work: float, rate: float) -> None:
        beside: dict[str, float] = {}
        raw: float | None = None
        for method in (RAW, *self.plan.methods):
            step = self._step(name, method, rows)
            if method == RAW:
                for peer, call in peers(step, kernel, self.device):
                    try:
                        beside[peer] = self.clock.seconds(call)
                    except Exception as error:  # a peer may not know a shape
                        self.failures[f"{peer} {kernel} {name} {rows[0]}"] = str(error).splitlines()[0][:300]
            seconds = self.clock.seconds(partial(_attended, step))
            raw = seconds if method == RAW else raw
            length = rows[0][0] + rows[0][1]
            over = {peer: seconds / theirs for peer, theirs in beside.items()}
            share = work / seconds / rate
            self.results.append(
                Result(kernel, name, method, len(rows), length, seconds, work, share, seconds / (raw or seconds), over)
            )
            self.say(f"{kernel} {name} {len(rows)} x {length} {method}: {seconds * 1e3:.3f} ms, {share:.0%}")
            del step

    def _store(self, name: str) -> None:
        rows = min(8192, max(self.plan.prefill))
        step = self._step(name, RAW, [(0, rows)])
        key = torch.randn(rows, *step.keys.shape[2:], dtype=DTYPE, device=self.device)
        slots = torch.randperm(rows, device=self.device)
        seconds = self.clock.seconds(lambda: cuda_store(key, key, step.keys, step.values, slots))
        work = 2.0 * rows * self.plan.models[name].key_bytes(DTYPE)
        share = work / seconds / self.rates["copy bytes/s"]
        self.results.append(Result("store", name, RAW, 1, rows, seconds, work, share))

    def _copy_rate(self) -> float:
        """Bytes read and written a second."""
        size = 2**30 if self.device.type == "cuda" else 2**20
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.clock.seconds(lambda: target.copy_(source))

    def _matmul_rate(self) -> float:
        size = 8192 if self.device.type == "cuda" else 64
        one, other = (torch.randn(size, size, dtype=DTYPE, device=self.device) for _ in range(2))
        return 2 * size**3 / self.clock.seconds(lambda: one @ other)


def _attended(step: Step) -> Tensor:
    return cuda_attention(step.query, step.keys, step.values, step.metadata, step.options)


def _largest(actual: Tensor, truth: Tensor) -> float:
    return float((actual.float() - truth).abs().max())


def print_table(bench: Bench, console: Console) -> None:
    beside = sorted({peer for result in bench.results for peer in result.over})
    table = Table(title="GPU kernels, one layer")
    for heading in ("kernel", "model", "method"):
        table.add_column(heading)
    for heading in (
        "batch",
        "context",
        "ms",
        "GB/s or TFLOP/s",
        "of the limit",
        "over raw",
        *(f"over {p}" for p in beside),
    ):
        table.add_column(heading, justify="right")
    for r in bench.results:
        ratios = [_ratio(r.over_raw), *(_ratio(r.over.get(peer)) for peer in beside)]
        rate = r.work / r.seconds / (1e12 if r.kernel == "prefill" else 1e9)
        figures = (str(r.batch), f"{r.context:,}", f"{r.seconds * 1e3:.3f}", f"{rate:,.0f}", f"{r.share:.0%}")
        table.add_row(r.kernel, r.model, r.method, *figures, *ratios)
    console.print(table)
    for name, ratio in bench.errors.items():
        console.print(f"error of {name}: {ratio:.2f} of a plain torch run's in the same dtype", highlight=False)
    for case, told in bench.failures.items():
        console.print(f"failed: {case}: {told}", highlight=False, markup=False)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def describe_device(device: torch.device) -> dict[str, Any]:
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if device.type != "cuda":
        return {"device": "Triton's interpreter"} | versions
    return {"device": torch.cuda.get_device_name(device)} | versions


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.kernels", description="Speed of the GPU kernels.")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, under Triton's interpreter")
    parser.add_argument("--minutes", type=float, default=7.5, help="no case begins after these")
    parser.add_argument("--out", type=Path, default=OUTPUT_FOLDER, help="folder for kernels.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is at the first launch
    elif not torch.cuda.is_available():
        print("bench.kernels: torch sees no CUDA device; --toy needs none", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    until = time.monotonic() + 60 * options.minutes
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    device = torch.device("cpu" if options.toy else "cuda")
    bench = Bench(TOY if options.toy else FULL, device, lambda line: console.print(line, highlight=False, markup=False))
    bench.run(until)
    print_table(bench, console)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {
        "machine": describe_machine() | describe_device(device),
        "rates": bench.rates,
        "errors over a torch run's": bench.errors,
        "results": [asdict(result) for result in bench.results],
        "failures": bench.failures,
    }
    (options.out / "kernels.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
