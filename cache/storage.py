"""The tensors of the KV cache: one raw key and one value a token, layer and KV head. Nothing here knows positions.

Beside them lie the states of layers that keep one for a whole sequence, each in a slot (`cache.blocks.states`).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from prerope.cache import huge_pages
from prerope.cache.cpu.bounds import KeyBounds
from prerope.cache.kernels.build import kernels, library
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """KV heads of one layer and the dims of a key and a value."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class StateShape:
    """One tensor of what a layer keeps of a whole sequence."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class KVStorage:
    """keys[layer] and values[layer]: [num_blocks, block_size, Hkv, D]; states: [num_states, …] each."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        states: Sequence[StateShape] = (),
        num_states: int = 0,
        *,
        bounded: bool = False,
    ) -> None:
        """bounded: room for bounds of keys, by which rows may choose what they read."""

        def allocate(heads: int, dim: int) -> Tensor:
            return _zeros((num_blocks, block_size, heads, dim), dtype, device)

        self.keys = [allocate(layer.num_kv_heads, layer.key_dim) for layer in layers]
        self.values = [allocate(layer.num_kv_heads, layer.value_dim) for layer in layers]
        self.bounds: KeyBounds | None = None
        if bounded:
            shapes = [KeyBounds.shape_of(keys.shape) for keys in self.keys]
            self.bounds = KeyBounds(self.keys, [_zeros(shape, dtype, device) for shape in shapes])
        self.states = [_zeros((num_states, *state.shape), state.dtype, device) for state in states]
        self._ahead = huge_pages.Ahead([*self.keys, *self.values] if device.type == "cpu" else [])

    def expect(self, num_blocks: int) -> int:
        """The first so many blocks are used, or about to be: their memory is to be there by then. With how many it is
        to be told again."""
        return self._ahead.reach(num_blocks)

    def store(self, layer: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Write key [T, Hkv, D] and value [T, Hkv, Dv] of packed rows to their slots [T]."""
        keys, values = self.keys[layer], self.values[layer]
        if keys.device.type == "cuda":
            from prerope.cache.cuda.attention import cuda_store

            return cuda_store(key, value, keys, values, slot_mapping)
        contiguous = key.is_contiguous() and value.is_contiguous() and slot_mapping.is_contiguous()
        same_dtypes = key.dtype == keys.dtype and value.dtype == values.dtype
        if library() is None or keys.device.type != "cpu" or not (contiguous and same_dtypes):
            keys.view(-1, *keys.shape[2:]).index_copy_(0, slot_mapping, key.to(keys.dtype))
            values.view(-1, *values.shape[2:]).index_copy_(0, slot_mapping, value.to(values.dtype))
            return None
        tensors = (keys, values, key, value, slot_mapping)
        sizes = (len(key), math.prod(key.shape[1:]) * key.itemsize, math.prod(value.shape[1:]) * value.itemsize)
        kernels.store(*map(ctypes.c_void_p, map(Tensor.data_ptr, tensors)), *map(ctypes.c_int64, sizes))
        return None

    def copy(self, source: Tensor, target: Tensor) -> None:
        """K and V of all layers from slots `source` [n] to slots `target` [n] int64, which do not overlap.

        Keys are raw, so there is nothing to turn wherever they go.
        """
        if self.bounds is not None:
            self.bounds.forget(target)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            key, value = (tensor.view(-1, *tensor.shape[2:]).index_select(0, source) for tensor in (keys, values))
            self.store(layer, key, value, target)

    def read_blocks(self, blocks: Sequence[int]) -> Tensor:
        """K and V of all layers of these blocks: [n, block bytes] uint8 on the device."""
        index = torch.tensor(blocks, device=self.keys[0].device)
        rows = (tensor.index_select(0, index).flatten(1).view(torch.uint8) for tensor in (*self.keys, *self.values))
        return torch.cat(list(rows), dim=1)

    def write_blocks(self, blocks: Sequence[int], payloads: Tensor) -> None:
        """What `read_blocks` gave, into these blocks."""
        index, start = torch.tensor(blocks, device=self.keys[0].device), 0
        if self.bounds is not None:
            self.bounds.forget(index * self.keys[0].shape[1])
        for tensor in (*self.keys, *self.values):
            size = tensor[0].numel() * tensor.itemsize
            rows = payloads[:, start : start + size].contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:])
            tensor.index_copy_(0, index, rows.to(tensor.device))
            start += size


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not empty: no path may ever read a NaN from a slot that was never written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return huge_pages.zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def block_bytes(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype, *, bounded: bool = False) -> int:
    """Bytes of one block over all layers, and of its keys' bounds where there are any."""
    keys = [(1, block_size, layer.num_kv_heads, layer.key_dim) for layer in layers]
    bounds = sum(math.prod(KeyBounds.shape_of(shape)) for shape in keys) * dtype.itemsize
    return block_size * sum(layer.token_bytes(dtype) for layer in layers) + bounds * bounded
