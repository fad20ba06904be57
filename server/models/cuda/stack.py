"""The forward of a whole model on CUDA, of any step: token ids to logits without transformers' forward.

Where every layer has the short forward of `layers` with the norms and the gate of `cuda_kernels`, and nothing but an
embedding, a norm and a head stands around them, a layer is

    one product for q, k and v       attention over the cache        one product
    addition and norm                one product for gate and up     silu and multiply        one product
    addition and norm, the latter the next layer's

A residual is read and written once where it is normalised. What is left beside products and attention are three
kernels a layer, each bound by reading and writing a step's rows.

Nothing waits for the device, and no state outlives a call: a step may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prerope.cache.storage import KVStorage
from prerope.server.models.cuda.products import GatedProducts, Products, RMSNorm
from prerope.server.models.layers import Around, Attend, PlainAttention, PlainLayer, around
from prerope.server.models.raw_keys import RawKeyModel
from prerope.server.models.shares import join_of
from torch import Tensor, nn

if TYPE_CHECKING:
    from prerope.server.models.model import Batch


@dataclass(frozen=True, slots=True)
class _Parts:
    """What one layer is made of."""

    attention: PlainAttention
    before_attention: RMSNorm
    before_mlp: RMSNorm
    query_key_value: Products
    output: Products
    mlp: GatedProducts


class Stack:
    """The layers of one model, first to last, and what is around them."""

    def __init__(
        self, layers: Sequence[_Parts], groups: Sequence[str | None], ends: Around, last_norm: RMSNorm
    ) -> None:
        """groups: the rotary group of each layer."""
        self._layers, self._ends = layers, ends
        self._options = [layer.attention.call.options(group) for layer, group in zip(layers, groups, strict=True)]
        self._whole_rows = [join_of(layer.attention.output) for layer in layers]
        self._whole_logits = join_of(ends.head)
        # The norm that follows each layer's MLP.
        self._after = [*(layer.before_attention for layer in layers[1:]), last_norm]

    def logits(self, batch: Batch, storage: KVStorage, attend: Attend) -> Tensor:
        """[N, V] of the batch's `logit_rows`; `attend` sees every layer's raw q, k and v, and stores the latter."""
        del storage  # attend knows it
        normal = self.run(self._ends.embedding.forward(batch.input_ids), attend)
        logits: Tensor = self._ends.head.forward(normal.index_select(0, batch.logit_rows))
        return logits if self._whole_logits is None else self._whole_logits(logits)

    def run(self, hidden: Tensor, attend: Attend) -> Tensor:
        """hidden [T, hidden], as embedded → the last norm of what leaves the last layer."""
        normal = self._layers[0].before_attention(hidden)
        for place, (layer, following) in enumerate(zip(self._layers, self._after, strict=True)):
            query, key, value = layer.attention.heads(layer.query_key_value(normal))
            rows = attend(place, query, key, value, self._options[place])
            attended, whole = layer.output.together(rows.view(len(hidden), -1)), self._whole_rows[place]
            if whole is not None:
                attended = whole(attended)
            hidden, normal = layer.before_mlp.add(hidden, attended)
            hidden, normal = following.add(hidden, layer.mlp(normal))
        return normal


def find_stack(raw: RawKeyModel, modules: Sequence[nn.Module], groups: Sequence[str | None]) -> Stack | None:
    """A stack of these decoder layers, given with the rotary group of each; None where something is not as above."""
    parts = [_parts(module) for module in modules]
    known = [part for part in parts if part is not None]
    ends = around(raw, modules, RMSNorm) if raw.ranks.all(len(known) == len(parts)) else None
    if ends is None or not isinstance(ends.norm.forward, RMSNorm):
        return None
    return Stack(known, groups, ends, ends.norm.forward)


def _parts(module: nn.Module) -> _Parts | None:
    layer = module.forward
    if not isinstance(layer, PlainLayer) or not isinstance(layer.attention.forward, PlainAttention):
        return None
    attention, mlp = layer.attention.forward, layer.mlp.forward
    first, second = layer.before_attention.forward, layer.before_mlp.forward
    if not isinstance(mlp, GatedProducts) or not isinstance(first, RMSNorm) or not isinstance(second, RMSNorm):
        return None
    return _Parts(attention, first, second, Products(attention.inputs), Products([attention.output]), mlp)
