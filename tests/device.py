"""The device that the tests run on: the CPU, or a card with `make test DEVICE=cuda` (or cuda:1).

It is decided before torch is imported, once for a session and its workers. Without DEVICE a card stays hidden, so that
DEVICE=auto, the server's default, is the CPU in every test and every process that a test starts.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

CHOSEN = "PREROPE_TEST_DEVICE"
VISIBLE = "CUDA_VISIBLE_DEVICES"


def choose(environment: MutableMapping[str, str]) -> str:
    """cpu or cuda. DEVICE leaves the environment: a test sets the server's own; workers find the choice in CHOSEN."""
    asked = environment.pop("DEVICE", "cpu").lower()
    name, _, number = environment.setdefault(CHOSEN, asked).partition(":")
    if name == "cpu":
        environment[VISIBLE] = ""
    elif number:
        environment[VISIBLE] = number
    # Read when Triton is imported, by whatever comes first. On a GPU its kernels are compiled.
    environment.setdefault("TRITON_INTERPRET", "1" if name == "cpu" else "0")
    return name


DEVICE = choose(os.environ)
