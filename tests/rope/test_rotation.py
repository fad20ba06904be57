"""The rotation against complex multiplication in fp64, and how far low-precision inputs may be from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prerope.rope.rotation import rotate, table
from torch import Tensor

HEAD_DIM = 16


def complex_rotation(x: Tensor, angles: Tensor, *, interleaved: bool) -> np.ndarray:
    """Each pair as a complex number times e^(i·angle): x [T, H, head_dim], angles [T, D/2] → fp64."""
    x64, half = x.double().numpy(), angles.shape[-1]
    turn = np.exp(1j * angles.numpy())[:, None, :]
    out = x64.copy()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    )
    turned = (x64[..., first] + 1j * x64[..., second]) * turn
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 4, 8, 16])
def test_against_complex_numbers(dim: int, interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(7, 3, HEAD_DIM, generator=generator)
    angles = torch.randn(7, dim // 2, generator=generator, dtype=torch.float64) * 100
    rotated = rotate(x, table(angles), interleaved=interleaved)
    np.testing.assert_allclose(rotated, complex_rotation(x, angles, interleaved=interleaved), atol=2e-6)
    assert torch.equal(rotated[..., dim:], x[..., dim:]), "partial rotary: the tail is left alone"


def test_the_input_is_left_as_it_is() -> None:
    x = torch.randn(2, 1, HEAD_DIM)
    before = x.clone()
    rotate(x, table(torch.ones(2, HEAD_DIM // 2, dtype=torch.float64)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, HEAD_DIM, generator=generator)
    theta = 10000.0 ** (-2 * torch.arange(HEAD_DIM // 2, dtype=torch.float64) / HEAD_DIM)

    def score(i: int, j: int) -> float:
        rows = [rotate(x, table(p * theta[None]), interleaved=interleaved) for x, p in ((q, i), (k, j))]
        return float((rows[0] * rows[1]).sum())

    assert score(131_072, 131_000) == pytest.approx(score(72, 0), abs=2e-5)
    assert score(500, 100) == pytest.approx(score(400, 0), abs=2e-5)


# A result in bf16 has 8 bits of mantissa, in fp16 11: half a unit in the last place of numbers below 4 in size.
@pytest.mark.parametrize(("dtype", "half_ulp"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_low_precision_input_far_away(dtype: torch.dtype, half_ulp: float) -> None:
    """At position 131 072 the error is that of rounding the result once: no angle or table sees the input's dtype."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, 64, generator=generator).clamp(-2.5, 2.5).to(dtype)
    theta = 500000.0 ** (-2 * torch.arange(32, dtype=torch.float64) / 64)
    angles = torch.arange(131_072, 131_072 + 64, dtype=torch.float64)[:, None] * theta
    rotated = rotate(x, table(angles))
    assert rotated.dtype == dtype
    error = np.abs(rotated.double().numpy() - complex_rotation(x, angles, interleaved=False))
    assert error.max() <= 1.01 * half_ulp


def test_tables_round_fp64_angles_once() -> None:
    angles = torch.tensor([[131_072.0 * 0.7311]], dtype=torch.float64)
    cos, sin = table(angles, 1.5)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.item() == np.float32(1.5 * np.cos(131_072.0 * 0.7311))
    assert sin.item() == np.float32(1.5 * np.sin(131_072.0 * 0.7311))
