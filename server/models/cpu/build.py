"""The C kernels of the CPU that a server has: those of attention, and here those of linear layers, in one library.

A step of few rows runs whole layers in one parallel region, attention among them, so the two are linked together.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from prerope.cache.kernels import build

SOURCES = Path(__file__).parent / "c"
FUNCTIONS: build.Functions = {
    **build.FUNCTIONS,
    **dict.fromkeys(("linear", "gated", "rms_norm", "layers")),
    "linear_scratch": ctypes.c_int64,
}


def prepare(directory: Path | None) -> str:
    """Load or build all of them, as `cache.kernels.build.prepare` does."""
    return build.prepare(directory, (build.SOURCES, SOURCES), FUNCTIONS)
