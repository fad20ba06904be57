"""Memory on the CPU that is read from end to end, in pages of 2 MiB where the system gives them for the asking.

A step reads all weights and all keys once, so every page's address is looked up anew (decision 53). A page is given
when it is first written to, to whoever writes, and he waits: 0.2 ms, and 8 to 25 in a virtual machine whose own memory
is given likewise. So what steps will write to is asked for ahead of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE_BYTES = 2 << 20
AHEAD_BYTES = PAGE_BYTES // 2
"""What is asked for beyond what is in use, of each tensor."""

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, of Linux 5.14: pages as if they were written to, with what is in them. Elsewhere an error."""
_NICE = 19


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


class Ahead:
    """Asks for the pages of tensors, whose rows are used in order, a little ahead of their use.

    A thread does so that gives way to all others, and ends when it has caught up.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """All have as many rows, each contiguous from the first on."""
        self._tensors = [tensor for tensor in tensors if tensor.nbytes > PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE")]
        self._num_rows = len(tensors[0]) if self._tensors else 0
        self._stride = min([max(1, AHEAD_BYTES // 4 // tensor[0].nbytes) for tensor in self._tensors], default=0)
        self._asked = [0] * len(self._tensors)  # bytes of each
        self._wanted = 0  # rows
        self._under_way = False

    def reach(self, num_rows: int) -> int:
        """So many are used, or about to be. With how many it is to be told again."""
        if num_rows + self._stride > self._wanted < self._num_rows and not self._under_way:
            self._wanted = min(num_rows + 2 * self._stride, self._num_rows)
            self._under_way = True
            try:
                threading.Thread(target=self._ask, name="pages ahead", daemon=True).start()
            except RuntimeError:  # no more threads: whoever writes to these pages waits for them
                self._under_way = False
        return sys.maxsize if self._wanted >= self._num_rows else max(num_rows, self._wanted - self._stride) + 1

    def _ask(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # of a system where threads have no such priority
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            for place, tensor in enumerate(self._tensors):
                stop = min(self._wanted * tensor[0].nbytes + AHEAD_BYTES, tensor.nbytes)
                while self._asked[place] < stop:
                    self._asked[place] = _populated(tensor, self._asked[place])
        finally:
            self._under_way = False


def _populated(tensor: Tensor, start: int) -> int:
    """Ask for the page of a tensor's byte `start`; the first byte behind it."""
    first = tensor.data_ptr() + start
    stop = min(first // PAGE_BYTES * PAGE_BYTES + PAGE_BYTES, tensor.data_ptr() + tensor.nbytes)
    first = first // mmap.PAGESIZE * mmap.PAGESIZE
    _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), _POPULATE_WRITE)  # or it is as it was
    return stop - tensor.data_ptr()


_libc = ctypes.CDLL(None)
