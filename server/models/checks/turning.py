"""How a layer turns queries and keys, found by trying: which of their dims, in which pairing and in which sense.

A reading turns the leading dims of a head, in a positive sense. A layer that has it otherwise has its dims in another
order in the cache: scores do not see that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from prerope.cache.storage import LayerShape
from prerope.rope.frequencies import Rotary, plain
from prerope.rope.rotation import Table, rotate
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Turning:
    """How a head rotates: `order` [D] puts its `dim` rotated dims first; interleaved: pairs are neighbours."""

    order: tuple[int, ...]
    dim: int
    interleaved: bool

    @property
    def plain(self) -> bool:
        """Whether the dims lie so already."""
        return self.order == tuple(range(len(self.order)))


@dataclass(frozen=True, slots=True)
class RawKeyLayer:
    """One attention layer, as found.

    Attributes:
        group: the rotary group that turns its keys; None: it has no positions.
        shape: of keys and values as they lie in the cache.
        order: of the dims of queries and keys there; None: as the layer gives them.
    """

    module: nn.Module
    name: str
    group: str | None
    shape: LayerShape
    order: Tensor | None = None

    def arrange(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, H, D] as the layer gives them → as they lie in the cache."""
        if self.order is None:
            return query, key, value
        return query[..., self.order], key[..., self.order], value.contiguous()


def raw_key_layer(
    module: nn.Module, name: str, group: str | None, key: Tensor, value: Tensor, turning: Turning | None
) -> RawKeyLayer:
    """key, value [T, Hkv, D] as the layer gives them."""
    order = None if turning is None or turning.plain else torch.tensor(turning.order, device=key.device)
    return RawKeyLayer(module, name, group, LayerShape(key.shape[1], key.shape[-1], value.shape[-1]), order)


def find_turning(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Turning | None:
    """From (query, key) [T, H, D] unturned and after a quarter turn; None if no turn explains the change.

    A layer with a norm after the rotation changes more than a turn does, or less.
    """
    for dims in _dims_that_may_turn(before, after):
        turning = _turning_of(dims, before, after)
        if turning is not None:
            return turning
    return None


def _dims_that_may_turn(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> list[list[int]]:
    """Stretches of dims, the likelier first: those that changed, and with them those beside that are always zero.

    A dim whose norm has a weight of zero is zero whatever turns it.
    """
    pairs = list(zip(before, after, strict=True))
    changed = torch.stack([(was != now).any(0).any(0) for was, now in pairs]).any(0)
    zero = torch.stack([((was == 0) & (now == 0)).all(0).all(0) for was, now in pairs]).all(0)
    found = changed.nonzero().flatten().tolist()
    if not found or not bool((changed | zero)[found[0] : found[-1] + 1].all()):
        return []
    first, last = found[0], found[-1]
    while first > 0 and zero[first - 1]:
        first -= 1
    while last + 1 < len(zero) and zero[last + 1]:
        last += 1
    stretches = [list(range(found[0], found[-1] + 1)), list(range(first, last + 1))]
    return [dims for dims in stretches if len(dims) % 2 == 0]


def _turning_of(changed: list[int], before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Turning | None:
    dims, head_dim = len(changed), before[1].shape[-1]
    rest = [dim for dim in range(head_dim) if dim not in changed]
    quarter = Table(*(part.to(before[1].device) for part in (torch.zeros(1, dims // 2), torch.ones(1, dims // 2))))
    for interleaved in (False, True):
        for order in _both_senses(changed, interleaved):
            turning = Turning((*order, *rest), dims, interleaved)
            index = torch.tensor(turning.order, device=before[1].device)
            if all(
                torch.allclose(
                    rotate(b[..., index], quarter, interleaved=interleaved), a[..., index], rtol=1e-2, atol=1e-5
                )
                for b, a in zip(before, after, strict=True)
            ):
                return turning
    return None


def _both_senses(dims: list[int], interleaved: bool) -> list[list[int]]:
    """These dims as they are, and with the members of each pair swapped, which turns the other way."""
    half = len(dims) // 2
    if interleaved:
        return [dims, [dim for pair in zip(dims[1::2], dims[::2], strict=True) for dim in pair]]
    return [dims, dims[half:] + dims[:half]]


MSCALES = ("short_mscale", "long_mscale")
"""Attention factors of LongRoPE in configs, of which one family makes use."""


def as_found(rotary: Rotary, turning: Turning, head_dim: int, embedding: nn.Module, layer_type: str) -> Rotary:
    """What the config says, with the dims that were seen to turn, and the base that plain frequencies have."""
    rotary = replace(rotary, head_dim=head_dim, dim=turning.dim, interleaved=turning.interleaved)
    if "short_mscale" in rotary.parameters and not _scales_by_config(rotary, embedding):
        rotary = replace(rotary, parameters={k: v for k, v in rotary.parameters.items() if k not in MSCALES})
    theta = getattr(embedding, f"{layer_type}_inv_freq" if layer_type else "inv_freq", None)
    if (
        rotary.rope_type != "default"
        or not isinstance(theta, Tensor)
        or len(theta) != turning.dim // 2
        or len(theta) < 2
    ):
        return rotary
    own, rounded = theta.double().cpu(), 1e-3 if theta.dtype == torch.float32 else 1e-2
    if any(torch.allclose(plain(rotary.dim, rotary.base), x, rounded) for x in (own, own.sort(descending=True)[0])):
        return rotary  # in an order of its own, for the axes of pictures, the embedding puts them back (Ernie 4.5 VL)
    return replace(rotary, base=float(theta[1].double()) ** (-turning.dim / 2))


def _scales_by_config(rotary: Rotary, embedding: nn.Module) -> bool:
    """Whether cos at position 0 is the attention factor that the config has for short prompts."""
    given = embedding(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long))
    return isinstance(given, tuple) and abs(float(given[0].flatten()[0]) - rotary.parameters["short_mscale"]) < 1e-4
