"""Does the engine on this card do what it does without graphs? Tiny models with drawn weights, heads of 128 in bf16.

    python -m bench.gpu.tiny           # on a card; --toy proves the program without one

- the fused stack and CUDA graphs are found; what is missing is told, with the reason, and fails;
- logits of every decode step that is replayed are those of the same step without a graph: to the bit where rows fill
  their graph, and within rounding where they do not, since products of other shapes add up in another order;
- two engines in one process, each with graphs of its own, whose steps take turns, give what each gives alone.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from prerope.server.engine.engine import Engine

from bench.shared import options
from bench.shared.engines import add
from bench.shared.machine import card, describe_machine
from bench.shared.report import Report, Table
from bench.shared.shapes import MODELS
from bench.step.floor import open_engine

ROUNDING = 2e-2
"""Of the largest logit: what another order of sums may change in bf16."""

PROMPTS = (40, 250, 270)
"""Tokens: one row crosses the trained length, 256, and one is past it."""


def drawn(method: str, toy: bool, say: Callable[[str], None]) -> Engine:
    torch.manual_seed(0)
    asked = argparse.Namespace(
        device="cpu" if toy else "cuda", dtype="auto", methods=[method], rows=[1, 4], steps=8, contexts=[300],
        prompt=300, budget=128, shape="toy" if toy else "tiny",
    )  # fmt: skip
    return open_engine(MODELS["toy" if toy else "tiny"], asked, say)


def start(engine: Engine, prompts: Sequence[int], max_tokens: int = 12) -> None:
    for number, length in enumerate(prompts):
        add(engine, str(number), length, max_tokens, seed=number, cache_salt=str(number), speculation=True)


def finish(engines: Sequence[Engine]) -> list[dict[str, list[int]]]:
    """Tokens of each engine's requests, whose steps take turns."""
    found: list[dict[str, list[int]]] = [{} for _ in engines]
    while any(engine.has_work() for engine in engines):
        for tokens, engine in zip(found, engines, strict=True):
            for name, output in engine.step():
                tokens.setdefault(name, []).extend(output.token_ids)
    return found


def graph_differences(engine: Engine) -> dict[int, float]:
    """By the number of rows, the largest difference of a replayed step's logits, over the largest logit."""
    graphs, found = engine.graphs, dict[int, float]()
    assert graphs is not None
    replayed = graphs.logits

    def compared(batch: Any) -> Any:
        ours = replayed(batch)
        if ours is not None:
            rows = len(ours)
            eager = engine.model.forward(batch, engine.storage)  # stores the same rows once more
            off = float((ours - eager).abs().max() / eager.abs().max())
            found[rows] = max(off if off == off else float("inf"), found.get(rows, 0.0))
        return ours

    graphs.logits = compared  # type: ignore[method-assign]
    for count in (1, 2, 3):
        start(engine, PROMPTS[-count:])
        finish([engine])
    del graphs.logits
    return found


def judge(toy: bool, say: Callable[[str], None], found: dict[str, str], wrong: list[str]) -> None:
    """Adds to what was found, and to what is wrong, as it comes: the time may end."""
    engines = [drawn(method, toy, say) for method in ("rerope", "dynamic_leaky")]
    for name, engine in zip(("rerope", "dynamic_leaky"), engines, strict=True):
        stack, stats = engine.model.stack, engine.stats().graphs
        found[f"{name}: stack"] = "none" if stack is None else type(stack).__name__
        found[f"{name}: graphs"] = f"{stats.num_captured}; {stats.why_none or 'nothing is amiss'}"
        if not toy:
            wrong += [f"{name}: no fused stack"] * (stack is None)
            wrong += [f"{name}: no graphs: {stats.why_none}"] * (not stats.num_captured)
        differences = graph_differences(engine) if engine.graphs is not None else {}
        for rows, off in sorted(differences.items()):
            found[f"{name}: {rows} rows of a graph"] = f"{off:.1e}"
            allowed = ROUNDING if rows == 3 else 0.0  # 3 rows are in a graph of 4
            wrong += [f"{name}: logits of {rows} rows differ from the step's by {off:.1e}"] * (not off <= allowed)
    alone = []
    for engine in engines:
        start(engine, PROMPTS)
        alone += finish([engine])
    for engine in engines:
        start(engine, PROMPTS)
    same = finish(engines) == alone
    found["two engines in turn"] = "as alone" if same else "otherwise"
    wrong += ["two engines whose steps take turns give other tokens than alone"] * (not same)
    del engines[0], engine
    gc.collect()
    start(engines[0], PROMPTS)
    wrong += ["an engine gives other tokens once the other is gone"] * (finish(engines) != alone[1:])


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("gpu.tiny", __doc__, "gpu")
    options.toy(parser)
    asked, console = parser.parse_args(arguments), options.console()
    device, found, wrong = card(asked.toy), dict[str, str](), list[str]()
    try:
        judge(asked.toy, partial(console.print, markup=False), found, wrong)
    except KeyboardInterrupt:
        wrong.append("the time was up; the rest was not asked")
    about = describe_machine(device)
    table = Table(["asked", "found"], list(found.items()), [f"wrong: {one}" for one in wrong], left=(0, 1))
    Report("tiny", [table], {"machine": about, "found": found, "failures": wrong}).publish(asked.out, console)
    return 1 if wrong else 0


if __name__ == "__main__":
    options.run("gpu.tiny", main)
