"""Hooks on modules, for a while. A leaf."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Inside, these hooks are in place; after it none of them is, whatever happened."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()
