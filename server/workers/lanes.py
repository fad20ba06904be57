"""The kinds of work that clients may ask for, and what one request of each may use."""

from __future__ import annotations

from prerope.server.workers.messages import Limits
from prerope.server.workers.pool import Lane

MEBIBYTE = 2**20

GRAMMAR = Lane(
    "grammar",
    at_once=4,
    limits=Limits(cpu_s=3, memory_bytes=128 * MEBIBYTE, stack_bytes=512 * MEBIBYTE),
    doing="compiling the grammar",
)

LANES = (GRAMMAR,)
