"""Matrix products of low-precision weights on the CPU where the C kernels cannot be had, faster than torch's default.

Few rows (decode steps) are bound by reading the weights: where oneDNN has instructions for them, it reads a blocked
copy about 1.5 times faster than the plain layout. Many rows (prefill chunks) are bound by arithmetic: on CPUs without
matrix tiles (AMX) a bf16 product runs at about half the rate of an fp32 one, so weights are widened into a scratch
buffer first, for a few percent. fp32 models are left alone, and so are int8 weights, whose products are torchao's own.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

import psutil
import torch
from prerope.server.models.quantized.int8 import is_quantized
from torch import Tensor, nn
from torch.nn import functional

FEW_ROWS = 16
MAX_WIDENED = 2**25  # weights, 128 MiB of scratch; larger ones stay as they are
COPY_SHARE = 0.25  # of free memory, for blocked copies

Forward = Callable[[Tensor], Tensor]


class _Scratch:
    """One fp32 buffer for all layers: weights are widened just before they are used."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def widen(self, weight: Tensor) -> Tensor:
        if self._buffer.numel() < weight.numel():
            self._buffer = torch.empty(weight.numel())
        return self._buffer[: weight.numel()].view(weight.shape).copy_(weight)


def fast_linears(model: nn.Module, except_for: Container[nn.Module] = ()) -> Iterator[tuple[nn.Linear, Forward]]:
    """(module, a forward that computes the same) for the linear layers of a low-precision model on the CPU."""
    linears = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and _low_precision(module.weight) and module not in except_for
    ]
    if not linears or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    num_bytes = sum(linear.weight.nbytes for linear in linears)
    block = num_bytes <= psutil.virtual_memory().available * COPY_SHARE
    widen = not torch.cpu._is_amx_tile_supported()
    scratch = _Scratch()
    for linear in linears:
        yield linear, _forward(linear, scratch if widen else None, block=block and _blocks(linear.weight.dtype))


def _blocks(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies by such weights on this processor: without AVX-512 or its like it raises."""
    mkldnn = torch.ops.mkldnn
    asked = mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported
    return bool(asked())


def _low_precision(weight: Tensor) -> bool:
    plain = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
    return plain and not is_quantized(weight)


def _forward(linear: nn.Linear, scratch: _Scratch | None, *, block: bool) -> Forward:
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    wide_bias = None if bias is None else bias.float()
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight, FEW_ROWS) if block else None

    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows <= FEW_ROWS:
            if blocked is None:
                return functional.linear(x, weight, bias)
            few: Tensor = torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")
            return few
        if scratch is None or weight.numel() > MAX_WIDENED:
            return functional.linear(x, weight, bias)
        return functional.linear(x.float(), scratch.widen(weight), wide_bias).to(x.dtype)

    return forward
