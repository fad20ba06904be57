"""Which of the orders in which bf16 may be multiplied this process keeps to: widened to fp32, or in pairs.

The two round differently, and a row must not see which kernel it meets, so there is one answer for all of them. Where
the processor has an instruction for pairs, `server.models.cpu.trial` finds out at the start whether it pays.
"""

from __future__ import annotations

from prerope.cache.kernels.build import library

_chosen: bool | None = None


def can_multiply_pairs() -> bool:
    """Whether the processor has dot products of bf16 pairs, and the kernels are there."""
    kernels = library()
    return kernels is not None and bool(kernels.prerope_has_dots())


def multiplies_pairs() -> bool:
    """Whether bf16 is multiplied in pairs."""
    return can_multiply_pairs() and _chosen is not False


def multiply_pairs(chosen: bool) -> None:
    """From now on; for models that are loaded afterwards."""
    global _chosen
    _chosen = chosen
