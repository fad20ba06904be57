"""The forward of a whole model on the CPU, token ids to logits, without transformers' forward.

Where every layer has the short forward of `layers`, with the norms, products and gate of `products`, and nothing but an
embedding, a norm and a linear layer stands around them, a step runs here and gives the logits that it would give module
by module, to the bit. In a step of few rows all decoder layers are one call of c/layers.c: a
product of a small model takes 15 to 100 µs, and the way to the next one through Python as long.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from prerope.cache.attention.types import AttentionMetadata
from prerope.cache.cpu.decode import DecodePlan, KernelShape, can_attend, kernel_shape, plan_step
from prerope.cache.kernels.build import kernels
from prerope.cache.storage import KVStorage
from prerope.server.models.cpu.products import (
    MULTIPLE,
    GatedProducts,
    KernelLinear,
    Products,
    RMSNorm,
    can_multiply,
)
from prerope.server.models.layers import Around, Attend, PlainAttention, PlainLayer, around
from prerope.server.models.raw_keys import RawKeyModel
from prerope.server.models.shares import join_of
from torch import Tensor, nn

if TYPE_CHECKING:
    from prerope.server.models.model import Batch


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_double), ("add_one", ctypes.c_int64)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("before_attention", "before_mlp")),
        *((name, KernelLinear) for name in ("query_key_value", "output", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "bounds", "shape", "plan")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "hidden", "threads")),
        *((name, ctypes.c_void_p) for name in ("h", "slots", "row", "x", "scratch")),
    ]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What one layer is made of.

    Attributes:
        products: of the step in one call, in the order of c/layers.c; their results stay where that wants them.
        query_key_value, output, mlp: of all other steps.
    """

    attention: PlainAttention
    norms: tuple[RMSNorm, RMSNorm]
    products: tuple[Products, Products, Products, Products]
    query_key_value: Products
    output: Products
    mlp: GatedProducts

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(width for products in self.products for width in (products.inputs, *products.features))


class Stack:
    """The layers of one model, first to last, the rotary group of each, and what is around them. For one thread.

    most_rows: of a step in one call.
    """

    def __init__(self, layers: Sequence[_Parts], groups: Sequence[str | None], ends: Around) -> None:
        first, widest = layers[0], max(products.inputs for products in layers[0].products)
        self._ends = ends
        self._parts = layers
        self._layer_options = [part.attention.call.options(group) for part, group in zip(layers, groups, strict=True)]
        self._options = list(dict.fromkeys(self._layer_options))
        self._asks = [self._options.index(options) for options in self._layer_options]  # layer → which of them
        self._whole_rows = [join_of(layer.attention.output) for layer in layers]
        self._whole_logits = join_of(ends.head)
        self._in_one_call = not any(self._whole_rows)
        self._hidden = first.products[0].inputs
        self.most_rows = min(products.few_rows for layer in layers for products in layer.products)
        self._head_dim = first.attention.head_dim
        self._query_heads = first.products[0].features[0] // self._head_dim
        features = [products.features for products in first.products]
        self._outs = [[self._rows(width, torch.bfloat16) for width in widths] for widths in features]
        self._row, self._x = self._rows(widest, torch.bfloat16), self._rows(widest, torch.float32)
        self._query = self._outs[0][0].view(-1, self._query_heads, self._head_dim)
        self._layers = (_Layer * len(layers))(*map(self._as_struct, layers))
        self._storage: KVStorage | None = None
        self._attends = False  # in one call, over this storage
        self._plans: list[DecodePlan] = []
        self._shapes: list[KernelShape] = []

    def _as_struct(self, part: _Parts) -> _Layer:
        for products, outs in zip(part.products, self._outs, strict=True):
            products.point(outs)
        norms = (_Norm(norm.weight.data_ptr(), norm.eps, norm.add_one) for norm in part.norms)
        return _Layer(*norms, *(products.plan for products in part.products))

    def logits(self, batch: Batch, storage: KVStorage, attend: Attend) -> Tensor:
        """[N, V] of the batch's `logit_rows`, K and V stored."""
        ends = self._ends
        hidden: Tensor = ends.embedding.forward(batch.input_ids)
        if self._prepare(batch.metadata, storage):
            hidden = self.run(hidden, batch.metadata)
        else:
            hidden = self._layer_by_layer(hidden, attend)
        logits: Tensor = ends.head.forward(ends.norm.forward(hidden[batch.logit_rows]))
        return logits if self._whole_logits is None else self._whole_logits(logits)

    def _layer_by_layer(self, hidden: Tensor, attend: Attend) -> Tensor:
        """hidden [T, hidden] → what leaves the last layer."""
        num_rows, head_dim = len(hidden), self._head_dim
        for place, (layer, options) in enumerate(zip(self._parts, self._layer_options, strict=True)):
            before_attention, before_mlp = layer.norms
            query, key, value = layer.query_key_value(before_attention(hidden))
            rows = attend(
                place,
                query.view(num_rows, -1, head_dim),
                key.view(num_rows, -1, head_dim),
                value.view(num_rows, -1, head_dim),
                options,
            )
            (output,) = layer.output(rows.view(num_rows, -1))
            whole = self._whole_rows[place]
            hidden = hidden + (output if whole is None else whole(output))
            hidden = hidden + layer.mlp(before_mlp(hidden))
        return hidden

    def _prepare(self, metadata: AttentionMetadata, storage: KVStorage) -> bool:
        """Whether the step is one of few rows that one call takes; that call knows of it then."""
        if not self._in_one_call or len(metadata.slot_mapping) > self.most_rows:
            return False
        if storage is not self._storage:
            self._take(storage)
        if not self._attends:
            return False
        plans = [plan_step(metadata, options) for options in self._options]
        self._plans = [plan for plan in plans if plan is not None]
        if any(plan is None or plan.num_rows < len(metadata.slot_mapping) for plan in plans):
            return False
        if not self._shapes:
            self._shapes = [
                kernel_shape(
                    self._query_heads, torch.bfloat16, storage.keys[0], storage.values[0], plan.method, options
                )
                for plan, options in zip(self._plans, self._options, strict=True)
            ]
        for layer, asks in zip(self._layers, self._asks, strict=True):
            layer.plan, layer.shape = ctypes.addressof(self._plans[asks].plan), ctypes.addressof(self._shapes[asks])
        return True

    def _take(self, storage: KVStorage) -> None:
        """Steps are over this storage from now on: its addresses do not change, nor what attention over it is."""
        self._storage, self._shapes = storage, []
        keys, values = storage.keys[0], storage.values[0]
        self._attends = keys.dtype == torch.bfloat16 and can_attend(self._query, keys, values)
        for layer, own_keys, own_values in zip(self._layers, storage.keys, storage.values, strict=True):
            layer.keys, layer.values = own_keys.data_ptr(), own_values.data_ptr()
            layer.bounds = None if storage.bounds is None else storage.bounds.of(own_keys).data_ptr()

    def run(self, hidden: Tensor, metadata: AttentionMetadata) -> Tensor:
        """hidden [T, hidden], contiguous → what leaves the last layer, in place."""
        sizes = (plan.scratch_size(shape) for plan, shape in zip(self._plans, self._shapes, strict=True))
        scratch = torch.empty(max(sizes))
        tensors = (hidden, metadata.slot_mapping, self._row, self._x, scratch)
        step = _Step(len(hidden), self._hidden, torch.get_num_threads(), *map(torch.Tensor.data_ptr, tensors))
        kernels.layers(self._layers, ctypes.c_int64(len(self._layers)), ctypes.byref(step))
        return hidden

    def _rows(self, width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.most_rows, width, dtype=dtype)


def find_stack(raw: RawKeyModel, modules: Sequence[nn.Module], groups: Sequence[str | None]) -> Stack | None:
    """A stack of these decoder layers, given with the rotary group of each; None where something is not as above."""
    parts = [_parts(module) for module in modules]
    known = [part for part in parts if part is not None]
    if not raw.ranks.all(len(known) == len(parts) and len({part.widths for part in known}) == 1):
        return None
    ends = around(raw, modules, RMSNorm)
    return Stack(known, groups, ends) if ends else None


def _parts(module: nn.Module) -> _Parts | None:
    layer = module.forward
    if not isinstance(layer, PlainLayer) or not isinstance(layer.attention.forward, PlainAttention):
        return None
    attention, before_attention, before_mlp = layer.attention.forward, layer.before_attention, layer.before_mlp
    if attention.head_norms or attention.output.weight.dtype != torch.bfloat16:
        return None
    norms, gated = (before_attention.forward, before_mlp.forward), layer.mlp.forward
    if not isinstance(gated, GatedProducts) or not isinstance(norms[0], RMSNorm) or not isinstance(norms[1], RMSNorm):
        return None
    groups = [attention.inputs, [attention.output], gated.linears[:2], gated.linears[2:]]
    if not all(can_multiply(linear) and linear.out_features % MULTIPLE == 0 for group in groups for linear in group):
        return None
    first, second, third, fourth = (Products(group) for group in groups)
    _query, key, value = first.features
    if key != value:
        return None
    query_key_value, output = Products(attention.inputs), Products([attention.output])
    return _Parts(attention, (norms[0], norms[1]), (first, second, third, fourth), query_key_value, output, gated)
