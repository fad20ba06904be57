"""Speed of the GPU kernels: one layer, each shape and method, beside the machine's own limits and other kernels.

    python -m bench.kernels            # on a GPU; under eight minutes on an H100
    python -m bench.kernels --toy      # under Triton's interpreter on the CPU: proves the program, measures nothing

First it checks that results are right: at most twice the error of a plain torch run in the same dtype against fp32.
Each call is captured in a CUDA graph and replayed, the L2 cache flushed before; of several replays the median counts.
The step's plan is shared by all layers and left out. SDPA reads contiguous keys and rotates nothing.
A case that fails is reported and the others go on; the exit status tells. The cases that targets are about come first,
and the files are written anew after each case, so that a run that is cut short leaves what it found.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from prerope.cache.attention.reference import reference_attention
from prerope.cache.cuda.attention import cuda_attention, cuda_store
from torch import Tensor

from bench import BenchError
from bench.kernels.cases import FULL, RAW, TOY, Plan, Step, decode_steps, low_precision, make_step, prefill_flops
from bench.kernels.peers import peers
from bench.kernels.report import ERROR_LIMIT, Found, Result, report
from bench.shared import options
from bench.shared.clock import Clock, copy_rate, matmul_rate
from bench.shared.machine import describe_machine

CHECK, JUDGED, OTHER = range(3)
Case = tuple[int, str, Callable[[], None]]  # when, name, call


class Bench:
    """Runs cases and keeps what they gave in `found`."""

    def __init__(self, plan: Plan, device: torch.device, say: Callable[[str], None]) -> None:
        self.plan, self.device, self.say = plan, device, say
        self.clock = Clock(device)
        self.found = Found(plan, describe_machine(device))
        self.rates = {"byte/s": copy_rate(self.clock), "FLOP/s": matmul_rate(self.clock, plan.dtype)}
        self.found.rates = self.rates

    def run(self, until: float, folder: Path) -> None:
        for _, case, call in sorted(self._cases(), key=lambda case: case[0]):
            if time.monotonic() > until:
                self.found.left_out[case] = "the time was up"
                continue
            try:
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                call()
            except Exception as error:  # a case that fails must not stop the others
                self.found.failures[case] = _told(error)
                self.say(f"{case}: {self.found.failures[case]}")
            report(self.found).save(folder)

    def _cases(self) -> list[Case]:
        plan, cases = self.plan, list[Case]()
        for name in plan.models:
            for when, methods in ((CHECK, plan.methods), (OTHER, plan.only_checked)):
                cases += [(when, f"check {name} {method}", partial(self._check, name, method)) for method in methods]
        for name, batch, context in decode_steps(plan):
            read = float(batch * context * plan.models[name].key_bytes(plan.dtype))
            last_rows = [(context - 1, 1)] * batch
            call = partial(self._attend, "decode", name, last_rows, read, self.rates["byte/s"])
            cases.append((JUDGED if read >= plan.judged_bytes else OTHER, f"decode {name} {batch} x {context}", call))
        for name, model in plan.models.items():
            for count in plan.prefill:
                flops = prefill_flops(model, count)
                call = partial(self._attend, "prefill", name, [(0, count)], flops, self.rates["FLOP/s"])
                cases.append((JUDGED if count >= plan.judged_rows else OTHER, f"prefill {name} {count}", call))
            cases.append((OTHER, f"store {name}", partial(self._store, name)))
        return cases

    def _step(self, name: str, method: str, rows: list[tuple[int, int]]) -> Step:
        return make_step(self.plan.models[name], method, rows, self.plan.block_size, self.plan.dtype, self.device)

    def _check(self, name: str, method: str) -> None:
        """Decoded rows and chunks of unlike lengths together."""
        step = self._step(name, method, list(self.plan.checked))
        truth = reference_attention(
            step.query.float(), step.keys.float(), step.values.float(), step.metadata, step.options
        )
        ours, allowed = _largest(_attended(step), truth), ERROR_LIMIT * _largest(low_precision(step), truth)
        self.found.errors[f"{name} {method}"] = ours / allowed * ERROR_LIMIT
        if not ours <= allowed:
            raise ArithmeticError(
                f"the error is {ours:.2e}; at most {allowed:.2e}, twice a plain torch run's, is right"
            )
        self.say(f"check {name} {method}: error {ours / allowed * ERROR_LIMIT:.2f} of a plain torch run's")

    def _attend(self, kernel: str, name: str, rows: list[tuple[int, int]], work: float, rate: float) -> None:
        beside = self._peers(kernel, name, rows)
        raw: float | None = None
        for method in (RAW, *self.plan.methods):
            seconds = self.clock.seconds(partial(_attended, self._step(name, method, rows)))
            raw = seconds if raw is None else raw
            length = rows[0][0] + rows[0][1]
            over = {peer: seconds / theirs for peer, theirs in beside.items()}
            share = work / seconds / rate
            result = Result(kernel, name, method, len(rows), length, seconds, work, share, seconds / raw, over)
            self.found.results.append(result)
            self.say(f"{kernel} {name} {result.case}: {seconds * 1e3:.3f} ms, {share:.0%}")

    def _peers(self, kernel: str, name: str, rows: list[tuple[int, int]]) -> dict[str, float]:
        """Seconds of each; one that does not know the shape has none."""
        step, found = self._step(name, RAW, rows), {}
        for peer, make in peers(kernel, self.device):
            try:
                found[peer] = self.clock.seconds(make(step))
            except Exception as error:
                self.found.silent[f"{peer}, {kernel} {name} {len(rows)} x {sum(rows[0])}"] = _told(error)
        return found

    def _store(self, name: str) -> None:
        rows = min(8192, max(self.plan.prefill))
        step = self._step(name, RAW, [(0, rows)])
        key = torch.randn(rows, *step.keys.shape[2:], dtype=self.plan.dtype, device=self.device)
        slots = torch.randperm(rows, device=self.device)
        seconds = self.clock.seconds(lambda: cuda_store(key, key, step.keys, step.values, slots))
        work = 2.0 * rows * self.plan.models[name].key_bytes(self.plan.dtype)
        share = work / seconds / self.rates["byte/s"]
        self.found.results.append(Result("store", name, RAW, 1, rows, seconds, work, share))


def _attended(step: Step) -> Tensor:
    return cuda_attention(step.query, step.keys, step.values, step.metadata, step.options)


def _largest(actual: Tensor, truth: Tensor) -> float:
    return float((actual.float() - truth).abs().max())


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("kernels", __doc__)
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, under Triton's interpreter")
    parser.add_argument("--minutes", type=float, default=7.5, help="no case begins after these")
    asked, console = parser.parse_args(arguments), options.console()
    if asked.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is at the first launch
    elif not torch.cuda.is_available():
        raise BenchError("torch sees no CUDA device; --toy needs none")
    torch.manual_seed(0)
    until = time.monotonic() + 60 * asked.minutes
    device = torch.device("cpu" if asked.toy else "cuda")
    bench = Bench(TOY if asked.toy else FULL, device, partial(console.print, markup=False))
    # Under the interpreter few programs: most of them would have nothing to do.
    with patch("prerope.cache.kernels.triton.decode.ITEMS", 4) if asked.toy else nullcontext():
        bench.run(until, asked.out)
    report(bench.found).publish(asked.out, console)
    return 1 if bench.found.failures else 0


if __name__ == "__main__":
    options.run("kernels", main)
