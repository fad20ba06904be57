"""Which tile sizes, stages and order of the grid are fastest on this card? Candidates beside what is shipped.

    python -m bench.gpu.sweep --minutes 1.5        # on a card; --toy proves the program without one
    python -m bench.gpu.sweep --keep               # and servers on this card take what was fastest
    ncu python -m bench.gpu.sweep --once           # both kernels as they are shipped, a few launches each

A candidate counts only where its rows are those of the shipped configuration, within rounding. One that cannot be
compiled for the card, or asks for more than it has, is told and left out. What is kept (`cache.cuda.tiles`) is of each
kernel the candidate that was fastest over all cases, where it gained enough, for heads of the shape that was measured.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from prerope.cache.cuda.attention import cuda_attention
from prerope.cache.cuda.tiles import Choice, keep
from prerope.server.machine.places import default_cache_dir
from torch import Tensor
from torch.nn.functional import linear

from bench.gpu.sdpa import sdpa_prefill, two_parts
from bench.kernels.cases import FULL, RAW, TOY, Plan, Step, make_step
from bench.kernels.rows import row_errors
from bench.shared import options
from bench.shared.clock import Clock, copy_rate, matmul_rate, warm
from bench.shared.machine import card, describe_machine
from bench.shared.report import NOTHING, Report, Table, told
from bench.shared.shapes import AttentionShape

KERNELS = "prerope.cache.kernels.triton"
SAME = 2e-2
"""Of a row's size: what another order of sums may change in bf16."""

GAIN = 0.98
"""Of the shipped one's time, over all cases: what is not below is noise, and not kept."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """tile: (BLOCK_M, BLOCK_N, warps, stages), None where it is the shipped one; constants: of the kernel's module;
    instead: what is called in place of the module's function of the kernel's name."""

    kernel: str
    tile: tuple[int, int, int, int] | None = None
    constants: dict[str, Any] = field(default_factory=dict)
    instead: Callable[..., None] | None = None

    @property
    def name(self) -> str:
        changed = [*(["x".join(map(str, self.tile))] if self.tile else []),
                   *(f"{name} {value}" for name, value in self.constants.items()),
                   *([self.instead.__name__] if self.instead else [])]  # fmt: skip
        return ", ".join(changed) or "shipped"


DECODE = [
    Candidate("decode"),
    Candidate("decode", constants={"HEADS_FIRST": False}),
    Candidate("decode", (16, 64, 8, 3)),
    Candidate("decode", (16, 64, 4, 4)),
    Candidate("decode", (16, 64, 4, 2)),
    Candidate("decode", (16, 32, 4, 4)),
    Candidate("decode", (16, 128, 8, 2)),
    Candidate("decode", constants={"ITEMS": 1056}),
    Candidate("decode", constants={"ITEMS": 264}),
]
PREFILL = [
    Candidate("prefill"),
    Candidate("prefill", instead=sdpa_prefill),
    Candidate("prefill", (128, 128, 8, 2)),
    Candidate("prefill", (128, 64, 8, 4)),
    Candidate("prefill", (128, 64, 8, 2)),
    Candidate("prefill", (64, 64, 4, 3)),
    Candidate("prefill", (128, 64, 4, 3)),
]


def using(candidate: Candidate) -> ExitStack:
    """Inside, its kernel is launched so."""
    from prerope.cache.kernels.triton.launch import Config

    stack, module = ExitStack(), f"{KERNELS}.{candidate.kernel}"
    if candidate.tile is not None:
        chosen = Config(*candidate.tile)
        stack.enter_context(patch(f"{module}.config", lambda *_, **__: chosen))
    if candidate.instead is not None:
        stack.enter_context(patch(f"{module}.{candidate.kernel}", candidate.instead))
    for name, value in candidate.constants.items():
        stack.enter_context(patch(f"{module}.{name}", value))
    return stack


def attended(step: Step) -> Tensor:
    return cuda_attention(step.query, step.keys, step.values, step.metadata, step.options)


def measured_model(plan: Plan, toy: bool) -> tuple[str, AttentionShape]:
    return next((name, model) for name, model in plan.models.items() if toy or name == "llama-3-8b")


def cases(plan: Plan, toy: bool) -> Iterator[tuple[str, list[Candidate], Callable[[torch.device], Step]]]:
    name, model = measured_model(plan, toy)
    decode = [(2, 96)] if toy else [(8, 32768), (1, 131072)]
    for batch, context in decode:
        for method in (RAW, "rope", "rerope"):
            rows = [(context - 1, 1)] * batch
            made = partial(make_step, model, method, rows, plan.block_size, plan.dtype)
            yield f"decode {name} {batch} x {context:,} {method}", DECODE, made
    count = 96 if toy else 32768
    made = partial(make_step, model, "rope", [(0, count)], plan.block_size, plan.dtype)
    yield f"prefill {name} 1 x {count:,} rope", PREFILL, made
    both = [Candidate("prefill"), Candidate("prefill", instead=two_parts(model.method("rerope").parameters["window"]))]
    made = partial(make_step, model, "rerope", [(0, count)], plan.block_size, plan.dtype)
    yield f"prefill {name} 1 x {count:,} rerope", both, made


def sweep(plan: Plan, toy: bool, device: torch.device, until: float, say: Callable[[str], None]) -> dict[str, Any]:
    """{"ms": by case and candidate, "left out": why}."""
    clock, found, left_out = Clock(device), dict[str, float](), dict[str, str]()
    found_rates = {"byte/s": copy_rate(clock), "FLOP/s": matmul_rate(clock, plan.dtype)}
    # The largest case of prefill first: its candidates gain most.
    for case, candidates, made in sorted(cases(plan, toy), key=lambda one: not one[0].startswith("prefill")):
        step = made(device)
        truth = attended(step)
        for candidate in candidates[: 2 if toy else None]:
            name = f"{case}: {candidate.name}"
            if time.monotonic() > until:
                left_out[name] = "the time was up"
                continue
            try:
                with using(candidate):
                    step.metadata.plans.clear()
                    off = float(row_errors(attended(step), truth).max())
                    if not off <= SAME:
                        raise ArithmeticError(f"its rows are off by {off:.1e}")
                    found[name] = 1e3 * clock.seconds(partial(attended, step))
                say(f"{name}: {found[name]:.3f} ms")
            except Exception as error:  # one that this card does not take
                left_out[name] = told(error)
                say(f"{name}: left out, {left_out[name]}")
    if time.monotonic() < until:
        found |= products(clock, plan.dtype, toy, left_out)
    return {"rates": found_rates, "ms": found, "left out": left_out}


def products(clock: Clock, dtype: torch.dtype, toy: bool, left_out: dict[str, str]) -> dict[str, float]:
    """Of one row, by torch and by a kernel of its own: shapes of an 8B Llama's layer."""
    from bench.gpu.gemv import gemv

    found = dict[str, float]()
    shapes = [(64, 512)] if toy else [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    for outputs, size in shapes:
        x, weight = (torch.randn(rows, size, dtype=dtype, device=clock.device) for rows in (1, outputs))
        case, expected = f"GEMV {outputs} x {size}", linear(x, weight)
        found[f"{case}: shipped"] = 1e3 * clock.seconds(partial(linear, x, weight))
        off = float((gemv(x, weight) - expected).abs().max() / expected.abs().max())
        if off <= SAME:
            found[f"{case}: gemv"] = 1e3 * clock.seconds(partial(gemv, x, weight))
        else:
            left_out[f"{case}: gemv"] = f"it is off by {off:.1e}"
    return found


def fastest(ms: dict[str, float], kernel: str, candidates: Sequence[Candidate]) -> Candidate | None:
    """Over all cases of this kernel in which others than the shipped one were asked; None where that one is."""
    names = [name.rsplit(": ", 1) for name in ms if name.startswith(kernel)]
    asked = {case for case, name in names if any(name == one.name for one in candidates[1:])}
    shares = {}
    for one in candidates[1:]:
        found = [ms.get(f"{case}: {one.name}", float("inf")) / ms[f"{case}: shipped"] for case in asked]
        if one.instead is None and found:
            shares[one.name] = statistics.geometric_mean(found) if max(found) < float("inf") else float("inf")
    best = min(candidates[1:], key=lambda one: shares.get(one.name, float("inf")))
    return best if shares.get(best.name, float("inf")) < GAIN else None


def choices(ms: dict[str, float], plan: Plan, toy: bool) -> list[Choice]:
    """What `cache.cuda.tiles` keeps of these times."""
    _, model = measured_model(plan, toy)
    shape = model.query_heads // model.kv_heads, model.head_dim, str(plan.dtype).removeprefix("torch.")
    found = []
    for kernel, candidates in (("decode", DECODE), ("prefill", PREFILL)):
        if (best := fastest(ms, kernel, candidates)) is not None:
            grid = best.constants.get("HEADS_FIRST"), best.constants.get("ITEMS")
            found.append(Choice(kernel, *shape, best.tile, *grid))
    return found


def once(plan: Plan, toy: bool, device: torch.device) -> None:
    """A few launches of each kernel, for a profiler."""
    for case, _, made in cases(plan, toy):
        if case.startswith("prefill") or "1 x 131" in case or toy:
            step = made(device)
            for _ in range(3):
                attended(step)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tables(found: dict[str, Any]) -> list[Table]:
    rows = []
    for name, ms in found["ms"].items():
        case, candidate = name.rsplit(": ", 1)
        shipped = found["ms"].get(f"{case}: shipped")
        rows.append([case, candidate, f"{ms:.3f}", NOTHING if shipped is None else f"{ms / shipped:.3f}"])
    notes = [f"left out: {name}: {why}" for name, why in found["left out"].items()]
    return [Table(["case", "BLOCK_M x BLOCK_N x warps x stages", "ms", "÷ shipped"], rows, notes, left=(0, 1))]


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("gpu.sweep", __doc__, "gpu")
    add = parser.add_argument
    options.toy(parser)
    add("--minutes", type=float, default=1.5, help="no candidate begins after these")
    add(
        "--keep",
        type=Path,
        nargs="?",
        const=default_cache_dir(),
        metavar="CACHE_DIR",
        help="write what was fastest there, the server's own folder where none is named",
    )
    add("--once", action="store_true", help="launch each kernel a few times as it is shipped, and measure nothing")
    asked, console = parser.parse_args(arguments), options.console()
    if asked.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is at the first launch
    torch.manual_seed(0)
    device, plan = card(asked.toy), TOY if asked.toy else FULL
    if asked.once:
        once(plan, asked.toy, device)
        return 0
    warm(device)
    until = time.monotonic() + 60 * asked.minutes
    found = sweep(plan, asked.toy, device, until, partial(console.print, markup=False))
    data = {"machine": describe_machine(device)} | found
    Report("sweep", tables(found), data).publish(asked.out, console)
    if asked.keep is not None and found["ms"]:
        best = choices(found["ms"], plan, asked.toy)
        console.print(f"kept in {keep(asked.keep, data['machine']['device'], best)}", markup=False)
        for line in [one.described for one in best] or ["what is shipped is as fast as any"]:
            console.print(line, markup=False)
    return 0 if found["ms"] else 1


if __name__ == "__main__":
    options.run("gpu.sweep", main)
