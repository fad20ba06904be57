"""Which of the orders in which bf16 may be multiplied this process keeps to: widened to fp32, or in pairs.

The two round differently, and a row must not see which kernel it meets, so there is one answer for all of them.
"""

from __future__ import annotations

from prerope.cache.kernels.build import library


def multiplies_pairs() -> bool:
    """Whether bf16 is multiplied by the processor's dot products of pairs."""
    kernels = library()
    return kernels is not None and bool(kernels.prerope_has_dots())
