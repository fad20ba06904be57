"""Trial runs: a short prompt through the raw-key model, with what is to be found out held in the hand.

What a trial sees must be what serving meets, so its positions lie on both sides of every length that the config names,
and far beyond, and not at the beginning alone: rows are independent in a trial, as each sees its own value only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from prerope.server.models.attention.interface import AttentionCall
from prerope.server.models.checks.hooks import hooked
from prerope.server.models.raw_keys import RawKeyModel
from torch import Tensor, nn

PROBE_LENGTH = 24

LENGTH_WORDS = ("position", "window", "chunk", "length", "context", "block_size", "local", "floor", "seq_len", "n_ctx")
"""In names of config attributes that are a number of tokens."""

LONGEST = 2**20
"""Farther, fp32 angles such as transformers' say nothing any more."""


MIXED = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Relative, rms: what rounding may change in a row when another row has another token."""


RULED_OUT = -1e9
"""Logits below are of tokens that a model never gives (Chameleon's, of pictures)."""


@dataclass(slots=True)
class Seen:
    """One attention call of a trial run: what entered the module, and raw q, k and v as attention received them."""

    module: nn.Module
    inputs: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    call: AttentionCall


def probe_ids(vocab_size: int, device: torch.device) -> Tensor:
    """A fixed prompt of `PROBE_LENGTH` ids, spread over the vocabulary."""
    return torch.randint(0, vocab_size, (PROBE_LENGTH,), generator=torch.Generator().manual_seed(9708)).to(device)


def named_lengths(raw: RawKeyModel) -> list[int]:
    """Numbers of tokens that the text config names, shortest first: trained lengths, windows, chunks, floors."""
    found = set()
    entries = [vars(raw.text_config)]
    while entries:
        for name, value in entries.pop().items():
            if isinstance(value, dict):
                entries.append(value)
            elif type(value) is int and any(word in str(name) for word in LENGTH_WORDS) and 2 <= value <= LONGEST:
                found.add(value)
    return sorted(length for length in found if raw.reach is None or length <= raw.reach)


def trial_positions(raw: RawKeyModel) -> Tensor:
    """[PROBE_LENGTH] int64, ascending: 0, around every length that the config names, up to four times the longest."""
    if raw.reach is not None:
        return torch.arange(PROBE_LENGTH) * (raw.reach - 1) // (PROBE_LENGTH - 1)
    lengths = named_lengths(raw) or [PROBE_LENGTH]
    edges = sorted({length + step for length in lengths for step in (-1, 0, 1)})
    if len(edges) > PROBE_LENGTH // 2:
        edges = [edges[place * len(edges) // (PROBE_LENGTH // 2)] for place in range(PROBE_LENGTH // 2)]
    far = [lengths[-1] * times // 4 for times in range(5, 17)]
    chosen = sorted({0, *edges, *far})
    first = [position for position in range(3 * PROBE_LENGTH) if position not in chosen]
    return torch.tensor(sorted(chosen[:PROBE_LENGTH] + first[: max(0, PROBE_LENGTH - len(chosen))]))


def own_values(_module: nn.Module, query: Tensor, _key: Tensor, value: Tensor, _call: AttentionCall) -> Tensor:
    """An attention handler for trial runs: every row sees its own value alone."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def relative_difference(ours: Tensor, expected: Tensor) -> float:
    """The rms difference over the expected rms; infinite for tensors of another shape or dtype."""
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return float("inf")
    ours, expected = _without_ruled_out(ours.float(), expected.float())
    return float(((ours - expected).square().mean() / expected.square().mean().clamp(min=1e-20)).sqrt())


def _without_ruled_out(ours: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Zero where both rule a token out by the smallest number there is, beside which no other would count."""
    ruled_out = (expected < RULED_OUT) & (ours < RULED_OUT)
    return ours.masked_fill(ruled_out, 0.0), expected.masked_fill(ruled_out, 0.0)


def mixed(was: Tensor, now: Tensor) -> bool:
    """Whether rows changed by more than rounding."""
    return not relative_difference(now, was) <= MIXED[was.dtype]


def run_trial(
    raw: RawKeyModel, held: Mapping[nn.Module, Tensor], ids: Tensor | None = None, positions: Tensor | None = None
) -> list[Seen]:
    """One forward of the probe prompt, or of other ids, at positions 0, 1, … or others; its calls.

    `held` replaces what enters each attention module.
    """
    calls: list[Seen] = []
    entered: dict[nn.Module, Tensor] = {}

    def handler(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        calls.append(Seen(module, entered.get(module), query.clone(), key.clone(), value, call))
        return own_values(module, query, key, value, call)

    device = raw.model.device
    ids = probe_ids(raw.text_config.vocab_size, device) if ids is None else ids
    candidates = [module for module in raw.model.modules() if hasattr(module, "layer_idx")]
    positions = torch.arange(len(ids)) if positions is None else positions
    with torch.inference_mode(), layer_inputs(candidates, entered, held):
        raw.forward(ids, positions.to(device), torch.tensor([0], device=device), handler)
    return calls


@contextmanager
def layer_outputs(modules: Iterable[nn.Module], left: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Inside, record what each module returns: of a tuple the first."""

    def hook(module: nn.Module, _arguments: Any, output: Any) -> None:
        left[module] = (output[0] if isinstance(output, tuple) else output).clone()

    with hooked(module.register_forward_hook(hook) for module in modules):
        yield


@contextmanager
def layer_inputs(
    modules: list[nn.Module], entered: dict[nn.Module, Tensor], held: Mapping[nn.Module, Tensor]
) -> Iterator[None]:
    """Inside, record the hidden states [1, T, hidden] that enter each module, after replacing those in `held`."""
    hook = _input_hook(entered, held)
    with hooked(module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules):
        yield


def _input_hook(
    entered: dict[nn.Module, Tensor], held: Mapping[nn.Module, Tensor]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        by_name = "hidden_states" in kwargs
        hidden = held.get(module, kwargs["hidden_states"] if by_name else args[0])
        entered[module] = hidden
        return (args, kwargs | {"hidden_states": hidden}) if by_name else ((hidden, *args[1:]), kwargs)

    return hook
