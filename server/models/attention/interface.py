"""transformers' attention interface, as this server answers it: what a layer hands over goes to a handler.

An argument that attention is given and that we do not know is never dropped: such a model is refused, by its name. The
handler is held by a context variable, because some families drop keyword arguments on the way down.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from prerope.cache.attention.types import AttentionOptions
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION_NAME = "prerope"
"""Registered without a mask function on purpose: transformers then makes no mask, and causality is ours."""

TRIAL_NAME = "prerope-trial"
"""The same attention, with masks as rules: a trial run sees which keys transformers would let a layer read."""

WINDOW_BY_MASK = "window_by_mask"
"""Set on a module that leaves its window to its mask, and says nothing of it to attention."""

HERE = "and here it reads all before it or a sliding window"
OWN_MASK = f"its layers choose by a mask of their own which earlier tokens a token reads, {HERE}"

WITHOUT_EFFECT = frozenset(
    (
        *("dropout", "use_cache", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict"),
        *("labels", "logits_to_keep", "position_ids", "position_embeddings", "cache_position", "layer_head_mask"),
    )
)
"""What attention is handed on the way down and does not read, or reads only in training."""


NOT_HERE = {
    "position_bias": "its scores have a bias by distance that each token makes itself, and here it is one slope a head",
    "block_indices": f"a token chooses the blocks of earlier tokens that it reads, {HERE}",
    "is_causal": "its tokens read what follows them, too, and here a token reads only what comes before it",
}
"""What attention may be handed that this server does not have: a clause each."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer passes beside its tensors; `mask` in trial runs alone."""

    scale: float
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None
    mask: MaskRule | None = None
    slopes: Tensor | None = None

    def options(self, group: str | None) -> AttentionOptions:
        return AttentionOptions(self.scale, group, self.sliding_window, self.softcap, self.sinks, self.slopes)


AttentionHandler = Callable[[nn.Module, Tensor, Tensor, Tensor, AttentionCall], Tensor]
"""Called once a layer: module, query [T, Hq, D], key and value [T, Hkv, D], all raw → [T, Hq, Dv]."""

HANDLER: ContextVar[AttentionHandler] = ContextVar("attention_handler")


@dataclass(frozen=True, slots=True)
class MaskRule:
    """In place of a mask in trial runs: whether a row may read a key, as transformers says it."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def reads(self, rows: Tensor, keys: Tensor) -> Tensor:
        """[n] rows and [n] keys → [n] bool."""
        zero = torch.zeros_like(rows)
        return torch.as_tensor(self.function(zero, zero, rows, keys)).expand_as(rows)


class UnknownAttention(Exception):
    """A layer asks attention for something that this server does not have; the message says what, as a clause."""


def raw_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | MaskRule | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    slopes: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, Hq, T, D], key and value [1, Hkv, T, D] → [1, T, Hq, Dv]."""
    rule = attention_mask if isinstance(attention_mask, MaskRule) else None
    if attention_mask is not None and rule is None:
        raise UnknownAttention(OWN_MASK)
    for name, given in others.items():
        if given is not None and name not in WITHOUT_EFFECT and not (name == "is_causal" and given is True):
            raise UnknownAttention(NOT_HERE.get(name, f"its attention takes {name!r}, which this server does not know"))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if getattr(module, WINDOW_BY_MASK, False):
        sliding_window = vars(module)["sliding_window"]
    call = AttentionCall(scale, sliding_window, softcap, s_aux, rule, slopes)
    packed_query, packed_key, packed_value = (x[0].transpose(0, 1) for x in (query, key, value))
    rows = HANDLER.get()(module, packed_query, packed_key, packed_value, call)
    return rows.unsqueeze(0), None


def _mask_rule(*, mask_function: Callable[..., Tensor], **_sizes: Any) -> MaskRule:
    """transformers' mask signature."""
    return MaskRule(mask_function)


AttentionInterface.register(ATTENTION_NAME, raw_attention)
AttentionInterface.register(TRIAL_NAME, raw_attention)
AttentionMaskInterface.register(TRIAL_NAME, _mask_rule)
