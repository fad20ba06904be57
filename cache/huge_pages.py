"""Memory on the CPU that is read from end to end, in pages of 2 MiB where the system gives them for the asking.

A step reads all weights and all keys once, so every page's address is looked up anew (decision 53).
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor


def zeros(num_bytes: int) -> Tensor:
    """[num_bytes] uint8, on a page's edge. It takes no memory until it is written to: a start need not touch gigabytes.

    MemoryError: there is no room for its addresses.
    """
    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no room for {num_bytes} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # of a kernel that was built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
