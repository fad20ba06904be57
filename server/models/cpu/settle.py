"""Weights on the CPU in huge pages: a checkpoint's file is mapped in small ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prerope.cache import huge_pages
from prerope.server.machine.allowance import free_memory
from prerope.server.models.quantized.int8 import int8_rows, is_quantized
from torch import Tensor, nn

LEAST_BYTES = 32 << 20
"""Smaller models lie in a processor's caches, or nearly."""

EDGE = 64
"""Bytes: each weight begins on a cache line."""


def settle(model: nn.Module, least_bytes: int = LEAST_BYTES) -> bool:
    """Copy a model's weights to huge pages, and let go of where they were. Whether they were copied.

    They stay where free memory, which a mapped file does not count against, would be halved by the copy, or where there
    are no addresses for it.
    """
    size = sum(map(_room, (tensor for _, _, tensor in _weights(model))))
    if size < least_bytes or size > free_memory().amount / 2:
        return False
    try:
        memory, start = huge_pages.zeros(size), 0
    except MemoryError:  # addresses are limited, too
        return False
    for owner, name, tensor in _weights(model):
        copy = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        setattr(owner, name, copy.copy_(tensor))
        start += _room(tensor)
    return True


def _room(tensor: Tensor) -> int:
    return math.ceil(tensor.nbytes / EDGE) * EDGE


def _weights(model: nn.Module) -> Iterator[tuple[Tensor, str, Tensor]]:
    """(owner, attribute, tensor) of a parameter's data, or of the bytes that torchao keeps for it."""
    for parameter in model.parameters():
        if not is_quantized(parameter):
            yield parameter, "data", parameter.data
        elif (rows := int8_rows(parameter)) is not None:
            yield parameter, "qdata", rows[0]
