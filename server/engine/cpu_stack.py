"""All decoder layers in one call, for decode steps of few rows: kernels/layers.c.

A product of a small model takes 15 to 100 µs, and the way to the next one through Python as long. Where every layer
has the short forward of `cpu_layers`, with the norms, products and gate of `cpu_kernels`, the first layer's forward
does them all, to the same bit, and the others hand on what they get. Other steps and models run layer by layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cache.attention import AttentionMetadata, AttentionOptions
from cache.decode import DecodePlan, DecodeShape, plan_step
from cache.native import library
from cache.storage import KVStorage
from server.engine.cpu_kernels import FEW_ROWS, MULTIPLE, GatedProducts, KernelLinear, Products, RMSNorm, can_multiply
from server.engine.cpu_layers import PlainAttention, PlainLayer, chained
from server.engine.raw_keys import RawKeyModel


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_double), ("add_one", ctypes.c_int64)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("before_attention", "before_mlp")),
        *((name, KernelLinear) for name in ("query_key_value", "output", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "shape", "plan", "scales")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "hidden", "threads")),
        *((name, ctypes.c_void_p) for name in ("h", "slots", "row", "x", "query", "out", "scratch")),
    ]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What one layer is made of. The products are its own, in the order of kernels/layers.c."""

    attention: PlainAttention
    norms: tuple[RMSNorm, RMSNorm]
    products: tuple[Products, Products, Products, Products]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(width for products in self.products for width in (products.inputs, *products.features))


class Stack:
    """The layers of one model, outermost first, and the rotary group of each. One thread at a time."""

    def __init__(self, layers: Sequence[_Parts], groups: Sequence[str | None]) -> None:
        first, widest = layers[0], max(products.inputs for products in layers[0].products)
        self._parts = layers
        self._options = [part.attention.call.options(group) for part, group in zip(layers, groups, strict=True)]
        self._hidden = first.products[0].inputs
        self._head_dim = first.attention.head_dim
        self._query_heads = first.products[0].features[0] // self._head_dim
        features = [products.features for products in first.products]
        self._outs = [[_rows(width, torch.bfloat16) for width in widths] for widths in features]
        self._row, self._x = _rows(widest, torch.bfloat16), _rows(widest, torch.float32)
        self._query, self._out = (_rows(self._query_heads * self._head_dim, torch.float32) for _ in range(2))
        self._layers = (_Layer * len(layers))(*map(self._as_struct, layers))
        self._storage: KVStorage | None = None
        self._metadata: AttentionMetadata | None = None
        self._plans: dict[AttentionOptions, tuple[DecodePlan, DecodeShape]] = {}

    def _as_struct(self, part: _Parts) -> _Layer:
        for products, outs in zip(part.products, self._outs, strict=True):
            products.point(outs)
        norms = (_Norm(norm.weight.data_ptr(), norm.eps, norm.add_one) for norm in part.norms)
        return _Layer(*norms, *(products.plan for products in part.products))

    def forwards(self, modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
        """(layer, forward) for the layers' modules."""
        for place, module in enumerate(modules):
            yield module, self._forward(place, module.forward)

    def _forward(self, place: int, alone: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
            if self._metadata is None:
                return alone(hidden_states, *arguments, **options)
            return hidden_states if place else self._run(hidden_states, self._metadata)

        return forward

    @contextmanager
    def step(self, metadata: AttentionMetadata, storage: KVStorage) -> Iterator[None]:
        """Inside, a forward of this step runs all layers at once, if the step is one that they can."""
        self._metadata = metadata if self._prepare(metadata, storage) else None
        try:
            yield
        finally:
            self._metadata = None

    def _prepare(self, metadata: AttentionMetadata, storage: KVStorage) -> bool:
        if len(metadata.sequences) > FEW_ROWS or len(metadata.slot_mapping) != len(metadata.sequences):
            return False
        if storage.keys[0].dtype != torch.bfloat16:
            return False
        self._plans.clear()
        for options, keys in zip(self._options, storage.keys, strict=True):
            if options not in self._plans:
                plan = plan_step(metadata, options)
                if plan is None:
                    return False
                self._plans[options] = (plan, plan.shape(self._query_heads, keys, options))
        if storage is not self._storage:
            self._storage = storage
            for layer, keys, values in zip(self._layers, storage.keys, storage.values, strict=True):
                layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        for layer, options in zip(self._layers, self._options, strict=True):
            plan, shape = self._plans[options]
            layer.plan, layer.shape = ctypes.addressof(plan.plan), ctypes.addressof(shape)
            layer.scales = None if plan.scale is None else plan.scale.data_ptr()
        return True

    def _run(self, hidden_states: Tensor, metadata: AttentionMetadata) -> Tensor:
        """hidden_states [1, T, hidden] → what leaves the last layer."""
        kernels, h = library(), hidden_states.clone(memory_format=torch.contiguous_format)
        assert kernels is not None
        plans = [plan for plan, _ in self._plans.values()]
        scratch = max(plans, key=lambda plan: plan.num_items).scratch(self._query_heads, self._head_dim)
        tensors = (h, metadata.slot_mapping, self._row, self._x, self._query, self._out, scratch)
        step = _Step(
            len(metadata.sequences), self._hidden, torch.get_num_threads(), *(tensor.data_ptr() for tensor in tensors)
        )
        kernels.prerope_layers(self._layers, ctypes.c_int64(len(self._layers)), ctypes.byref(step))
        return h


def _rows(width: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(FEW_ROWS, width, dtype=dtype)


def find_stack(raw: RawKeyModel, modules: Sequence[nn.Module], groups: Sequence[str | None]) -> Stack | None:
    """A stack of these decoder layers, given with the rotary group of each; None where one of them is not as above."""
    parts = [_parts(module) for module in modules]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({part.widths for part in known}) != 1 or not chained(raw, modules):
        return None
    return Stack(known, groups)


def _parts(module: nn.Module) -> _Parts | None:
    layer = module.forward
    if not isinstance(layer, PlainLayer) or not isinstance(layer.attention.forward, PlainAttention):
        return None
    attention, before_attention, before_mlp = layer.attention.forward, layer.before_attention, layer.before_mlp
    norms, gated = (before_attention.forward, before_mlp.forward), layer.mlp.forward
    if not isinstance(gated, GatedProducts) or not isinstance(norms[0], RMSNorm) or not isinstance(norms[1], RMSNorm):
        return None
    groups = [attention.inputs, [attention.output], gated.linears[:2], gated.linears[2:]]
    if not all(can_multiply(linear) and linear.out_features % MULTIPLE == 0 for group in groups for linear in group):
        return None
    first, second, third, fourth = (Products(group) for group in groups)
    _query, key, value = first.features
    return _Parts(attention, (norms[0], norms[1]), (first, second, third, fourth)) if key == value else None
