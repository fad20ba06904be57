"""The kinds of work that clients may ask for, and what one request of each may use."""

from __future__ import annotations

from prerope.server.workers.messages import Limits
from prerope.server.workers.pool import Lane

INLINE_BYTES = 4096
"""A body that is larger is a worker's."""

MEBIBYTE = 2**20

GRAMMAR = Lane(
    "grammar",
    at_once=4,
    limits=Limits(cpu_s=3, memory_bytes=128 * MEBIBYTE, stack_bytes=512 * MEBIBYTE),
    doing="compiling the grammar",
)
SMALL_BODY = Lane(
    "small body",
    at_once=8,
    limits=Limits(cpu_s=10, memory_bytes=256 * MEBIBYTE),
    doing="reading the body, with the tokenizer and the model's chat template,",
)
LARGE_BODY = Lane(
    "large body",
    at_once=2,
    limits=Limits(cpu_s=30, memory_bytes=768 * MEBIBYTE),
    doing="reading the body, with the tokenizer and the model's chat template,",
)

LANES = (GRAMMAR, SMALL_BODY, LARGE_BODY)
