"""What CUDA has for the modules of a model: merged products of torch, and the Triton kernels of elementwise.py.

Linear layers of one input become one product of one weight. A decode step's products are bound by reading weights, and
one large product reads them nearer to the memory's rate than three small ones, whose grids do not fill a GPU. The
layers' own parameters become views of the merged weight, so that nothing is held twice and transformers' own forward
runs as before.

Nothing here asks what device its tensors are on: with tensors on the CPU the kernels run under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from prerope.server.models.modules import Forward, Kernels
from prerope.server.models.quantized.int8 import is_quantized
from prerope.server.models.shares import join_of
from torch import Tensor, nn
from torch.nn import functional

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def can_multiply(linear: nn.Module) -> bool:
    """Whether `Products` takes this module."""
    if type(linear) is not nn.Linear:
        return False
    return all(_plain(tensor) for tensor in (linear.weight, linear.bias) if tensor is not None)


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype in DTYPES and tensor.is_contiguous() and not is_quantized(tensor)


class Products:
    """Linear layers that read the same input, as one. Each must pass `can_multiply`, and all have one dtype."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.features = [linear.out_features for linear in linears]
        self.weight = _merged([linear.weight for linear in linears])
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        if len(biases) not in (0, len(linears)):
            biases = [_bias(linear) for linear in linears]
        self.bias = _merged(biases) if biases else None

    def together(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., all features], the layers' side by side."""
        return functional.linear(x, self.weight, self.bias)

    only = together

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [..., in] → one [..., features] a linear: views, whose rows are all features apart."""
        return self.together(x).split_with_sizes(self.features, dim=-1)


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


@torch.inference_mode(False)
@torch.no_grad()
def _merged(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts in one tensor, of which they become views. What is merged already is taken as it lies."""
    whole = _as_one(parts)
    if whole is None:
        whole = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, whole.split_with_sizes([len(part) for part in parts]), strict=True):
            part.data = view
    return whole


def _as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """A view of all parts, where they follow each other in memory."""
    first, place = parts[0], parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != place:
            return None
        place += part.numel()
    return first.detach().as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


class GatedProducts:
    """x → down(silu(gate x)·(up x)): two products and what is between them."""

    def __init__(self, first: Sequence[nn.Linear], down: nn.Linear) -> None:
        """first: gate and up, or one layer that is both."""
        self._first, self._second, self._whole = Products(first), Products([down]), join_of(down)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        from prerope.server.models.cuda.elementwise import silu_mul

        gate_up = self._first.together(x)
        gated = silu_mul(gate_up.view(-1, gate_up.shape[-1]))
        down = self._second.together(gated.view(*x.shape[:-1], -1))
        return down if self._whole is None else self._whole(down)


class RMSNorm:
    """`server.models.cuda.elementwise.rms_norm` of one weight."""

    def __init__(self, weight: Tensor, eps: float, *, add_one: bool, round_once: bool) -> None:
        self.weight, self.eps, self.add_one, self.round_once = weight.detach(), eps, add_one, round_once

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., width] → the same shape, dims in the order of those of x in memory."""
        from prerope.server.models.cuda.elementwise import rms_norm

        return rms_norm(x, self.weight, self.eps, add_one=self.add_one, round_once=self.round_once)

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """residual and x [..., width] → (their sum, its norm)."""
        from prerope.server.models.cuda.elementwise import add_rms_norm

        return add_rms_norm(residual, x, self.weight, self.eps, add_one=self.add_one, round_once=self.round_once)


def _norms(weight: Tensor, eps: float) -> list[RMSNorm]:
    """Llama's, which rounds before the weight; Gemma's; and that of OLMo 2 and GPT-OSS, which rounds once."""
    if weight.dim() != 1 or not _plain(weight):
        return []
    ways = ((False, False), (True, True), (False, True))
    return [RMSNorm(weight, eps, add_one=add_one, round_once=once) for add_one, once in ways]


def _nothing(_model: nn.Module, _taken: Collection[nn.Module]) -> Iterator[tuple[nn.Module, Forward]]:
    """torch's own products stay as they are."""
    return iter(())


KERNELS = Kernels(can_multiply, Products, GatedProducts, _norms, _nothing)
