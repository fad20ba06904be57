"""Where the time of one engine step goes: decode steps of 1 and 8 rows, and one prefill chunk, by parts, in ms.

The engine runs as it is served; calls are timed from outside, by wrapping them on this one engine:

    stack       all decoder layers in one call: decode steps of few rows on the CPU, in place of the next four
    linears     matrix products, and what is done in one call with them (the gate of an MLP)
    norms       modules called …Norm
    attention   the method's reading of the cache
    store       this step's keys and values into the cache
    lm_head     logits of the rows that sample
    layers      what is left of the model's forward: residual sums, views, transformers' Python
    sampling    from logits to tokens
    scheduling  what is left of the step: the plan, the batch as tensors, outputs

Medians over --steps steps of a whole step's time and of each part, and the slowest whole step. Beside them there may be
sequences (--held) whose replies match an expression of 60,000 letters, each mask of which takes milliseconds: they are
made on other threads, and a step is not to be longer for it than by the rows that have theirs. With one thread on a
CPU, time is the thread's CPU time, which a busy neighbour lengthens less than wall time, and in which waiting does not
show; on a GPU the device is waited for at each border, so the sum of the parts is more than a step that is left alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from prerope.rope.spec import RopeSpec
from prerope.server.engine.engine import Engine
from prerope.server.engine.sequence import EngineRequest, SamplingParams
from prerope.server.engine.step import choose
from prerope.server.models.cpu.products import GatedProducts, Products, RMSNorm
from prerope.server.structured.compile import Cost, compile_here
from prerope.server.structured.matcher import CompiledGrammar
from prerope.server.structured.text import GrammarText
from prerope.server.tokenizer import Tokenizer
from rich.console import Console
from torch import nn

from bench.shared.clock import clock_of
from bench.shared.engines import add, opened
from bench.shared.machine import describe_machine
from bench.shared.report import Report, Table, counted

PARTS = ("stack", "linears", "norms", "attention", "store", "lm_head", "layers", "sampling", "scheduling")
WHOLE = ("step", "slowest")
TOLD = ("dtype", "device", "rows", "steps", "threads", "weights", "method", "context", "chunk", "held")
WARM_STEPS = 3
SLOW_MASKS = GrammarText("regex", 60_000 * "a", "regex")
Times = dict[str, float]


class Stopwatch:
    """Seconds by part, of calls that may nest: a part's time is less what the parts inside it took."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device = device
        self._clock = clock_of(threads if device.type == "cpu" else 0)
        self._inside, self._parts = [0.0], [""]
        self.taken: Times = defaultdict(float)

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()

    def timed(self, part: str, call: Callable[..., Any], within: str | None = None) -> Callable[..., Any]:
        """The same call, timed. within: only where this part is the one that it interrupts."""

        def timed(*arguments: Any, **options: Any) -> Any:
            if within not in (None, self._parts[-1]):
                return call(*arguments, **options)
            self._inside.append(0.0)
            self._parts.append(part)
            began = self.now()
            try:
                return call(*arguments, **options)
            finally:
                whole = self.now() - began
                self._parts.pop()
                self.taken[part] += whole - self._inside.pop()
                self._inside[-1] += whole

        return timed


def part_of(engine: Engine, module: nn.Module) -> str | None:
    """The part that a module's forward is timed as; None: with what is around it."""
    if module is engine.model.raw.model.get_output_embeddings():
        return "lm_head"
    if type(module).__name__.endswith("Norm"):
        return "norms"
    attends = module in {layer.module for layer in engine.model.layers}
    replaced = "forward" in vars(module) and not attends
    return "linears" if isinstance(module, nn.Linear) or replaced else None


@contextmanager
def watched(engine: Engine, stopwatch: Stopwatch) -> Iterator[None]:
    """Inside, every part of this engine's steps is timed."""
    model = engine.model

    with ExitStack() as stack:
        stack.enter_context(patch("prerope.server.engine.step.choose", stopwatch.timed("sampling", choose)))
        for part, owner, attribute in (
            ("store", engine.storage, "store"),
            ("attention", model, "attention"),
            ("layers", model, "forward"),
        ):
            timed = stopwatch.timed(part, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, timed))
        for part, call in (("linears", Products), ("linears", GatedProducts), ("norms", RMSNorm)):
            timed = stopwatch.timed(part, call.__call__, within="layers")
            stack.enter_context(patch.object(call, "__call__", timed))
        if model.stack is not None:
            stack.enter_context(patch.object(model.stack, "run", stopwatch.timed("stack", model.stack.run)))
        for module in model.raw.model.modules():
            found = part_of(engine, module)
            if found is not None:
                stack.enter_context(patch.object(module, "forward", stopwatch.timed(found, module.forward)))
        stack.enter_context(patch.object(engine, "step", stopwatch.timed("scheduling", engine.step)))
        yield


def hold(engine: Engine, count: int, grammar: CompiledGrammar) -> None:
    """So many sequences whose replies match a grammar, and never end: their masks are made beside the others' steps."""
    for number in range(count):
        sampling = SamplingParams(max_tokens=engine.info.max_model_len - 1, temperature=0.0, grammar=grammar)
        engine.add(EngineRequest(f"held {number}", [number], sampling, speculation=False))


def decode_steps(engine: Engine, rows: int, context: int, steps: int) -> Iterator[None]:
    """Yields before each decode step of `rows` sequences, past the first few."""
    while_read = rows * -(-context // engine.config.max_batched_tokens)  # the first decode beside the others' chunks
    for row in range(rows):
        add(engine, f"row {row}", context, WARM_STEPS + steps + while_read + 8, seed=row)
    while any(not one.decoding and one.request_id.startswith("row") for one in engine.scheduler.sequences):
        engine.step()
    for step in range(WARM_STEPS + steps):
        if step >= WARM_STEPS:
            yield
        else:
            engine.step()
    for row in range(rows):
        assert engine.abort(f"row {row}"), f"row {row} ended before the last step that was measured"


def chunk_steps(engine: Engine, rows: int, steps: int) -> Iterator[None]:
    """Yields before each step of one prompt of `rows` tokens, past the first."""
    for step in range(1 + steps):
        add(engine, f"row {step}", rows, 1, seed=step)
        if step == 0:
            engine.step()
        else:
            yield


def measure(engine: Engine, steps: Iterator[None], threads: int) -> dict[str, float]:
    """Median ms of a step and of its parts; steps are measured whole and by parts in turn."""
    wholes, parts = [], []
    for number, _ in enumerate(steps):
        stopwatch = Stopwatch(engine.model.device, threads)
        if number % 2:
            with watched(engine, stopwatch):
                engine.step()
            parts.append(dict(stopwatch.taken))
        else:
            began = stopwatch.now()
            engine.step()
            wholes.append(stopwatch.now() - began)
    found = {"step": statistics.median(wholes), "slowest": max(wholes)}
    found |= {part: statistics.median(taken.get(part, 0.0) for taken in parts) for part in PARTS}
    return {part: 1e3 * seconds for part, seconds in found.items()}


def open_engine(asked: argparse.Namespace, say: Callable[[str], None]) -> Engine:
    engine, checkpoint = opened(
        asked,
        say,
        weight_quantization=asked.weights,
        rope=RopeSpec(method=asked.method),
        max_num_seqs=max(asked.rows) + asked.held,
        max_batched_tokens=max(512, asked.chunk, *asked.rows),
        kv_cache_memory=2**29,
        stream_gap_s=None,
    )
    if asked.held:
        hold(engine, asked.held, compile_here(SLOW_MASKS, Tokenizer.load(checkpoint), Cost(0, 0.0)))
    return engine


def run(asked: argparse.Namespace, console: Console) -> int:
    """Measure, show the table and leave step.json and step.md in --out."""
    engine = open_engine(asked, console.print)
    found = {}
    for rows in asked.rows:
        steps = decode_steps(engine, rows, asked.context, asked.steps)
        found[f"decode, {counted(rows, 'row')}"] = measure(engine, steps, asked.threads)
    if asked.chunk:
        steps = chunk_steps(engine, asked.chunk, max(4, asked.steps // 10))
        found[f"prefill, {counted(asked.chunk, 'row')}"] = measure(engine, steps, asked.threads)
    weights = "" if asked.weights == "none" else f" with {asked.weights} weights"
    device = f"{engine.info.dtype}{weights} on {engine.info.device}"
    note = f"One step, ms, {counted(asked.threads, 'thread')}, {device}."
    rows_shown = [[part, *(f"{times[part]:.2f}" for times in found.values())] for part in WHOLE + PARTS]
    data = {"machine": describe_machine(), "options": {name: getattr(asked, name) for name in TOLD}, "ms": found}
    Report("step", [Table(["part", *found], rows_shown, [note])], data).publish(asked.out, console)
    return 0
