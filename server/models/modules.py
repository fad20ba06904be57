"""Faster forwards for the modules of a model: which of them may have which is found by trying.

Linear layers that a trial run calls on one tensor (q, k and v; gate and up) are multiplied together, when the first of
them is called. A module whose forward equals down(silu(gate x)·(up x)) on random input becomes one call, and so does a
norm that equals one of the device's RMS norms. What fits none keeps its forward. The load-time probe then compares the
whole with transformers' own forward, as it does anyway.

What a device can do is its `Kernels`: C for the CPU (`cpu_kernels`), Triton and merged products for CUDA
(`cuda_kernels`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, permutations
from typing import Protocol

import torch
from prerope.server.models.checks.hooks import hooked
from prerope.server.models.checks.trials import own_values, probe_ids, relative_difference
from prerope.server.models.raw_keys import RawKeyModel
from prerope.server.ranks.group import Ranks
from torch import Tensor, nn
from torch.nn import functional

Forward = Callable[[Tensor], Tensor]
TRIAL_ROWS = 8
GATED_TOLERANCE = 2e-2
"""Relative, rms. Rounding gives 3e-3; another activation, such as GELU, 0.1."""
LOUD = 64
"""Times the input of a second trial: beyond any clamp that ever acts."""
NORM_TOLERANCE = 1e-5
"""Relative, of fp32 members; those of lower precision are the same to the bit, or the rounding is another."""


class LinearGroup(Protocol):
    """Linear layers of one input in one call."""

    def __call__(self, x: Tensor, /) -> Sequence[Tensor]:
        """x [..., in] → one [..., features] a layer."""

    def only(self, x: Tensor, /) -> Tensor:
        """x [..., in] → [..., features], of a group of one layer."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """What one device has for the modules of a model.

    Attributes:
        can_multiply: whether `products` and `gated` take this module.
        products: linear layers of one input → a call for all of them.
        gated: (gate, up) or one layer that is both, and down → a call for down(silu(gate x)·(up x)), or None.
        norms: weight and eps → the RMS norms that take them, in the ways that models round; none where none does.
        others: forwards for what is left of a model, but for the modules given.
    """

    can_multiply: Callable[[nn.Module], bool]
    products: Callable[[Sequence[nn.Linear]], LinearGroup]
    gated: Callable[[Sequence[nn.Linear], nn.Linear], Forward | None]
    norms: Callable[[Tensor, float], Sequence[Forward]]
    others: Callable[[nn.Module, Collection[nn.Module]], Iterator[tuple[nn.Module, Forward]]]


def fast_modules(raw: RawKeyModel, kernels: Kernels) -> Iterator[tuple[nn.Module, Forward]]:
    """(module, a forward that computes the same) for what the kernels take, and what they have for other modules."""
    model = raw.model
    taken: set[nn.Module] = set()
    some = raw.ranks.all(any(map(kernels.can_multiply, model.modules())))
    together = _called_together(raw, kernels) if some else []
    dtype = model.get_input_embeddings().weight.dtype
    for module in model.modules():
        gated = _as_gated(module, together, kernels, raw.ranks)
        if gated is not None:
            taken.update(module.children())
            yield module, gated
        norm = _as_rms_norm(module, dtype, kernels)
        if norm is not None:
            yield module, norm
    for linears in together:
        if taken.intersection(linears):
            continue
        taken.update(linears)
        if len(linears) == 1:
            yield linears[0], kernels.products(linears).only
        else:
            yield from Siblings(linears, kernels).forwards()
    yield from kernels.others(model, taken)


class Siblings:
    """Linear layers that are called on one tensor in turn: whoever is called first computes for all.

    A sibling that is then called with another tensor computes again, so the result never depends on the order. Once
    all were called, nothing is kept.
    """

    def __init__(self, linears: list[nn.Linear], kernels: Kernels) -> None:
        self._linears = linears
        self._products = kernels.products(linears)
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


def _called_together(raw: RawKeyModel, kernels: Kernels) -> list[list[nn.Linear]]:
    """Linear layers that kernels can multiply, in the order of a trial run; those called in turn on one tensor as one.

    Only siblings, children of one module, are taken together: they run together or not at all.
    """
    calls: list[tuple[nn.Linear, nn.Module, Tensor]] = []  # holds the inputs, so that each keeps an id of its own
    parents = {child: parent for parent in raw.model.modules() for child in parent.children()}

    def hook(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        calls.append((module, parents[module], args[0]))

    linears = [module for module in raw.model.modules() if kernels.can_multiply(module)]
    ids = probe_ids(raw.text_config.vocab_size, raw.model.device)
    with torch.inference_mode(), hooked(linear.register_forward_pre_hook(hook) for linear in linears):
        positions, row = torch.arange(len(ids), device=ids.device), torch.tensor([0], device=ids.device)
        raw.forward(ids, positions, row, own_values)
    together = [
        list(dict.fromkeys(linear for linear, _, _ in group))
        for _, group in groupby(calls, key=lambda call: (id(call[1]), id(call[2])))
    ]
    seen = [linear for group in together for linear in group]
    return [group for group in together if all(seen.count(linear) == 1 for linear in group)]


@torch.inference_mode()
def _as_gated(module: nn.Module, together: list[list[nn.Linear]], kernels: Kernels, ranks: Ranks) -> Forward | None:
    """One call for a module whose forward is down(silu(gate x)·(up x)), whatever its layers' names; else None."""
    gates = list(_gates(set(module.children()), together))
    if not ranks.all(bool(gates)):  # a trial runs on all of them or on none
        return None
    for first, down in gates:
        x = _random(first[0].weight)
        x = (x * (2 / first[0](x).float().std())).to(x.dtype)  # large enough for activations to differ in
        try:
            if all(_is_gated(module, first, down, x * loud) for loud in (1, LOUD)):
                return kernels.gated(first, down)
        except Exception:  # a module that takes more than one tensor, and says so in words of its own
            return None
    return None


def _is_gated(module: nn.Module, first: Sequence[nn.Linear], down: nn.Linear, x: Tensor) -> bool:
    gate, up = torch.cat([linear(x) for linear in first], dim=-1).chunk(2, dim=-1)
    return relative_difference(down(functional.silu(gate) * up), module(x)) <= GATED_TOLERANCE


def _gates(
    children: set[nn.Module], together: list[list[nn.Linear]]
) -> Iterator[tuple[tuple[nn.Linear, ...], nn.Linear]]:
    """((gate, up) or (both,), down): what they may be by their number and widths."""
    linears = {linear for group in together for linear in group if linear in children}
    for group in together:
        others = linears.difference(group)
        if not linears.issuperset(group) or len(others) != 1 or len(group) > 2:
            continue
        (down,) = others
        for first in permutations(group):
            widths = {linear.out_features * len(group) for linear in first}
            if widths == {2 * down.in_features} and all(linear.bias is None for linear in first):
                yield first, down


@torch.inference_mode()
def _as_rms_norm(module: nn.Module, dtype: torch.dtype, kernels: Kernels) -> Forward | None:
    """One call for a module that is one of the RMS norms, by its results on large and small input; else None."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dtype != dtype or not isinstance(eps, float):
        return None
    gated = len(inspect.signature(module.forward).parameters) > 1  # another tensor may come with its input
    if gated or len(list(module.parameters())) > 1 or list(module.children()):
        return None
    norms = kernels.norms(weight, eps)
    if not norms:
        return None
    x = torch.cat([_random(weight) * scale for scale in (10.0, 1.0, eps**0.5)])
    try:
        expected = module(x)
    except Exception:  # a norm that takes more than one tensor, likewise
        return None
    return next((norm for norm in norms if _rounds_alike(norm(x), expected)), None)


def _rounds_alike(ours: Tensor, expected: Tensor) -> bool:
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return False
    if ours.dtype == torch.float32:
        return torch.allclose(ours, expected, rtol=NORM_TOLERANCE, atol=0)
    return bool((ours == expected).float().mean() > 0.99)


def _random(weight: Tensor) -> Tensor:
    """[1, rows, the last dim of weight], of its dtype and device; the same numbers everywhere."""
    width = weight.shape[-1]
    drawn = torch.randn(1, TRIAL_ROWS, width, generator=torch.Generator().manual_seed(width))
    return drawn.to(weight.device, weight.dtype)
