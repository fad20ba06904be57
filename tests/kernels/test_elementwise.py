"""Norm and gate kernels against fp64, and rounded as the modules of transformers that they stand in for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from prerope.server.models.cuda import elementwise
from prerope.server.models.cuda.elementwise import add_rms_norm, rms_norm, silu_mul
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from tests.device import DEVICE
from tests.tiers import every

EPS = 1e-5
WAYS: dict[Callable[..., Any], dict[str, bool]] = {
    LlamaRMSNorm: {},
    Gemma3RMSNorm: {"add_one": True, "round_once": True},
    Olmo2RMSNorm: {"round_once": True},
}
WIDTHS = (1, 16, 50, 96, 576, 1000, 1030)
# The interpreter cuts members of bf16 off where a GPU rounds them: two roundings, each of up to one unit.
UNITS = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-6}
DTYPES = list(UNITS)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def exact(x: Tensor, weight: Tensor, add_one: bool) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight.double() + add_one)


def check(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=UNITS[ours.dtype], atol=1e-6)


@pytest.mark.parametrize(
    ("width", "dtype"),  # all widths where the tolerance is sharpest: masks are of a width, roundings of a type
    every(
        3,
        [
            *((width, torch.float32) for width in WIDTHS),
            *itertools.product((50, 1030), (torch.float16, torch.bfloat16)),
        ],
    ),
)
def test_norms_of_any_width(width: int, dtype: torch.dtype) -> None:
    """Rows that fill programs and that do not; one by one, as no rows at all."""
    weight = random(width, dtype=dtype)
    for rows in (0, 1, 5, 70):
        x = random(rows, width, dtype=dtype) * 3
        for way in WAYS.values():
            check(rms_norm(x, weight, EPS, **way), exact(x, weight, way.get("add_one", False)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_wider_than_a_program(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "MOST_LANES", 64)
    monkeypatch.setattr(elementwise, "TILE", 128)
    x, residual, weight = random(5, 200, dtype=dtype), random(5, 200, dtype=dtype) + 1, random(200, dtype=dtype)
    check(rms_norm(x, weight, EPS), exact(x, weight, False))
    total, normal = add_rms_norm(residual, x, weight, EPS)
    check(total, x.double() + residual.double())
    check(normal, exact(total, weight, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("module", WAYS)
def test_rounding_is_that_of_transformers(module: Callable[..., Any], dtype: torch.dtype) -> None:
    """In fp16 to the bit, but for members whose fp32 value lies at the very edge of two."""
    norm = module(192, eps=EPS).to(DEVICE, dtype)
    norm.weight.data = random(192, dtype=dtype)
    x, residual = random(40, 192, dtype=dtype), random(40, 192, dtype=dtype) * 4
    ours = rms_norm(x, norm.weight.data, EPS, **WAYS[module])
    total, normal = add_rms_norm(residual, x, norm.weight.data, EPS, **WAYS[module])
    assert torch.equal(total, residual + x)
    for found, expected in ((ours, norm(x)), (normal, norm(residual + x))):
        torch.testing.assert_close(found, expected)
        if dtype == torch.float16:
            assert (found == expected).float().mean() > 0.995
    others = [way for way in WAYS.values() if way != WAYS[module]]
    for way in others if dtype == torch.float16 else ():
        assert (rms_norm(x, norm.weight.data, EPS, **way) == ours).float().mean() < 0.95


def test_rows_may_be_parts_of_wider_ones() -> None:
    """Heads of a merged projection, a part of each row, rows of two strides, and dims that are no rows."""
    merged, weight = random(6, 10 * 24), random(24)
    heads = merged.view(6, 10, 24)
    for x in (
        heads[:, 2:5],
        heads[:, 3],
        heads[None, ::2, 1:3],
        heads[1:2, 4:9],
        heads.transpose(0, 1),
        merged.view(2, 3, 10, 24)[:, 1:, 2:4],
        random(24, 7).T,
    ):
        ours = rms_norm(x, weight, EPS)
        check(ours, exact(x, weight, False))
        # Laid out as torch does it, so that heads side by side stay so.
        assert ours.stride() == (x * 1.0).stride() or x.stride(-1) != 1
    wide = random(5, 100)
    total, normal = add_rms_norm(wide[:, :24], wide[:, 60:84], weight, EPS)
    check(total, wide[:, :24].double() + wide[:, 60:84].double())
    check(normal, exact(total, weight, False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 48, 96, 1024, 1500])
def test_gate(width: int, dtype: torch.dtype) -> None:
    """Rows are a part of wider ones; members far to both sides of zero."""
    wide = random(5, 2 * width + 8, dtype=dtype) * 5
    gate_up = wide[:, : 2 * width]
    gate, up = gate_up.double().chunk(2, dim=1)
    check(silu_mul(gate_up), torch.nn.functional.silu(gate) * up)
    assert silu_mul(gate_up[:0]).shape == (0, width)
    if dtype == torch.float16:
        low_gate, low_up = gate_up.chunk(2, dim=1)
        expected = torch.nn.functional.silu(low_gate) * low_up
        assert (silu_mul(gate_up) == expected).float().mean() > 0.99


def test_nothing_else_is_written() -> None:
    x, weight = random(3, 50), random(50)
    kept = x.clone(), weight.clone()
    rms_norm(x, weight, EPS)
    add_rms_norm(x, x, weight, EPS)
    silu_mul(x)
    assert torch.equal(x, kept[0])
    assert torch.equal(weight, kept[1])
