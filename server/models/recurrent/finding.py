"""Which modules of a model keep something in a cache, and where they take it, found by a trial run.

Those that keep states of a sequence are run by `recurrent.layers`. Those that keep keys there and do not attend through
transformers' attention interface cannot be served.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from prerope.cache.storage import StateShape
from prerope.server.models.attention.interface import HANDLER, AttentionCall, UnknownAttention
from prerope.server.models.checks.hooks import hooked
from prerope.server.models.checks.trials import PROBE_LENGTH, own_values, probe_ids
from prerope.server.models.raw_keys import RawKeyModel
from prerope.server.models.recurrent.layers import Call, RecurrentLayer, StateName
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin


class _Watched(DynamicCache):  # type: ignore[misc]
    """A cache that takes note of which modules give it states or keys, and which attend."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.entered: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self.requested: dict[nn.Module, tuple[int, str | int, dict[StateName, None], Call]] = {}
        self.given_keys: dict[nn.Module, None] = {}
        self.attended: set[nn.Module] = set()

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """An attention handler."""
        self.attended.add(module)
        return own_values(module, query, key, value, call)

    def update(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.given_keys[self.entered[-1][0]] = None
        kept: tuple[Tensor, Tensor] = super().update(*arguments, **options)
        return kept

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **options: Any) -> Tensor:
        self._note(layer_idx, StateName("conv_states", state_idx))
        kept: Tensor = super().update_conv_state(conv_states, layer_idx, state_idx, **options)
        return kept

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> Tensor:
        self._note(layer_idx, StateName("recurrent_states", state_idx))
        kept: Tensor = super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **options)
        return kept

    def get_seq_length(self, layer_idx: int = 0) -> int:
        del layer_idx  # a model without attention has none of its own
        return 0

    def _note(self, index: int, name: StateName) -> None:
        module, arguments, options = self.entered[-1]
        places: list[tuple[str | int, Any]] = [*options.items(), *enumerate(arguments)]
        argument = next(place for place, value in places if value is self)
        call = Call(arguments, options, PROBE_LENGTH)
        self.requested.setdefault(module, (index, argument, {}, call))[2][name] = None


def _watch(raw: RawKeyModel) -> _Watched | None:
    """A forward of the probe prompt with a cache; None where the model takes none of transformers' kind."""
    try:
        cache = _Watched(raw.model.config)
        with torch.inference_mode(), _entering(raw.model, cache):
            ids, token = probe_ids(raw.text_config.vocab_size, raw.model.device)[None], HANDLER.set(cache.attend)
            try:
                raw.model(input_ids=ids, past_key_values=cache, use_cache=True)
            finally:
                HANDLER.reset(token)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, StopIteration, UnknownAttention):
        return None  # another way: inspection says what it is
    return cache


def attends_on_its_own(raw: RawKeyModel) -> nn.Module | None:
    """The first module that keeps keys in a cache and reads them in code of its own."""
    cache = _watch(raw)
    return None if cache is None else next((one for one in cache.given_keys if one not in cache.attended), None)


def keeps_states(raw: RawKeyModel) -> bool:
    """Whether transformers' cache has states for any layer, by the model's config."""
    try:
        layers = DynamicCache(config=raw.model.config).layers
    except (TypeError, ValueError, AttributeError, LookupError):
        return False
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def find_recurrent(raw: RawKeyModel) -> tuple[RecurrentLayer, ...]:
    """The modules of a model that keep states in transformers' way; their forwards are replaced."""
    cache = _watch(raw) if keeps_states(raw) else None
    if cache is None:
        return ()
    layers, names = list[RecurrentLayer](), {module: name for name, module in raw.model.named_modules()}
    for module, (index, argument, requested, call) in cache.requested.items():
        kept = cache.layers[index]
        tensors = [getattr(kept, name.kind)[name.number] for name in requested]
        shapes = tuple(StateShape(tuple(tensor.shape[1:]), tensor.dtype) for tensor in tensors)
        first = sum(len(layer.states) for layer in layers)
        layer = RecurrentLayer(
            module,
            names[module],
            argument,
            index,
            kept.number_of_states,
            tuple(requested),
            shapes,
            first,
            module.forward,
        )
        layers.append(replace(layer, stepwise=_drops_a_state(layer, call)))
    for layer in layers:
        raw.replace_forward(layer.module, layer)
    return tuple(layers)


@torch.inference_mode()
def _drops_a_state(layer: RecurrentLayer, call: Call) -> bool:
    """Whether a chunk of several rows is the same whatever one of the states before it was."""
    half = call.num_rows // 2

    def rest(states: list[Tensor]) -> list[Tensor]:
        given, _ = layer.run(call, lambda x: x[:, half:], [state.clone() for state in states])
        return [part for part in (given if isinstance(given, tuple) else (given,)) if isinstance(part, Tensor)]

    _, states = layer.run(call, lambda x: x[:, :half], None)
    own = rest(states)
    others = ([*states[:n], state + 1, *states[n + 1 :]] for n, state in enumerate(states))
    return any(all(map(torch.equal, rest(other), own)) for other in others)


@contextmanager
def _entering(model: nn.Module, cache: _Watched) -> Iterator[None]:
    """Inside, the cache knows which modules are under way, outermost first, and what each was given."""

    def enter(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        cache.entered.append((module, arguments, options))

    def leave(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        cache.entered.pop()

    before = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in model.modules()]
    after = [module.register_forward_hook(leave) for module in model.modules()]
    with hooked(before + after):
        yield
