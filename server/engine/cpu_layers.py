"""Attention modules and decoder layers of the common shape, without what transformers does around it in Python.

A trial run records what enters and leaves them. A module that has the parts and gives the same results from them gets
the short forward; anything else keeps transformers' own:

    attention   q, k and v from three linear layers, one more behind; nothing between, no window, sinks or soft-cap
    layer       h = x + attention(norm x);  h + mlp(norm h)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.inspection import probe_ids
from server.engine.raw_keys import HANDLER, AttentionCall, RawKeyModel

TOLERANCE = 1e-2
"""Relative, rms: rounding of two ways to the same result."""


@dataclass(slots=True)
class Recorded:
    """One forward of the probe prompt: what entered and left attention modules and layers, and what they asked."""

    entered: dict[nn.Module, Tensor] = field(default_factory=dict)
    left: dict[nn.Module, Any] = field(default_factory=dict)
    calls: dict[nn.Module, AttentionCall] = field(default_factory=dict)
    queries: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    logit_rows: Tensor = field(default_factory=lambda: torch.tensor([0]))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """An attention handler: every row sees its own value alone."""
        self.calls[module], self.queries[module] = call, (query, key, value)
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


class PlainAttention:
    """The forward of an attention module of the shape above."""

    def __init__(self, module: nn.Module, parts: tuple[nn.Linear, ...], head_dim: int, call: AttentionCall) -> None:
        self.module, self.head_dim, self.call = module, head_dim, call
        self.inputs, self.output = parts[:3], parts[3]

    def __call__(self, hidden_states: Tensor, *_arguments: Any, **_options: Any) -> tuple[Tensor, None]:
        """hidden_states [1, T, hidden] → the same shape."""
        heads = (hidden_states.shape[1], -1, self.head_dim)
        query, key, value = (part.forward(hidden_states).view(heads) for part in self.inputs)
        rows = HANDLER.get()(self.module, query, key, value, self.call)
        return self.output.forward(rows.view(1, heads[0], -1)), None


class PlainLayer:
    """The forward of a decoder layer of the shape above. Attention is called as a module, so that its hooks run."""

    def __init__(self, attention: nn.Module, norms: tuple[nn.Module, nn.Module], mlp: nn.Module) -> None:
        self.attention, self.mlp = attention, mlp
        self.before_attention, self.before_mlp = norms

    def __call__(self, hidden_states: Tensor, *_arguments: Any, **options: Any) -> Tensor:
        """hidden_states [1, T, hidden] → the same shape."""
        normal = self.before_attention.forward(hidden_states)
        hidden: Tensor = hidden_states + self.attention(hidden_states=normal, **options)[0]
        result: Tensor = hidden + self.mlp.forward(self.before_mlp.forward(hidden))
        return result


def plain_layers(raw: RawKeyModel, attentions: list[nn.Module]) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """(module, forward) for these attention modules and their parents, where the short forward gives the same."""
    layers = layers_of(raw, attentions)
    recorded = record(raw, [*attentions, *layers])
    for attention, layer in zip(attentions, layers, strict=True):
        forward = _as_plain_attention(attention, recorded)
        if forward is not None:
            yield attention, forward
        whole = _as_plain_layer(layer, attention, recorded)
        if whole is not None:
            yield layer, whole


def layers_of(raw: RawKeyModel, attentions: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that hold these."""
    parents = {child: parent for parent in raw.model.modules() for child in parent.children()}
    return [parents[attention] for attention in attentions]


def record(raw: RawKeyModel, modules: Sequence[nn.Module]) -> Recorded:
    """A forward of the probe prompt."""
    recorded = Recorded()
    ids = probe_ids(raw.text_config.vocab_size, raw.model.device)
    with torch.inference_mode(), _watched(modules, recorded):
        recorded.logits = raw.forward(ids, torch.arange(len(ids)), recorded.logit_rows, recorded.attend)
    return recorded


@contextmanager
def _watched(modules: Sequence[nn.Module], recorded: Recorded) -> Iterator[None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        recorded.entered[module] = options["hidden_states"] if "hidden_states" in options else arguments[0]
        recorded.left[module] = output

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _as_plain_attention(module: nn.Module, recorded: Recorded) -> PlainAttention | None:
    parts = [child for child in module.children() if isinstance(child, nn.Linear)]
    call, x, left = recorded.calls[module], recorded.entered[module], recorded.left[module]
    special = call.sliding_window is not None or call.softcap is not None or call.sinks is not None
    if len(parts) != 4 or special or not isinstance(left, tuple) or len(left) != 2:
        return None
    expected = recorded.queries[module]
    head_dim = expected[0].shape[-1]
    for chosen in permutations(parts):
        if any(part.in_features != x.shape[-1] for part in chosen[:3]):
            continue
        given = [part.forward(x).view(x.shape[1], -1, head_dim) for part in chosen[:3]]
        if all(same(ours, theirs) for ours, theirs in zip(given, expected, strict=True)):
            forward = PlainAttention(module, chosen, head_dim, call)
            token = HANDLER.set(Recorded().attend)
            try:
                return forward if same(forward(x)[0], left[0]) else None
            finally:
                HANDLER.reset(token)
    return None


@torch.inference_mode()
def _as_plain_layer(layer: nn.Module, attention: nn.Module, recorded: Recorded) -> PlainLayer | None:
    others = [child for child in layer.children() if child is not attention]
    x, left = recorded.entered[layer], recorded.left[layer]
    attended = recorded.left[attention]
    if len(others) != 3 or not isinstance(left, Tensor) or not isinstance(attended, tuple):
        return None
    for first, second, mlp in permutations(others):
        if any(sum(1 for _ in norm.parameters()) > 2 or list(norm.children()) for norm in (first, second)):
            continue
        hidden = x + attended[0]
        try:
            agree = same(first.forward(x), recorded.entered[attention])
            agree = agree and same(hidden + mlp.forward(second.forward(hidden)), left)
        except (TypeError, RuntimeError):  # not what these modules take
            continue
        if agree:
            return PlainLayer(attention, (first, second), mlp)
    return None


def same(ours: Any, expected: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    if not isinstance(ours, Tensor) or ours.shape != expected.shape or ours.dtype != expected.dtype:
        return False
    ours, expected = ours.float(), expected.float()
    difference = ((ours - expected).square().mean() / expected.square().mean().clamp(min=1e-20)).sqrt()
    return bool(difference <= TOLERANCE)
