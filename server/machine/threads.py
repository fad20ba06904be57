"""How many threads libraries take, by the environment: said before torch is imported. A leaf, as `places` is."""

from __future__ import annotations

import os

SPIN_COUNT = 10_000
"""Turns an OpenMP thread waits for another before it sleeps, 0.2 ms. GNU's 300,000 are 5 ms, in which a thread may keep
the one it waits for from running: where other programs want the cores too, a step then takes ten times as long."""


def let_waiting_threads_sleep() -> None:
    """Before torch is imported, which reads it once: `SPIN_COUNT`, unless the environment has a say in it."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def limit_threads(num_threads: int) -> int:
    """Before torch is imported, which reads it once, as the tokenizer its own: unless the environment has a say."""
    given = os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    os.environ.setdefault("RAYON_NUM_THREADS", given)
    return int(given) if given.isdigit() else num_threads
