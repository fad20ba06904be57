"""How many threads libraries take, by the environment, said before torch is imported; and whom threads let go first.

A leaf, as `places` is.
"""

from __future__ import annotations

import contextlib
import os
import sys

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


SWITCH_S = 0.0005
"""How long a thread keeps the interpreter's lock from another that waits for it. An operation of torch lets it go and
wants it back, so a step beside a busy event loop waits so long many times; Python's own is ten times this."""


def switch_soon() -> None:
    """Let threads that run Python take turns more often."""
    sys.setswitchinterval(SWITCH_S)


def yield_to_others(nice: int) -> None:
    """Lower the priority of this process (on Linux of this thread and those that it starts): it gets little of a core
    that others want, and interrupts nobody who runs, where the system can."""
    os.nice(nice)
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


ASIDE = 13
"""How nice workers are, and threads whose work a client chooses, beside the engine's: eight of them together have half
as much of a core as one of its threads. (At 10 they had nearly as much, and a stream's gap was three of its steps.)"""


def step_aside() -> None:
    """Lower the priority of this thread alone, where the system can.

    Threads that compute a step wait for one another dozens of times in it. Were a third to want the same two cores as
    much as they do, a step would take three to twenty times as long.
    """
    if sys.platform == "linux":
        yield_to_others(ASIDE)
