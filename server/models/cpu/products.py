"""The C kernels of c/linear.c and c/elementwise.c as calls on tensors: products, the gated MLP, the RMS norm.

Activations are bf16 and weights bf16 or int8 with a scale a row, or both are fp32. Weights are read where transformers
or torchao put them, so they must not move afterwards. Scratch is shared and pointers are kept in place from call to
call: one thread at a time, as a `Model` has it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import torch
from prerope.cache.kernels.build import kernels, library, multiplies_pairs
from prerope.server.models.cpu.linear import fast_linears
from prerope.server.models.modules import Kernels
from prerope.server.models.quantized.int8 import int8_rows, is_quantized
from prerope.server.models.shares import join_of
from torch import Tensor, nn
from torch.nn import functional

FEW_ROWS, FEW_ROWS_IN_PAIRS = 16, 64
"""Up to this many rows the weights are streamed; above, they are widened into panels. Bf16 that is multiplied in pairs
lies in memory as it does in a panel, which pays later there."""

MULTIPLE, LEAST_FEATURES = 32, 16
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
FULL, WIDENED, DOTS, BYTES, BYTE_DOTS = range(5)


class KernelPart(ctypes.Structure):
    """`Part` of c/linear.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "bias", "out")),
        ("features", ctypes.c_int64),
    ]


class KernelLinear(ctypes.Structure):
    """`Linear` of c/linear.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "num_parts", "threads", "kind")),
        ("x", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
    ]


def can_multiply(linear: nn.Module) -> bool:
    """Whether `Products` takes this module."""
    if type(linear) is not nn.Linear or library() is None:
        return False
    weight, bias = linear.weight, linear.bias
    if not (_plain(weight) or (weight.dtype == torch.bfloat16 and int8_rows(weight))):
        return False
    fits = linear.in_features % MULTIPLE == 0 and linear.out_features >= LEAST_FEATURES
    return fits and (bias is None or (_plain(bias) and bias.dtype == weight.dtype))


def few_rows(weight: Tensor) -> int:
    """The most rows for which a product with this weight streams it."""
    return FEW_ROWS_IN_PAIRS if _kind(weight) == DOTS else FEW_ROWS


def most_rows_in_c(weight: Tensor) -> int:
    """More rows go to torch: with matrix tiles (AMX) its bf16 products are several times as fast.

    They sum in another order than ours of few rows: there, a reply may depend on what else is served.
    """
    on_tiles = weight.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return few_rows(weight) if on_tiles else sys.maxsize


def _plain(tensor: Tensor) -> bool:
    plain = tensor.device.type == "cpu" and tensor.dtype in DTYPES and tensor.is_contiguous()
    return plain and not is_quantized(tensor)


def _kind(weight: Tensor) -> int:
    """What a product with this weight is to c/linear.h."""
    if weight.dtype == torch.float32:
        return FULL
    if is_quantized(weight):
        return BYTE_DOTS if multiplies_pairs() else BYTES
    return DOTS if multiplies_pairs() else WIDENED


def _constant(weight: Tensor) -> Tensor:
    """The weight without a gradient. torchao's weights have none, and cannot be detached in inference mode."""
    return weight if is_quantized(weight) else weight.detach()


def _part(weight: Tensor, bias: Tensor | None) -> KernelPart:
    data, scales = int8_rows(weight) or (weight, None)
    scales_at, bias_at = (None if tensor is None else tensor.data_ptr() for tensor in (scales, bias))
    return KernelPart(data.data_ptr(), scales_at, bias_at, None, len(data))


class _Scratch:
    """One fp32 buffer for all layers."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self.pointer = ctypes.c_void_p(0)

    def fit(self, plan: KernelLinear, inputs: int, few_rows: int) -> tuple[int, int]:
        """Make room for this plan's (rows, threads), which are returned, and for as many rows of `inputs` members."""
        rows, threads = plan.rows, plan.threads
        wanted = kernels.linear_scratch(*map(ctypes.c_int64, (rows, inputs, threads, few_rows)))
        if self._buffer.numel() < wanted:
            self._buffer = torch.empty(wanted)
            self.pointer = ctypes.c_void_p(self._buffer.data_ptr())
        return rows, threads


_scratch = _Scratch()


class Products:
    """Linear layers that read the same input, in one call. Each must pass `can_multiply`; in and out of their dtype.

    All of them have weights of one kind.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.inputs = linears[0].in_features
        assert all(can_multiply(linear) and linear.in_features == self.inputs for linear in linears)
        kind = _kind(linears[0].weight)
        assert all(_kind(linear.weight) == kind for linear in linears)
        self._weights = [
            (_constant(linear.weight), None if linear.bias is None else linear.bias.detach()) for linear in linears
        ]
        self.features = [linear.out_features for linear in linears]
        self.few_rows = few_rows(linears[0].weight)
        self._parts = (KernelPart * len(linears))(*(_part(weight, bias) for weight, bias in self._weights))
        self.plan = KernelLinear(0, self.inputs, len(linears), 1, kind, None, ctypes.addressof(self._parts))
        self._reference = ctypes.byref(self.plan)
        self._multiply, self._few = kernels.linear, ctypes.c_int64(self.few_rows)
        self._most_values = self.inputs * most_rows_in_c(linears[0].weight)
        self._fitted = (0, 0)  # rows and threads that scratch has room for: it never shrinks

    def point(self, outs: Sequence[Tensor]) -> None:
        """Results go to these tensors [rows, features], until the next call."""
        for part, out in zip(self._parts, outs, strict=True):
            part.out = out.data_ptr()

    def aim(self, x: Tensor) -> list[Tensor]:
        """Point the plan at x [..., in], contiguous, and at new outputs [..., features], which are returned."""
        shape = x.shape[:-1]
        self.plan.x = x.data_ptr()
        self.plan.rows = x.numel() // self.inputs
        self.plan.threads = torch.get_num_threads()  # of this thread: OpenMP's own default may be another
        outs = []
        for part, features in zip(self._parts, self.features, strict=True):
            out = x.new_empty((*shape, features))
            part.out = out.data_ptr()
            outs.append(out)
        return outs

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [..., in] → one [..., features] a linear."""
        if x.numel() > self._most_values:
            return [functional.linear(x, weight, bias) for weight, bias in self._weights]
        x = x.contiguous()
        outs = self.aim(x)
        if self._fitted != (self.plan.rows, self.plan.threads):
            self._fitted = _scratch.fit(self.plan, self.inputs, self.few_rows)
        self._multiply(self._reference, self._few, _scratch.pointer)
        return outs

    def only(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., features], where there is one linear."""
        (out,) = self(x)
        return out


class GatedProducts:
    """x → down(silu(gate x)·(up x)) in one call."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> None:
        assert gate.out_features == up.out_features == down.in_features
        self.linears, self._whole = (gate, up, down), join_of(down)
        self._first, self._second = Products([gate, up]), Products([down])
        self._references = ctypes.byref(self._first.plan), ctypes.byref(self._second.plan)
        self._most_inputs = max(gate.in_features, down.in_features)
        self._few_rows = min(self._first.few_rows, self._second.few_rows)
        self._multiply, self._few = kernels.gated, ctypes.c_int64(self._few_rows)
        self._most_values = gate.in_features * most_rows_in_c(gate.weight)
        self._fitted = (0, 0)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        if x.numel() > self._most_values:
            gate, up = self._first(x)
            (out,) = self._second(functional.silu(gate) * up)
            return out if self._whole is None else self._whole(out)
        x = x.contiguous()
        gated, _up = self._first.aim(x)
        (out,) = self._second.aim(gated)
        plan = self._first.plan
        if self._fitted != (plan.rows, plan.threads):
            self._fitted = _scratch.fit(plan, self._most_inputs, self._few_rows)
        self._multiply(*self._references, self._few, _scratch.pointer)
        return out if self._whole is None else self._whole(out)


class RMSNorm:
    """x/√(mean x² + eps)·weight, in bf16 rounded before the weight; with `add_one`, ·(1 + weight) and rounded once."""

    def __init__(self, weight: Tensor, eps: float, *, add_one: bool) -> None:
        assert can_normalise(weight)
        self.weight, self.eps, self.add_one = weight.detach(), eps, add_one
        self._width = len(weight)
        self._normalise = kernels.rms_norm
        self._pointer = ctypes.c_void_p(self.weight.data_ptr())
        options = (ctypes.c_float(eps), ctypes.c_int64(add_one), ctypes.c_int64(DTYPES[weight.dtype]))
        self._options = ctypes.c_int64(self._width), *options

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., width] → the same shape."""
        x = x.contiguous()
        out = torch.empty_like(x)
        self._normalise(
            ctypes.c_void_p(x.data_ptr()),
            self._pointer,
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int64(x.numel() // self._width),
            *self._options,
        )
        return out


def can_normalise(weight: Tensor) -> bool:
    """Whether `RMSNorm` takes this weight."""
    return library() is not None and _plain(weight) and weight.dim() == 1 and len(weight) % 16 == 0


def _gated(first: Sequence[nn.Linear], down: nn.Linear) -> GatedProducts | None:
    return GatedProducts(first[0], first[1], down) if len(first) == 2 else None


def _norms(weight: Tensor, eps: float) -> list[RMSNorm]:
    return [RMSNorm(weight, eps, add_one=add_one) for add_one in (False, True)] if can_normalise(weight) else []


KERNELS = Kernels(can_multiply, Products, _gated, _norms, fast_linears)
