"""Faster forwards for the modules of a bf16 model on the CPU: which of them may have which is found by trying.

Linear layers that a trial run calls on one tensor (q, k and v; gate and up) are multiplied together, when the first of
them is called. A module of three linear layers whose forward equals down(silu(gate x)·(up x)) on random input becomes
one call, and so does a norm that equals the RMS norm of Llama or of Gemma. What fits none keeps its forward. The
load-time probe then compares the whole with transformers' own forward, as it does anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby, permutations
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.cpu_kernels import GatedProducts, Products, RMSNorm, can_multiply, can_normalise
from server.engine.cpu_linear import fast_linears
from server.engine.inspection import probe_ids
from server.engine.raw_keys import AttentionCall, RawKeyModel

Forward = Callable[[Tensor], Tensor]
TRIAL_ROWS = 8
GATED_TOLERANCE = 2e-2
"""Relative, rms. Rounding gives 3e-3; another activation, such as GELU, 0.1."""


def fast_modules(raw: RawKeyModel) -> Iterator[tuple[nn.Module, Forward]]:
    """(module, a forward that computes the same) for what the kernels take; `fast_linears` for other linear layers."""
    model = raw.model
    taken: set[nn.Module] = set()
    together = _called_together(raw) if any(map(can_multiply, model.modules())) else []
    for module in model.modules():
        gated = _as_gated(module, together)
        if gated is not None:
            taken.update(module.children())
            yield module, gated
        norm = _as_rms_norm(module)
        if norm is not None:
            yield module, norm
    for linears in together:
        if not taken.intersection(linears):
            yield from Siblings(linears).forwards()
            taken.update(linears)
    yield from fast_linears(model, except_for=taken)


class Siblings:
    """Linear layers that are called on one tensor in turn: whoever is called first computes for all.

    A sibling that is then called with another tensor computes again, so the result never depends on the order.
    """

    def __init__(self, linears: list[nn.Linear]) -> None:
        self._linears = linears
        self._products = Products(linears)
        self._input: Tensor | None = None
        self._results: dict[int, Tensor] = {}

    def forwards(self) -> Iterator[tuple[nn.Linear, Forward]]:
        for place, linear in enumerate(self._linears):
            yield linear, self._forward(place)

    def _forward(self, place: int) -> Forward:
        def forward(x: Tensor) -> Tensor:
            if x is not self._input or place not in self._results:
                self._input, self._results = x, dict(enumerate(self._products(x)))
            result = self._results.pop(place)
            if not self._results:
                self._input = None
            return result

        return forward


def _called_together(raw: RawKeyModel) -> list[list[nn.Linear]]:
    """Linear layers that kernels can multiply, in the order of a trial run; those called in turn on one tensor as one.

    Only siblings, children of one module, are taken together: they run together or not at all.
    """
    calls: list[tuple[nn.Linear, nn.Module, Tensor]] = []  # holds the inputs, so that each keeps an id of its own
    parents = {child: parent for parent in raw.model.modules() for child in parent.children()}

    def hook(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        calls.append((module, parents[module], args[0]))

    def attend(_module: nn.Module, query: Tensor, _key: Tensor, value: Tensor, _call: AttentionCall) -> Tensor:
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)

    linears = [module for module in raw.model.modules() if can_multiply(module)]
    handles: list[Any] = [linear.register_forward_pre_hook(hook) for linear in linears]
    ids = probe_ids(raw.text_config.vocab_size, raw.model.device)
    try:
        with torch.inference_mode():
            raw.forward(ids, torch.arange(len(ids)), torch.tensor([0]), attend)
    finally:
        for handle in handles:
            handle.remove()
    together = [
        list(dict.fromkeys(linear for linear, _, _ in group))
        for _, group in groupby(calls, key=lambda call: (id(call[1]), id(call[2])))
    ]
    seen = [linear for group in together for linear in group]
    return [group for group in together if all(seen.count(linear) == 1 for linear in group)]


@torch.inference_mode()
def _as_gated(module: nn.Module, together: list[list[nn.Linear]]) -> Forward | None:
    """One call for a module whose forward is down(silu(gate x)·(up x)), whatever its layers' names; else None."""
    linears = {child for child in module.children() if can_multiply(child)}
    pairs = [group for group in together if len(group) == 2 and linears.issuperset(group)]
    if len(linears) != 3 or len(pairs) != 1:
        return None
    (down,) = linears.difference(pairs[0])
    x = _random(pairs[0][0].in_features)
    first = pairs[0][0](x)
    x = (x * (2 / first.float().std())).bfloat16()  # large enough for activations to differ in
    expected = module(x)
    for gate, up in permutations(pairs[0]):
        if gate.out_features == up.out_features == down.in_features and gate.bias is None and up.bias is None:
            gated = GatedProducts(gate, up, down)
            if _difference(gated(x), expected) <= GATED_TOLERANCE:
                return gated
    return None


@torch.inference_mode()
def _as_rms_norm(module: nn.Module) -> Forward | None:
    """One call for a module that is Llama's RMS norm or Gemma's, by its results on large and small input; else None."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or not isinstance(eps, float) or not can_normalise(weight):
        return None
    if len(list(module.parameters())) > 1 or list(module.children()):
        return None
    x = torch.cat([_random(len(weight)) * scale for scale in (10.0, 1.0, eps**0.5)]).bfloat16()
    try:
        expected = module(x)
    except (TypeError, RuntimeError):  # a norm that takes more than one tensor
        return None
    for add_one in (False, True):
        norm = RMSNorm(weight, eps, add_one=add_one)
        if expected.dtype == x.dtype and bool((norm(x) == expected).float().mean() > 0.99):
            return norm
    return None


def _random(width: int) -> Tensor:
    return torch.randn(1, TRIAL_ROWS, width, generator=torch.Generator().manual_seed(width)).bfloat16()


def _difference(ours: Tensor, expected: Tensor) -> float:
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return float("inf")
    ours, expected = ours.float(), expected.float()
    return float(((ours - expected).square().mean() / expected.square().mean().clamp(min=1e-20)).sqrt())
