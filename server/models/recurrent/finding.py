"""Which modules of a model keep states of a sequence, and where they take a cache, found by a trial run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from prerope.cache.storage import StateShape
from prerope.server.models.raw_keys import HANDLER, RawKeyModel, UnknownAttention
from prerope.server.models.recurrent.layers import RecurrentLayer, StateName
from prerope.server.models.trials import own_values, probe_ids
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin


class _Watched(DynamicCache):  # type: ignore[misc]
    """A cache that takes note of which module asks it for states."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.entered: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self.asked: dict[nn.Module, tuple[int, str | int, dict[StateName, None]]] = {}

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
        self.asked.setdefault(module, (index, argument, {}))[2][name] = None


def find_recurrent(raw: RawKeyModel) -> tuple[RecurrentLayer, ...]:
    """The modules of a model that keep states in transformers' way; their forwards are replaced."""
    try:
        cache = _Watched(raw.model.config)
        if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
            return ()
        with torch.inference_mode(), _entering(raw.model, cache):
            ids, token = probe_ids(raw.text_config.vocab_size, raw.model.device)[None], HANDLER.set(own_values)
            try:
                raw.model(input_ids=ids, past_key_values=cache, use_cache=True)
            finally:
                HANDLER.reset(token)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, StopIteration, UnknownAttention):
        return ()  # another way: inspection says what it is
    layers, names = list[RecurrentLayer](), {module: name for name, module in raw.model.named_modules()}
    for module, (index, argument, asked) in cache.asked.items():
        kept = cache.layers[index]
        tensors = [getattr(kept, name.kind)[name.number] for name in asked]
        shapes = tuple(StateShape(tuple(tensor.shape[1:]), tensor.dtype) for tensor in tensors)
        first = sum(len(layer.states) for layer in layers)
        layers.append(
            RecurrentLayer(
                module,
                names[module],
                argument,
                index,
                kept.number_of_states,
                tuple(asked),
                shapes,
                first,
                module.forward,
            )
        )
    for layer in layers:
        raw.replace_forward(layer.module, layer)
    return tuple(layers)


@contextmanager
def _entering(model: nn.Module, cache: _Watched) -> Iterator[None]:
    """Inside, the cache knows which modules are under way, outermost first, and what each was given."""

    def enter(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        cache.entered.append((module, arguments, options))

    def leave(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        cache.entered.pop()

    handles: list[Any] = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
