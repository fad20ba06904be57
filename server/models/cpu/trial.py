"""Whether this processor multiplies bf16 in pairs or widened, found by timing both, and kept beside the built kernels.

On some processors the dot products of pairs run at twice the rate of fp32, on others at half of it. A deployment keeps
to one of the two for all rows (`cache.kernels.build`), so what counts is both: a chunk of many rows, and single rows.
What it is about is a core, so one thread is timed, by its CPU time: a machine that is busy at the start chooses alike.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from prerope.cache.kernels.build import can_multiply_pairs, library_path, multiply_pairs
from prerope.server.models.cpu.products import Products
from torch import nn

WIDTH = 1024  # inputs and features: what a thread works on is in L2, so that arithmetic is what counts
CHUNK, SINGLE = 256, 32  # rows of the chunk, and how many single rows are as much worth
ROUNDS = 5


def choose_arithmetic() -> str | None:
    """Make the choice, for models that are loaded from now on; a line about it, or None where there is none."""
    if not can_multiply_pairs():
        return None
    kept = _kept()
    try:
        pairs, widened = map(float, json.loads(kept.read_text()) if kept else measure())
    except (OSError, ValueError, TypeError):  # not kept, or not as we keep it
        pairs, widened = measure()
        _keep(kept, (pairs, widened))
    multiply_pairs(pairs <= widened)
    return (
        f"bf16 is multiplied {'in pairs' if pairs <= widened else 'widened to fp32'} on this processor: "
        f"a core took {1e3 * pairs:.1f} ms of trials in pairs, {1e3 * widened:.1f} widened"
    )


def _kept() -> Path | None:
    path = library_path()
    return None if path is None else path.with_name(f"{path.stem}-arithmetic.json")


def _keep(path: Path | None, found: tuple[float, float]) -> None:
    if path is None:
        return
    written = path.with_suffix(f".{os.getpid()}")
    try:
        written.write_text(json.dumps(found))
        os.replace(written, path)
    except OSError:
        return  # a folder that cannot be written to: measured again at the next start


@torch.inference_mode()
def measure() -> tuple[float, float]:
    """Seconds of the trials in pairs, and widened: of several rounds the best counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure()
    finally:
        torch.set_num_threads(threads)


def _measure() -> tuple[float, float]:
    linear = nn.Linear(WIDTH, WIDTH, bias=False).bfloat16().requires_grad_(False)
    rows = [torch.ones(count, WIDTH, dtype=torch.bfloat16) for count in (CHUNK, 1)]
    best = {True: [float("inf")] * 2, False: [float("inf")] * 2}
    for _ in range(ROUNDS):
        for pairs, taken in best.items():
            multiply_pairs(pairs)
            products = Products([linear])
            for place, x in enumerate(rows):
                began = time.thread_time()
                products(x)
                taken[place] = min(taken[place], time.thread_time() - began)
    found = {pairs: chunk + SINGLE * single for pairs, (chunk, single) in best.items()}
    return found[True], found[False]
