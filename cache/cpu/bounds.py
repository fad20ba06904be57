"""Bounds of raw keys: the smallest and the largest value of each dim of some keys, by which rows choose what they read.

They are made when a row first asks for them, and forgotten when anything is written to the block, so that whatever
moves keys (steps, copies, tiers, truncation) need not know more than that. Keys are raw: no position method, and no
place in a sequence, changes them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from prerope.cache.attention.selection import UNIT, far_units
from prerope.cache.attention.types import SequenceRows
from prerope.cache.kernels.build import DTYPES, kernels, reads
from torch import Tensor


class KeyBounds:
    """The bounds of the keys of all blocks and layers of one cache. Used by one thread."""

    def __init__(self, keys: Sequence[Tensor], bounds: Sequence[Tensor]) -> None:
        """keys: [num_blocks, block_size, Hkv, D] a layer; bounds: as `shape_of` says, of the same dtype."""
        self._keys = keys
        self._of = {own.data_ptr(): tensor for own, tensor in zip(keys, bounds, strict=True)}
        self._block_size = keys[0].shape[1]
        self._grain = min(UNIT, self._block_size)
        self._known = np.zeros(len(keys[0]), dtype=bool)

    @staticmethod
    def shape_of(keys: Sequence[int]) -> tuple[int, ...]:
        """[grains, 2, Hkv, D] for keys [num_blocks, block_size, Hkv, D]."""
        return (keys[0] * max(1, keys[1] // UNIT), 2, *keys[2:])

    def of(self, keys: Tensor) -> Tensor:
        """The bounds of the layer whose cached keys these are."""
        return self._of[keys.data_ptr()]

    def forget(self, slots: Tensor) -> None:
        """Something is written to these slots."""
        self._known[slots.numpy() // self._block_size] = False

    def prepare(self, sequences: Iterable[SequenceRows]) -> None:
        """Make all that rows of these sequences choose by and that is not there. Their far keys are in the cache."""
        for sequence in sequences:
            if sequence.length <= sequence.selects_from:
                continue
            _, stop = far_units(sequence.length - 1)
            num_blocks = -(-stop * UNIT // self._block_size)
            if num_blocks * self._block_size > sequence.start:
                raise AssertionError("a step's rows would choose among keys of the same step")
            blocks = sequence.block_table.numpy()[:num_blocks]
            missing = blocks[~self._known[blocks]]
            if len(missing):
                self._make(missing)
                self._known[missing] = True

    def _make(self, blocks: NDArray[np.int64]) -> None:
        of_block = self._block_size // self._grain
        grains = (blocks[:, None] * of_block + np.arange(of_block)).ravel()
        for keys in self._keys:
            bounds = self.of(keys)
            if not reads(keys.dtype):
                own = keys.view(-1, self._grain, *keys.shape[2:])[torch.from_numpy(grains)]
                bounds[torch.from_numpy(grains)] = torch.stack([own.amin(1), own.amax(1)], dim=1)
                continue
            addresses = map(ctypes.c_void_p, (keys.data_ptr(), bounds.data_ptr(), grains.ctypes.data))
            sizes = (len(grains), self._grain, math.prod(keys.shape[2:]), DTYPES[keys.dtype])
            kernels.bounds(*addresses, *map(ctypes.c_int64, sizes))
