"""Time of a decode step against context length, for each position method, with nothing prefilled.

    python -m bench.decode --methods rope,rerope,yarn,dynamic_leaky --contexts 1024,2048,4096,8192,16384,32768

Random keys and values are written into the engine's cache once; all methods read the same ones, since raw keys know no
method. A step is what the engine does for a decode: the batch as tensors, the model's forward, the largest logit. The
steps of a cell are consecutive and end at its context, as in a generation; the first is left out. The scheduler and
the reply are not timed: they know nothing of the context.

Machines are noisy, so cells are measured in rounds, methods of one context beside each other and in another order each
round, and methods are compared within a round: a ratio is the median of the rounds' ratios, not a ratio of medians.
A served process also sets GOMP_SPINCOUNT (`server.settings.SPIN_COUNT`): set it in the shell to measure with it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import torch
from prerope.cache.storage import KVStorage
from prerope.rope.model import ModelPositions
from prerope.server.config import EngineConfig
from prerope.server.engine.engine import Engine
from prerope.server.errors import PreRopeError
from prerope.server.models.batch import Chunk, build_batch
from prerope.server.models.checkpoint import checkpoint_name, resolve_checkpoint
from prerope.server.settings import default_cache_dir
from rich.console import Console
from tqdm import tqdm

from bench import OUTPUT_FOLDER, WIDTH
from bench.decode_report import DecodeReport, Rounds, save
from bench.machine import describe_machine
from bench.quality import parse_lengths, parse_methods
from bench.report import publish

DEFAULT_METHODS = "rope,rerope,yarn,dynamic_leaky"
DEFAULT_CONTEXTS = "1024,2048,4096,8192,16384,32768"
CACHE_SHARE = 0.8  # of free memory: refused beyond, not swapped


class Decoding:
    """Rows of one length that decode side by side, each with cache blocks of its own, in no order."""

    def __init__(self, engine: Engine, rows: int, seed: int = 0) -> None:
        self._engine = engine
        self._block_size = engine.config.block_size
        per_row = -(-engine.info.max_model_len // self._block_size)
        shuffled = torch.randperm(rows * per_row, generator=torch.Generator().manual_seed(seed))
        self._tables: list[list[int]] = shuffled.view(rows, per_row).tolist()
        self._tokens = [0] * rows

    def step(self, positions: ModelPositions, context: int) -> None:
        """One token a row, the last of `context`; the tokens it gives are the next step's."""
        chunks = [
            Chunk([token], context - 1, table, positions, 1)
            for token, table in zip(self._tokens, self._tables, strict=True)
        ]
        batch = build_batch(chunks, self._block_size, self._engine.model.device)
        self._tokens = self._engine.model.forward(batch, self._engine.storage).argmax(-1).tolist()

    def seconds(self, positions: ModelPositions, context: int, steps: int) -> float:
        """Median of `steps` steps that end at `context`, after one that is not counted."""
        taken = []
        for length in range(context - steps, context + 1):
            began = time.perf_counter()
            self.step(positions, length)  # the tokens have arrived when it ends, on a GPU too
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[1:])


def fill(storage: KVStorage, seed: int = 0) -> None:
    """Random keys and values in every slot."""
    generator = torch.Generator(storage.keys[0].device).manual_seed(seed)
    for tensor in (*storage.keys, *storage.values):
        tensor.normal_(generator=generator)


def cells(
    contexts: Sequence[int], methods: Sequence[str], rounds: int, seed: int = 0
) -> Iterator[tuple[int, int, str]]:
    """(round, context, method): every cell once a round, a context's methods in a row; each round in a new order."""
    draw = random.Random(seed)
    for number in range(rounds):
        for context in draw.sample(contexts, len(contexts)):
            for method in draw.sample(methods, len(methods)):
                yield number, context, method


def measure(engine: Engine, options: argparse.Namespace) -> Rounds:
    """ms a step by (method, context), a value a round."""
    positions = {method.label: engine.resolve_positions(method.spec) for method in options.methods}
    decoding = Decoding(engine, options.rows)
    fill(engine.storage)
    for method in positions:  # pages touched and scratch made, for the longest step
        decoding.step(positions[method], options.contexts[-1])
    found: Rounds = {(method, context): [] for method in positions for context in options.contexts}
    total = options.rounds * len(found)
    with tqdm(cells(options.contexts, list(positions), options.rounds), total=total, unit=" cells") as bar:
        for number, context, method in bar:
            bar.set_description(f"round {number + 1}, {context:,} tokens, {method}", refresh=False)
            found[method, context].append(1e3 * decoding.seconds(positions[method], context, options.steps))
    return found


def load_engine(options: argparse.Namespace, say: Callable[[str], None]) -> Engine:
    """As it is served, with room for all rows at the longest context and no more."""
    config = EngineConfig(
        dtype=options.dtype,
        device=options.device,
        max_model_len=options.contexts[-1],
        max_num_seqs=options.rows,
        max_batched_tokens=max(512, options.rows),
        kv_cache_memory=_memory_for_cache(options.device),
        prefix_caching=False,
        cache_dir=default_cache_dir(),
    )
    return Engine.load(resolve_checkpoint(options.model, None, say), config, say)


def _memory_for_cache(device: str) -> int | None:
    """A bound only: the engine takes what max_num_seqs sequences need. None: the engine's own choice, on a GPU."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return None if on_gpu else int(psutil.virtual_memory().available * CACHE_SHARE)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--methods", type=parse_methods, default=DEFAULT_METHODS, metavar="A,B", help="compared with the first")
    add("--contexts", type=parse_lengths, default=DEFAULT_CONTEXTS, metavar="N,N", help=f"default: {DEFAULT_CONTEXTS}")
    add("--rows", type=int, default=1, help="sequences in a step; default: 1")
    add("--rounds", type=int, default=20, help="default: 20")
    add("--steps", type=int, default=5, help="of a cell in a round; default: 5")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--model", metavar="MODEL", help="local folder, hub id or .gguf; default: the embedded model")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32; default: auto")
    add("--device", default="auto", help="default: auto")
    add("--out", type=Path, default=OUTPUT_FOLDER, help="folder for JSON, markdown and plot; default: bench/out")
    options = parser.parse_args(arguments)
    for name in ("rows", "rounds", "steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.contexts[0] <= options.steps:
        parser.error(f"--contexts {options.contexts[0]}: must be more than the {options.steps} --steps that end there")
    labels = [method.label for method in options.methods]
    if len(set(labels)) < len(labels):
        parser.error(f"--methods {','.join(labels)}: each once")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    about = describe_machine()
    try:
        engine = load_engine(options, lambda line: console.print(line, highlight=False))
        found = measure(engine, options)
    except PreRopeError as error:
        print(f"bench.decode: {error}", file=sys.stderr)
        return 1
    token_bytes = sum(layer.shape.token_bytes(engine.storage.keys[0].dtype) for layer in engine.model.layers)
    about |= {"model": checkpoint_name(options.model), "dtype": engine.info.dtype, "device": engine.info.device}
    about |= {name: getattr(options, name) for name in ("rows", "rounds", "steps", "threads")}
    about |= {"train_length": engine.info.train_length, "cache_bytes_per_token": token_bytes}
    report = DecodeReport([method.label for method in options.methods], options.contexts, found, about)
    publish(report, save, options.out, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
