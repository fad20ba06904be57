"""Decode steps and prefill of a known shape with random weights, beside the floor that memory sets.

    floor = (bytes of the weights that a step reads + K and V of its rows) ÷ the copy bandwidth measured here

The engine is loaded and stepped as it is served, the probe against transformers included: only, the weights are not
read but drawn, in memory and on the device, for a folder that holds a config and nothing else. Contexts are not
prefilled: every slot of the cache gets random keys and values, and the cache is told that its blocks hold a request's
prompt, so that the request finds its prefix there, computes its last block and decodes.

Rounds take the methods of a case one after the other, and a ratio of two methods is the median of the rounds' ratios:
what slows a round slows both. A step's time is the median of steps that end when their tokens are on the host.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from prerope.rope.spec import RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.engine.engine import Engine
from prerope.server.engine.loading import load_engine
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.models.model import choose_device
from rich.console import Console

from bench.shared.clock import Clock, copy_rate, seconds_of
from bench.shared.engines import add, fill, outputs
from bench.shared.machine import describe_machine
from bench.shared.report import told
from bench.shared.shapes import MODELS, ModelShape
from bench.step.report import Found, report

WARM_STEPS = 8
"""Kernels are compiled, graphs captured and caches warm after these."""
BLOCK_SIZE = 16


class Floor:
    """One engine, and what its steps take. Seconds a decode step, and tokens a second of prefill, a value a round."""

    def __init__(self, engine: Engine, methods: Sequence[str], steps: int) -> None:
        self.engine, self._steps = engine, steps
        self._positions = {name: engine.resolve_positions(RopeSpec(method=name)) for name in methods}
        self._numbers = itertools.count()
        scatter(engine)
        fill(engine)

    def fits(self, rows: int, context: int) -> bool:
        blocks = rows * -(-longest(context, self._steps, rows) // BLOCK_SIZE)
        return blocks <= self.engine.scheduler.cache.pool.num_blocks

    def decode(self, method: str, rows: int, context: int) -> float:
        """Median seconds of a step of `rows` sequences with `context` tokens each."""
        engine, most = self.engine, longest(0, self._steps, rows)
        names = [self._add(method, context, most, known=True) for _ in range(rows)]
        while any(not sequence.decoding for sequence in engine.scheduler.sequences):
            engine.step()
        taken = [seconds_of(engine.step) for _ in range(WARM_STEPS + self._steps)]
        for name in names:
            engine.abort(name)
        self._finish()  # the step that is under way
        return statistics.median(taken[WARM_STEPS:])

    def prefill(self, method: str, tokens: int) -> float:
        """Tokens a second, from the first chunk to the first token."""
        self._add(method, tokens, 1, known=False)
        return tokens / seconds_of(self._finish)

    def _finish(self) -> None:
        deque(outputs(self.engine), maxlen=0)

    def _add(self, method: str, tokens: int, max_tokens: int, *, known: bool) -> str:
        """Queue a prompt that no other shares a block with; known: it is in the cache but for its last block."""
        number = next(self._numbers)
        name = f"request {number}"
        add(self.engine, name, tokens, max_tokens, number, positions=self._positions[method], cache_salt=name)
        if known:
            pretend(self.engine, name)
        return name


def pretend(engine: Engine, request_id: str) -> None:
    """Let the cache believe that it holds the full blocks of a waiting request's prompt."""
    sequence, pool = engine.scheduler.waiting[request_id], engine.scheduler.cache.pool
    hashes = sequence.hasher.extend(sequence.token_ids)
    blocks = pool.allocate(len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.remember(block, block_hash)
    pool.release(blocks)


def scatter(engine: Engine) -> None:
    """Free blocks are taken in no order from now on, as after a day's traffic."""
    pool = engine.scheduler.cache.pool
    blocks = pool.allocate(pool.num_free)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0)).tolist()
    pool.release([blocks[place] for place in order])


def longest(context: int, steps: int, rows: int) -> int:
    """Tokens of a sequence at its last step: rows may begin to decode one after the other."""
    return context + WARM_STEPS + steps + rows + 8


def open_engine(shape: ModelShape, asked: argparse.Namespace, say: Callable[[str], None]) -> Engine:
    """As a checkpoint of that shape is served, with prefix caching and the cache sized by the engine."""
    config, device = shape.config(), choose_device(asked.device)
    context = max(*asked.contexts, asked.prompt)

    def draw(_source: object, *, dtype: Any, attn_implementation: str, **_reading: Any) -> Any:
        from transformers import AutoModelForCausalLM

        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        return model, {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set()}

    settings = EngineConfig(
        dtype="bfloat16" if asked.dtype == "auto" else asked.dtype,
        device=str(device),
        rope=RopeSpec(method=asked.methods[0]),
        rope_per_request=False,  # no start waits for kernels of methods that are not asked for here
        max_model_len=longest(context, asked.steps, max(asked.rows)),
        max_num_seqs=max(asked.rows),
        max_batched_tokens=max(asked.budget, BLOCK_SIZE * max(asked.rows)),
        block_size=BLOCK_SIZE,
        prefix_caching=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        with patch("transformers.AutoModelForCausalLM.from_pretrained", draw):
            return load_engine(Checkpoint(folder, asked.shape), settings, say)


def cells(asked: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """(method, rows, context) of all rounds; prefill has 0 rows. Methods take turns at being first."""
    cases = [(rows, context) for context in asked.contexts for rows in asked.rows]
    cases += [(0, asked.prompt)] if asked.prompt else []
    for number in range(asked.rounds):
        for rows, context in cases:
            for method in asked.methods[:: -1 if number % 2 else 1]:
                yield method, rows, context


def measure(floor: Floor, found: Found, cell: tuple[str, int, int], until: float) -> str:
    """One cell into the report; a line that says what it gave, or why it was left out."""
    method, rows, context = cell
    case = f"decode {rows} x {context:,} {method}" if rows else f"prefill {context:,} {method}"
    if time.monotonic() > until:
        found.left_out.setdefault(case, "the time was up")
    elif rows and not floor.fits(rows, context):
        found.left_out[case] = f"the cache holds {floor.engine.info.num_cache_tokens:,} tokens"
    elif rows:
        seconds = floor.decode(method, rows, context)
        found.decode.setdefault(cell, []).append(seconds)
        return f"{case}: {seconds * 1e3:.3f} ms, {seconds / found.floor(rows, context):.2f} of the floor"
    else:
        rate = floor.prefill(method, context)
        found.prefill.setdefault(method, []).append(rate)
        return f"{case}: {rate:,.0f} tokens a second"
    return f"{case}: left out, {found.left_out[case]}"


def run(asked: argparse.Namespace, console: Console) -> int:
    """Measure, print tables and targets, leave step.json and step.md in --out. 1: the engine failed."""
    until = time.monotonic() + 60 * asked.minutes
    shape, device = MODELS[asked.shape], choose_device(asked.device)
    say = partial(console.print, markup=False)
    copied = copy_rate(Clock(device))  # before the engine takes the memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
    engine = open_engine(shape, asked, say)
    dtype = engine.model.dtype
    about = describe_machine(device) | {"shape": asked.shape, "dtype": engine.info.dtype}
    about |= {name: getattr(asked, name) for name in ("steps", "rounds", "budget", "prompt")}
    about |= {"num_cache_tokens": engine.info.num_cache_tokens, "copy_bytes_per_s": copied}
    stack, graphs = engine.model.stack, engine.stats().graphs
    about["stack"] = "none" if stack is None else type(stack).__name__
    about["graphs"] = f"{graphs.num_captured} captured" if graphs.num_captured else f"none: {graphs.why_none}"
    found = Found(asked.methods, shape.read_bytes(dtype), shape.token_bytes(dtype), about)
    try:
        floor = Floor(engine, asked.methods, asked.steps)
        for cell in cells(asked):
            say(measure(floor, found, cell, until))
            report(found).save(asked.out)
    except Exception as error:  # what was measured before is told all the same
        found.failures["engine"] = told(error)
        say(f"failed: {found.failures['engine']}")
        report(found).save(asked.out)
    report(found).publish(asked.out, console)
    return 1 if found.failures else 0
