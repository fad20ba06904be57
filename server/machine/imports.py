"""What a process imports as it starts stays to its end, and is never looked through for garbage. A leaf."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Around the imports of a start: half a million objects, and looking through them again and again takes a sixth of
    it. Nor is a request to wait while they are looked through."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if enabled:
            gc.enable()
