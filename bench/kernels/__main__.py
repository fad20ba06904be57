"""Speed of the GPU kernels: one layer, each shape and method, beside the machine's own limits and other kernels.

    python -m bench.kernels            # on a GPU; under eight minutes on an H100
    python -m bench.kernels --only checks --checks 131k      # are rows of that length right
    python -m bench.kernels --only judged                    # the figures that targets are about
    python -m bench.kernels --toy      # under Triton's interpreter on the CPU: proves the program, measures nothing

First it checks that results are right, row by row: see `bench.kernels.rows`.
Each call is captured in a CUDA graph and replayed, the L2 cache flushed before; of several replays the median counts.
The step's plan is shared by all layers and left out. SDPA reads contiguous keys and rotates nothing.
A case that fails is reported and the others go on; the exit status tells. The cases that targets are about come first,
and the files are written anew after each case, so that a run that is cut short leaves what it found.
"""

from __future__ import annotations

import itertools
import math
import os
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from prerope.cache.attention.reference import reference_attention
from prerope.cache.cuda.attention import cuda_attention, cuda_store
from torch import Tensor

from bench.kernels.cases import FULL, RAW, TOY, Plan, Step, decode_steps, low_precision, make_step, prefill_flops
from bench.kernels.peers import peers
from bench.kernels.report import Found, Result, report
from bench.kernels.rows import SHARPNESS, judge, poisoned
from bench.shared import options
from bench.shared.clock import Clock, copy_rate, matmul_rate, warm
from bench.shared.machine import card, describe_machine
from bench.shared.report import told

CHECK, JUDGED, METHOD, OTHER = range(4)
KINDS = {"checks": {CHECK}, "judged": {JUDGED}, "methods": {METHOD}, "all": {CHECK, JUDGED, METHOD, OTHER}}
"""What --only takes; in this order. Methods of which no time is taken are checked after those that are."""
Case = tuple[int, str, Callable[[], None]]  # when, name, call


class Bench:
    """Runs cases and keeps what they gave in `found`."""

    def __init__(self, plan: Plan, device: torch.device, say: Callable[[str], None], only: str = "all") -> None:
        self.plan, self.device, self.say, self.kinds = plan, device, say, KINDS[only]
        self.clock = Clock(device)
        self.found = Found(plan, describe_machine(device))
        if only not in ("checks", "methods"):
            warm(device)
            self.found.rates = self._rates()
        self.rates = self.found.rates or dict.fromkeys(("byte/s", "FLOP/s"), math.nan)

    def _rates(self) -> dict[str, float]:
        return {"byte/s": copy_rate(self.clock), "FLOP/s": matmul_rate(self.clock, self.plan.dtype)}

    def run(self, until: float, folder: Path, name: str = "kernels") -> None:
        for kind, case, call in sorted(self._cases(), key=lambda case: case[0]):
            if kind not in self.kinds:
                continue
            if time.monotonic() > until:
                self.found.left_out[case] = "the time was up"
                continue
            try:
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                call()
            except Exception as error:  # a case that fails must not stop the others
                self.found.failures[case] = told(error)
                self.say(f"{case}: {self.found.failures[case]}")
                if not isinstance(error, ArithmeticError):
                    traceback.print_exc()
            report(self.found, name).save(folder)
        if self.found.rates:
            self.found.rates_at_end = self._rates()

    def _cases(self) -> list[Case]:
        plan, cases = self.plan, list[Case]()
        for name in plan.models:
            for when, methods in ((CHECK, (RAW, *plan.methods)), (METHOD, plan.only_checked)):
                for rows, method, how in itertools.product(plan.checked, methods, SHARPNESS):
                    case = f"check {name} {rows} {method} {how}"
                    cases.append((when, case, partial(self._check, case, name, rows, method, how)))
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

    def _check(self, case: str, name: str, rows: str, method: str, how: str) -> None:
        """Each row against fp32, beside a plain torch run in the same dtype. how: of `SHARPNESS`."""
        step = self._step(name, method, list(self.plan.checked[rows]))
        step.query.mul_(SHARPNESS[how])
        truth = reference_attention(
            step.query.float(), step.keys.float(), step.values.float(), step.metadata, step.options
        )
        with poisoned():
            ours = _attended(step)
        verdict = judge(ours, low_precision(step), truth)
        self.found.errors[case.removeprefix("check ")] = verdict.ratio
        if not verdict.right:
            raise ArithmeticError(str(verdict))
        self.say(f"{case}: the worst row's error is {verdict.ratio:.2f} of a plain torch run's")

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
                self.found.silent[f"{peer}, {kernel} {name} {len(rows)} x {sum(rows[0])}"] = told(error)
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


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("kernels", __doc__)
    add = parser.add_argument
    options.toy(parser)
    add("--minutes", type=float, default=7.5, help="no case begins after these")
    add("--only", choices=list(KINDS), default="all", help="no other cases")
    add("--checks", nargs="+", choices=[*FULL.checked, *TOY.checked], help="no other lengths of rows are checked")
    add("--models", nargs="+", choices=list(FULL.models), help="no other shapes")
    add("--name", default="kernels", help="of the files that it leaves")
    asked, console = parser.parse_args(arguments), options.console()
    if asked.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is at the first launch
    torch.manual_seed(0)
    until = time.monotonic() + 60 * asked.minutes
    device, plan = card(asked.toy), TOY if asked.toy else FULL
    if asked.checks:
        plan = replace(plan, checked={name: rows for name, rows in plan.checked.items() if name in asked.checks})
    if asked.models and not asked.toy:
        plan = replace(plan, models={name: plan.models[name] for name in asked.models})
    bench = Bench(plan, device, partial(console.print, markup=False), asked.only)
    # Under the interpreter few programs: most of them would have nothing to do.
    with patch("prerope.cache.kernels.triton.decode.ITEMS", 4) if asked.toy else nullcontext():
        bench.run(until, asked.out, asked.name)
    report(bench.found, asked.name).publish(asked.out, console)
    return 1 if bench.found.failures else 0


if __name__ == "__main__":
    options.run("kernels", main)
