"""Attention modules and decoder layers of the common shape, without what transformers does around it in Python.

Trial runs record what enters and leaves them, at positions on both sides of every length that the config names, and
once with loud input to attention, so that a scale that depends on positions and a clip that is rarely reached both
show. A module that has the parts and gives the same results from them gets the short forward; anything else keeps
transformers' own:

    attention   q, k and v from three linear layers, one more behind; between them nothing, or a norm of each head of q
                and of k; no window, sinks, slopes or soft-cap
    layer       h = x + attention(norm x);  h + mlp(norm h)
    around      token ids → embedding → the layers → norm → head → logits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, permutations
from typing import TYPE_CHECKING, Any, Protocol

import torch
from prerope.cache.attention.types import AttentionOptions
from prerope.cache.storage import KVStorage
from prerope.server.models.attention.interface import HANDLER, AttentionCall
from prerope.server.models.checks.hooks import hooked
from prerope.server.models.checks.trials import own_values, probe_ids, relative_difference, trial_positions
from prerope.server.models.raw_keys import RawKeyModel
from prerope.server.models.shares import join_of
from torch import Tensor, nn

if TYPE_CHECKING:
    from prerope.server.models.model import Batch

TOLERANCE = 1e-2
"""Relative, rms: rounding of two ways to the same result."""

LOUD = 64.0
"""Times what enters attention in a trial: beyond any clip that ever acts."""


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
        """An attention handler."""
        self.calls[module], self.queries[module] = call, (query, key, value)
        return own_values(module, query, key, value, call)


class PlainAttention:
    """The forward of an attention module of the shape above. head_norms: of q and of k, or none."""

    def __init__(
        self,
        module: nn.Module,
        parts: tuple[nn.Linear, ...],
        head_dim: int,
        call: AttentionCall,
        head_norms: tuple[nn.Module, ...] = (),
    ) -> None:
        self.module, self.head_dim, self.call, self.head_norms = module, head_dim, call, head_norms
        self.inputs, self.output = parts[:3], parts[3]
        self._whole = join_of(self.output)

    def __call__(self, hidden_states: Tensor, *_arguments: Any, **_options: Any) -> tuple[Tensor, None]:
        """hidden_states [1, T, hidden] → the same shape."""
        query, key, value = self.heads([part.forward(hidden_states) for part in self.inputs])
        rows = HANDLER.get()(self.module, query, key, value, self.call)
        output = self.output.forward(rows.view(1, len(rows), -1))
        return output if self._whole is None else self._whole(output), None

    def heads(self, projected: Sequence[Tensor]) -> list[Tensor]:
        """q, k and v, [..., T, features] each → raw, [T, heads, head_dim]."""
        heads = []
        for rows in projected:
            heads.append(rows.view(rows.shape[-2], -1, self.head_dim))
        for place, norm in enumerate(self.head_norms):
            heads[place] = norm.forward(heads[place])
        return heads


class PlainLayer:
    """The forward of a decoder layer of the shape above. Attention is called as a module, so that its hooks run."""

    def __init__(self, attention: nn.Module, norms: tuple[nn.Module, nn.Module], mlp: nn.Module) -> None:
        self.attention, self.mlp = attention, mlp
        self.before_attention, self.before_mlp = norms
        self._add = getattr(self.before_mlp.forward, "add", self._add_and_normalise)

    def __call__(self, hidden_states: Tensor, *_arguments: Any, **options: Any) -> Tensor:
        """hidden_states [1, T, hidden] → the same shape."""
        normal = self.before_attention.forward(hidden_states)
        hidden, normal = self._add(hidden_states, self.attention(hidden_states=normal, **options)[0])
        result: Tensor = hidden + self.mlp.forward(normal)
        return result

    def _add_and_normalise(self, hidden: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Where the norm has no kernel that adds."""
        hidden = hidden + attended
        return hidden, self.before_mlp.forward(hidden)


def plain_layers(raw: RawKeyModel, attentions: list[nn.Module]) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """(module, forward) for these attention modules and their parents, where the short forward gives the same."""
    layers = layers_of(raw, attentions)
    recorded = record(raw, [*attentions, *layers])
    loud = record(raw, attentions, loud=attentions)
    for attention, layer in zip(attentions, layers, strict=True):
        forward = _as_plain_attention(attention, recorded)
        if forward is not None and _computes(forward, loud):
            yield attention, forward
        whole = _as_plain_layer(layer, attention, recorded)
        if whole is not None:
            yield layer, whole


def layers_of(raw: RawKeyModel, attentions: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that hold these."""
    parents = {child: parent for parent in raw.model.modules() for child in parent.children()}
    return [parents[attention] for attention in attentions]


def record(raw: RawKeyModel, modules: Sequence[nn.Module], loud: Sequence[nn.Module] = ()) -> Recorded:
    """A forward of the probe prompt at its trial positions; what enters the modules of `loud` is multiplied first."""
    ids = probe_ids(raw.text_config.vocab_size, raw.model.device)
    positions = trial_positions(raw).to(ids.device)
    recorded = Recorded(logit_rows=torch.tensor([0], device=ids.device))
    with torch.inference_mode(), _amplified(loud), _watched(modules, recorded):
        recorded.logits = raw.forward(ids, positions, recorded.logit_rows, recorded.attend)
    return recorded


@contextmanager
def _amplified(modules: Sequence[nn.Module]) -> Iterator[None]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if "hidden_states" in options:
            return arguments, options | {"hidden_states": options["hidden_states"] * LOUD}
        return (arguments[0] * LOUD, *arguments[1:]), options

    with hooked(module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules):
        yield


@contextmanager
def _watched(modules: Sequence[nn.Module], recorded: Recorded) -> Iterator[None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        recorded.entered[module] = options["hidden_states"] if "hidden_states" in options else arguments[0]
        recorded.left[module] = output

    with hooked(module.register_forward_hook(hook, with_kwargs=True) for module in modules):
        yield


@torch.inference_mode()
def _as_plain_attention(module: nn.Module, recorded: Recorded) -> PlainAttention | None:
    parts = [child for child in module.children() if isinstance(child, nn.Linear)]
    call, x, left = recorded.calls[module], recorded.entered[module], recorded.left[module]
    special = call.sliding_window is not None or call.softcap is not None
    special = special or call.sinks is not None or call.slopes is not None
    if len(parts) != 4 or special or not isinstance(left, tuple) or len(left) != 2:
        return None
    head_dim = recorded.queries[module][0].shape[-1]
    for chosen in permutations(parts):
        if any(part.in_features != x.shape[-1] for part in chosen[:3]):
            continue
        projected = [part.forward(x) for part in chosen[:3]]
        for norms in _head_norms(module, head_dim):
            forward = PlainAttention(module, chosen, head_dim, call, norms)
            if all(map(same, forward.heads(projected), recorded.queries[module])):
                return forward if _computes(forward, recorded) else None
    return None


@torch.inference_mode()
def _computes(forward: PlainAttention, recorded: Recorded) -> bool:
    """Whether this forward hands to attention, and gives, what was recorded."""
    x, left = recorded.entered[forward.module], recorded.left[forward.module]
    asked: list[Tensor] = []

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        asked.extend((query, key, value))
        return own_values(module, query, key, value, call)

    token = HANDLER.set(attend)
    try:
        out = forward(x)[0]
    finally:
        HANDLER.reset(token)
    return same(out, left[0]) and all(map(same, asked, recorded.queries[forward.module]))


def _head_norms(module: nn.Module, head_dim: int) -> list[tuple[nn.Module, ...]]:
    """None; and, where there are two modules of a weight of a head's width, these as norms of q and k or of k and q."""
    norms = [child for child in module.children() if [p.shape for p in child.parameters()] == [(head_dim,)]]
    return [(), *permutations(norms, 2)] if len(norms) == 2 else [()]


@torch.inference_mode()
def _as_plain_layer(layer: nn.Module, attention: nn.Module, recorded: Recorded) -> PlainLayer | None:
    others = [child for child in layer.children() if child is not attention]
    x, left = recorded.entered.get(layer), recorded.left.get(layer)
    attended = recorded.left[attention]
    if x is None or len(others) != 3 or not isinstance(left, Tensor) or not isinstance(attended, tuple):
        return None
    for first, second, mlp in permutations(others):
        if any(sum(1 for _ in norm.parameters()) > 2 or list(norm.children()) for norm in (first, second)):
            continue
        hidden = x + attended[0]
        try:
            agree = same(first.forward(x), recorded.entered[attention])
            agree = agree and same(hidden + mlp.forward(second.forward(hidden)), left)
        except Exception:  # not what these modules take
            continue
        if agree:
            return PlainLayer(attention, (first, second), mlp)
    return None


@dataclass(frozen=True, slots=True)
class Around:
    """token ids → embedding → the layers → norm → head → logits."""

    embedding: nn.Module
    norm: nn.Module
    head: nn.Module


def around(raw: RawKeyModel, layers: Sequence[nn.Module], norm_type: type) -> Around | None:
    """What stands around these layers, with a norm of this type; None if it is anything else.

    By a trial run: each must get what the one before it leaves, unchanged.
    """
    embedding, head = raw.model.get_input_embeddings(), raw.model.get_output_embeddings()
    norms = [module for module in raw.model.modules() if isinstance(module.forward, norm_type)]
    ran = record(raw, [embedding, *layers, *norms, head])
    for norm in (norm for norm in norms if norm in ran.entered):
        path = [embedding, *layers, norm]
        handed_on = all(torch.equal(ran.left[one], ran.entered[following]) for one, following in pairwise(path))
        read = torch.equal(ran.left[norm][0, ran.logit_rows], ran.entered[head][0])
        if handed_on and read and torch.equal(ran.left[head][0], ran.logits):
            return Around(embedding, norm, head)
    return None


Attend = Callable[[int, Tensor, Tensor, Tensor, AttentionOptions], Tensor]
"""Number of the layer, raw query [T, Hq, D], key and value [T, Hkv, D], which are stored; options → [T, Hq, Dv]."""


class Stack(Protocol):
    """Runs whole steps of one model, first token id to last logit, without transformers' forward."""

    def logits(self, batch: Batch, storage: KVStorage, attend: Attend) -> Tensor:
        """[N, V] of the batch's `logit_rows`, K and V stored."""

    @property
    def run(self) -> Callable[..., Tensor]:
        """The layers: from what was embedded to what leaves the last one, or the norm behind it."""


def same(ours: Any, expected: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    return isinstance(ours, Tensor) and relative_difference(ours, expected) <= TOLERANCE
