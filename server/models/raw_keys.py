"""transformers' layers with raw q and k: the rotary step made an identity, the attention replaced by ours.

transformers supplies config, weights and layers. Two things are swapped, *on this model object alone*: its rotary
embeddings, for one that gives cos = 1 and sin = 0, and the forward of modules: attention gets a copy whose
`apply_rotary_*` returns q and k as they are. No class, module or other model in the process changes.

Attention then goes to the handler that `attention.interface` holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from prerope.server.errors import ConfigurationError
from prerope.server.models.attention.interface import (
    ATTENTION_NAME,
    HANDLER,
    TRIAL_NAME,
    AttentionHandler,
    UnknownAttention,
)
from prerope.server.models.attention.long_factors import read_long_factors
from prerope.server.models.attention.older import adapt
from prerope.server.ranks.group import ALONE, Ranks
from torch import Tensor, nn

REMEDY = "docs/models.md lists the types that are; transformers itself may run this one"


class IdentityRotary(nn.Module):
    """Stands in for a rotary embedding: cos and sin are the same two numbers for every position and pair."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Kept out of the module tree: its buffers are not this model's any more.
        self._original = [original]
        self.turns: dict[str, tuple[float, float]] = {}  # layer type, or "" → (cos, sin)
        self._tables: dict[str, tuple[Tensor, Tensor] | Tensor] = {}

    @property
    def original(self) -> nn.Module:
        return self._original[0]

    def __getattr__(self, name: str) -> Any:
        """What a family reads of its rotary embedding beside calling it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_original":
                raise
            return getattr(self.original, name)

    def set_turn(self, layer_type: str, cos: float, sin: float) -> None:
        """From now on every pair of this layer type's q and k is turned by (cos, sin)."""
        self.turns[layer_type] = (cos, sin)
        self._tables.clear()

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor] | Tensor:
        key = layer_type or ""
        if key not in self._tables:
            extra = () if layer_type is None else (layer_type,)
            turn = self.turns.setdefault(key, (1.0, 0.0))
            self._tables[key] = _alike(self.original(x, position_ids[:, :1], *extra), *turn)
        return self._tables[key]


def _alike(given: Any, cos: float, sin: float) -> tuple[Tensor, Tensor] | Tensor:
    """In place of what a rotary embedding gives, cos and sin or complex numbers of both: the same for every pair."""
    if isinstance(given, tuple) and len(given) == 2:
        return torch.full_like(given[0], cos), torch.full_like(given[1], sin)
    if isinstance(given, Tensor) and given.is_complex():
        return torch.full_like(given, complex(cos, sin))
    raise UnknownAttention("its rotary embedding gives neither cos and sin nor complex numbers")


class RawKeyModel:
    """A transformers causal LM whose attention receives raw q and k, through `handler` of each forward.

    Attributes:
        identities: in place of its rotary embeddings; none where it has none, and keys are raw as they are.
        reach: positions of transformers' own forward end here, where it looks them up in a table; None: nowhere.
        ranks: those that compute this model together.
    """

    def __init__(self, model: Any, ranks: Ranks = ALONE) -> None:
        self.model, self.ranks = model, ranks
        self.text_config: Any = _text_config(model.config)
        self._forwards: dict[nn.Module, Callable[..., Any]] = dict(adapt(model))
        self._through_interface = not self._forwards
        read_long_factors(model)
        self.identities = dict(_find_rotaries(model))
        self.reach = self._reach()
        self._install()

    @property
    def family(self) -> str:
        return str(self.model.config.model_type)

    def _reach(self) -> int | None:
        if not self.identities:
            return getattr(self.text_config, "max_position_embeddings", None)
        tables = [getattr(identity.original, "num_positions", None) for identity in self.identities.values()]
        return min((known for known in tables if known is not None), default=None)

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Give one module of this model another forward, which `stock` takes back."""
        self._forwards[module] = forward
        module.forward = forward

    def drop_rotation(self, modules: Iterable[nn.Module]) -> None:
        """Take the rotary arithmetic out of these attention modules, where their forward allows it."""
        for module in modules:
            forward = None if module in self._forwards else _without_rotation(module)
            if forward is not None:
                self.replace_forward(module, forward)

    def keep_rotation(self, module: nn.Module) -> None:
        """Give an attention module its own forward back."""
        if self._forwards.pop(module, None) is not None:
            del module.forward

    @contextmanager
    def stock(self) -> Iterator[None]:
        """Inside, the model is transformers' own again, with eager attention."""
        self.release()
        try:
            yield
        finally:
            self._install()

    @contextmanager
    def showing_masks(self) -> Iterator[None]:
        """Inside, `AttentionCall.mask` says which keys transformers would let a layer read."""
        self._attend_by(TRIAL_NAME)
        try:
            yield
        finally:
            self._attend_by(ATTENTION_NAME)

    def release(self) -> None:
        """Give the model back as transformers made it."""
        for module in self._forwards:
            del module.forward
        self._place({name: identity.original for name, identity in self.identities.items()})
        self._attend_by("eager")

    def _install(self) -> None:
        self._place(self.identities)
        self._attend_by(ATTENTION_NAME)
        for module, forward in self._forwards.items():
            module.forward = forward

    def _attend_by(self, name: str) -> None:
        if self._through_interface:
            self.model.set_attn_implementation(name)

    def _place(self, rotaries: Mapping[str, nn.Module]) -> None:
        for name, rotary in rotaries.items():
            parent, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(parent), attribute, rotary)

    def forward(self, input_ids: Tensor, position_ids: Tensor, logit_rows: Tensor, handler: AttentionHandler) -> Tensor:
        """input_ids, position_ids [T], logit_rows [N] → logits [N, V]; `handler` sees every layer's raw q, k and v."""
        token = HANDLER.set(handler)
        try:
            output = self.model(
                input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, logits_to_keep=logit_rows
            )
        except UnknownAttention as unknown:
            raise cannot_serve(self, str(unknown)) from unknown
        finally:
            HANDLER.reset(token)
        logits: Tensor = output.logits
        return logits[0]


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config(decoder=True)
    except ValueError as error:
        raise ConfigurationError(
            f"model type {config.model_type!r} cannot be served: its config does not say which part is the decoder"
        ) from error


def cannot_serve(raw: RawKeyModel, reason: str) -> ConfigurationError:
    """A refusal with the model's type and the reason, a clause."""
    return ConfigurationError(f"model type {raw.family!r} cannot be served: {reason}. {REMEDY}")


def _find_rotaries(model: nn.Module) -> Iterator[tuple[str, IdentityRotary]]:
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding") and "vision" not in name:
            yield name, IdentityRotary(module)


def _without_rotation(module: nn.Module) -> MethodType | None:
    """A copy of this module's forward in which `apply_rotary_*` returns q and k untouched.

    None where the forward does not call such a global by name: cos = 1 and sin = 0 then do the same, slower.
    """
    forward = type(module).forward
    names = [n for n in getattr(getattr(forward, "__code__", None), "co_names", ()) if n.startswith("apply_rotary")]
    if not isinstance(forward, FunctionType) or not names:
        return None
    scope = forward.__globals__ | {name: _untouching(forward.__globals__.get(name)) for name in names}
    copy = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(copy, module)


def _untouching(rotation: Any) -> Callable[..., Any]:
    """In place of a rotation of queries and keys, or of either (Gemma 4)."""
    try:
        parameters = list(inspect.signature(rotation).parameters)
    except (TypeError, ValueError):
        parameters = []
    return _untouched_one if parameters[1:2] == ["cos"] else _untouched


def _untouched(query: Tensor, key: Tensor, *_cos_sin: Any, **_options: Any) -> tuple[Tensor, Tensor]:
    return query, key


def _untouched_one(either: Tensor, *_cos_sin: Any, **_options: Any) -> Tensor:
    return either
