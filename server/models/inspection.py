"""What each attention layer of a model does with positions, found by trying rather than by a list of families.

The probe prompt is run with cos = 1 and sin = 0, then again with one rotary group turned by a quarter (cos = 0,
sin = 1), each layer's input held fixed. A layer belongs to the group whose turn changes its keys, and the change must
be exactly that quarter turn, in the half or in the interleaved pairing: a norm after the rotation shows here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from prerope.cache.storage import LayerShape
from prerope.rope.frequencies import Rotary
from prerope.rope.rotation import Table, rotate
from prerope.server.errors import ConfigurationError
from prerope.server.models.raw_keys import AttentionCall, IdentityRotary, RawKeyModel
from torch import Tensor, nn

PROBE_LENGTH = 24


@dataclass(frozen=True, slots=True)
class RawKeyLayer:
    """One attention layer, as found. group: the rotary group that turns its keys; None: it has no positions."""

    module: nn.Module
    name: str
    group: str | None
    shape: LayerShape


@dataclass(slots=True)
class Seen:
    """One attention call of a trial run: what entered the module, and raw q, k and v as attention received them."""

    module: nn.Module
    inputs: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def probe_ids(vocab_size: int, device: torch.device) -> Tensor:
    """A fixed prompt of `PROBE_LENGTH` ids, spread over the vocabulary."""
    return torch.randint(0, vocab_size, (PROBE_LENGTH,), generator=torch.Generator().manual_seed(9708)).to(device)


def own_values(_module: nn.Module, query: Tensor, _key: Tensor, value: Tensor, _call: AttentionCall) -> Tensor:
    """An attention handler for trial runs: every row sees its own value alone."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def relative_difference(ours: Tensor, expected: Tensor) -> float:
    """Of the rms difference over the expected rms; infinite for tensors of another shape or dtype."""
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return float("inf")
    ours, expected = ours.float(), expected.float()
    return float(((ours - expected).square().mean() / expected.square().mean().clamp(min=1e-20)).sqrt())


def inspect_layers(raw: RawKeyModel) -> tuple[list[RawKeyLayer], dict[str, Rotary]]:
    """Attention layers in call order, and group → rotary embedding as trained.

    Raises ConfigurationError, with the model type and the reason, for a model that cannot be served from raw keys.
    """
    reason = _refusal(raw.model.config)
    if reason is not None:
        raise _cannot_serve(raw, reason)
    base = _run(raw, {})
    expected = raw.text_config.num_hidden_layers
    if len(base) != expected or len({seen.module for seen in base}) != expected:
        raise _cannot_serve(
            raw,
            f"{len(base)} of its {expected} layers attend through the shared attention interface; the others keep a "
            "state of another kind",
        )
    names = {module: name for name, module in raw.model.named_modules()}
    groups, rotaries = _turn_each_group(raw, base, names)
    layers = []
    for seen in base:
        shape = LayerShape(seen.key.shape[1], seen.key.shape[2], seen.value.shape[2])
        if shape.key_dim != shape.value_dim:
            raise _cannot_serve(raw, f"its keys have {shape.key_dim} dims and its values {shape.value_dim}")
        layers.append(RawKeyLayer(seen.module, names[seen.module], groups.get(seen.module), shape))
    return layers, rotaries


def _turn_each_group(
    raw: RawKeyModel, base: list[Seen], names: Mapping[nn.Module, str]
) -> tuple[dict[nn.Module, str], dict[str, Rotary]]:
    groups: dict[nn.Module, str] = {}
    rotaries: dict[str, Rotary] = {}
    held = {seen.module: seen.inputs for seen in base}
    for module_name, identity in raw.identities.items():
        for layer_type in list(identity.turns):
            group = layer_type or (module_name if len(raw.identities) > 1 else "")
            identity.set_turn(layer_type, 0.0, 1.0)
            turned = _run(raw, held)
            identity.set_turn(layer_type, 1.0, 0.0)
            for before, after in zip(base, turned, strict=True):
                if not torch.equal(before.key, after.key):
                    interleaved = _pairing(raw, before, after, identity, names[before.module])
                    groups[before.module] = group
                    rotaries[group] = _rotary(raw, layer_type, interleaved)
    if not rotaries:
        raise _cannot_serve(raw, "turning its rotary embedding changes no layer's keys")
    return groups, rotaries


def _rotary(raw: RawKeyModel, layer_type: str, interleaved: bool) -> Rotary:
    nested = isinstance(raw.text_config.rope_parameters.get(layer_type), dict)
    return Rotary.from_config(raw.text_config, layer_type if nested else None, interleaved=interleaved)


def _pairing(raw: RawKeyModel, before: Seen, after: Seen, identity: IdentityRotary, layer: str) -> bool:
    """True for interleaved pairs, False for half."""
    for dim in (identity.width, 2 * identity.width):
        if dim > before.key.shape[-1]:
            continue
        device = before.key.device
        quarter = Table(torch.zeros(1, dim // 2, device=device), torch.ones(1, dim // 2, device=device))
        for interleaved in (False, True):
            if all(
                torch.allclose(rotate(b, quarter, interleaved=interleaved), a, rtol=1e-2, atol=1e-5)
                for b, a in ((before.key, after.key), (before.query, after.query))
            ):
                return interleaved
    raise _cannot_serve(
        raw, f"{layer} does more to queries and keys than rotate them, for example a norm after the rotation"
    )


def _run(raw: RawKeyModel, held: Mapping[nn.Module, Tensor]) -> list[Seen]:
    """One forward of the probe prompt; `held` replaces what enters each attention module. Attention returns v alone."""
    calls: list[Seen] = []
    entered: dict[nn.Module, Tensor] = {}

    def handler(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        calls.append(Seen(module, entered[module], query.clone(), key.clone(), value))
        return own_values(module, query, key, value, call)

    ids = probe_ids(raw.text_config.vocab_size, raw.model.device)
    candidates = [module for module in raw.model.modules() if hasattr(module, "layer_idx")]
    with torch.inference_mode(), layer_inputs(candidates, entered, held):
        raw.forward(ids, torch.arange(len(ids), device=ids.device), torch.tensor([0], device=ids.device), handler)
    return calls


@contextmanager
def layer_inputs(
    modules: list[nn.Module], entered: dict[nn.Module, Tensor], held: Mapping[nn.Module, Tensor]
) -> Iterator[None]:
    """Inside, record the hidden states [1, T, hidden] that enter each module, after replacing those in `held`."""
    handles = [module.register_forward_pre_hook(_input_hook(entered, held), with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(
    entered: dict[nn.Module, Tensor], held: Mapping[nn.Module, Tensor]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        by_name = "hidden_states" in kwargs
        hidden = held.get(module, kwargs["hidden_states"] if by_name else args[0])
        entered[module] = hidden
        return (args, kwargs | {"hidden_states": hidden}) if by_name else ((hidden, *args[1:]), kwargs)

    return hook


def _refusal(config: Any) -> str | None:
    """Why an architecture is known not to work; None when nothing is known against it."""
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        return "multi-head latent attention (MLA) caches a compressed state, not keys"
    if text.model_type.startswith("hunyuan"):
        return "it normalises queries and keys after the rotation, so its attention does not read rotated raw keys"
    if not getattr(text, "rope_parameters", None):
        return "its config has no rope_parameters"
    return None


def _cannot_serve(raw: RawKeyModel, reason: str) -> ConfigurationError:
    return ConfigurationError(f"model type {raw.family!r} cannot be served from raw keys: {reason}")
