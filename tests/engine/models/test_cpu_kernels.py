"""The C products, gate and norm against torch in fp64 or module by module; and which modules are given them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prerope.cache.kernels.build import library, multiplies_pairs
from prerope.server.models.checks.probe import TOLERANCE, probe
from prerope.server.models.cpu.products import (
    FEW_ROWS,
    FEW_ROWS_IN_PAIRS,
    KERNELS,
    GatedProducts,
    Products,
    RMSNorm,
    can_multiply,
)
from prerope.server.models.model import Model
from prerope.server.models.modules import Siblings, fast_modules
from prerope.server.models.raw_keys import RawKeyModel
from torch import Tensor, nn

from tests.engine.tiny_models import tiny

ROWS = (0, 1, 2, 3, 4, 5, 8, 11, FEW_ROWS, FEW_ROWS + 1, FEW_ROWS_IN_PAIRS, 100, 300)


@pytest.fixture(autouse=True)
def needs_kernels(decode_kernel: str) -> None:
    if library() is None:
        pytest.skip(decode_kernel)


def linear(features: int, inputs: int, *, bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    return nn.Linear(inputs, features, bias=bias).to(dtype).requires_grad_(False)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture(params=["pairs", "widened"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to multiply bf16, where the processor has both."""
    pairs = request.param == "pairs"
    if pairs and not multiplies_pairs():
        pytest.skip("this processor does not multiply pairs of bf16")
    monkeypatch.setattr("prerope.server.models.cpu.products.multiplies_pairs", lambda: pairs)


def exact(x: Tensor, module: nn.Linear) -> Tensor:
    bias = 0.0 if module.bias is None else module.bias.double()
    return x.double() @ module.weight.double().T + bias


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("inputs", [32, 192])
def test_products_are_exact_to_one_rounding(rows: int, inputs: int) -> None:
    """Feature counts that fill blocks and panels and that do not, with a bias and without, in one call."""
    linears = [linear(n, inputs, bias=n % 2 == 1) for n in (48, 16, 17, 61, 200)]
    x = random(rows, inputs)
    for out, module in zip(Products(linears)(x), linears, strict=True):
        expected = exact(x, module)
        assert out.dtype == torch.bfloat16
        assert ((out.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_products_of_fp32(rows: int) -> None:
    linears, x = (
        [linear(n, 96, bias=n == 17, dtype=torch.float32) for n in (17, 64)],
        random(rows, 96, dtype=torch.float32),
    )
    for out, module in zip(Products(linears)(x), linears, strict=True):
        torch.testing.assert_close(out.double(), exact(x, module), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_do_not_depend_on_each_other_or_on_threads(dtype: torch.dtype) -> None:
    """To the bit: alone, among the few, among the many; and from three threads, as from one."""
    linears, x = [linear(n, 576, bias=n == 33, dtype=dtype) for n in (100, 33)], random(300, 576, dtype=dtype)
    products, gated = (
        Products(linears),
        GatedProducts(*(linear(*s, dtype=dtype) for s in ((64, 576), (64, 576), (96, 64)))),
    )
    norm = RMSNorm(random(576, dtype=dtype), 1e-5, add_one=False)
    calls = [lambda x: products(x)[0], lambda x: products(x)[1], gated, norm]
    for call in calls:
        together = call(x)
        for rows in (1, 2, 3, 7, FEW_ROWS, FEW_ROWS + 1, FEW_ROWS_IN_PAIRS, FEW_ROWS_IN_PAIRS + 1):
            for first in (0, 300 - rows):
                assert torch.equal(call(x[first : first + rows].contiguous()), together[first : first + rows])
        torch.set_num_threads(3)
        try:
            assert torch.equal(call(x), together)
        finally:
            torch.set_num_threads(1)


def test_not_a_number_stays_one() -> None:
    x = random(2, 32)
    x[1, 3] = torch.nan
    (out,) = Products([linear(16, 32)])(x)
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(40, 32).bfloat16(),
        nn.Linear(32, 8).bfloat16(),
        nn.Linear(32, 32).half(),
        nn.Identity(),
    ],
)
def test_what_the_kernels_do_not_take(module: nn.Module) -> None:
    assert not can_multiply(module)


def test_siblings_compute_for_their_own_input() -> None:
    """In any order, again, and with another tensor in between."""
    linears = [linear(16, 32), linear(24, 32)]
    first, second = (forward for _, forward in Siblings(linears, KERNELS).forwards())
    x, y = random(3, 32), random(4, 32)
    for forward, module, given in (
        (first, linears[0], x),
        (second, linears[1], y),
        (second, linears[1], x),
        (second, linears[1], x),
        (first, linears[0], x),
        (first, linears[0], y),
    ):
        torch.testing.assert_close(forward(given), exact(given, module).bfloat16(), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("add_one", [False, True])
def test_rms_norm_rounds_as_transformers(add_one: bool) -> None:
    x, weight, eps = random(5, 64) * 3, random(64), 1e-5
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    expected = (normal * (1 + weight.float())).bfloat16() if add_one else weight * normal.bfloat16()
    ours = RMSNorm(weight, eps, add_one=add_one)(x)
    assert (ours == expected).float().mean() > 0.99
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=0)


def replaced(family: str, **config: Any) -> dict[str, str]:
    """Type of module → type of the forward that a bf16 model of this family gets."""
    raw = RawKeyModel(tiny(family, **config).bfloat16())
    return {type(module).__name__: type(forward).__name__ for module, forward in fast_modules(raw, KERNELS)}


def test_which_modules_are_replaced() -> None:
    llama = replaced("llama")
    assert llama == {"LlamaMLP": "GatedProducts", "LlamaRMSNorm": "RMSNorm", "Linear": "method"}
    gemma = replaced("gemma2")
    assert gemma["Gemma2RMSNorm"] == "RMSNorm"
    assert "Gemma2MLP" not in gemma, "its activation is not SiLU"
    assert "LlamaMLP" not in replaced("llama", hidden_act="gelu_pytorch_tanh")
    assert "CohereLayerNorm" not in replaced("cohere")


def shapes_found(family: str, **config: Any) -> set[str]:
    """The short forwards that a model of this family gets, in fp32."""
    model = Model(tiny(family, **config))
    forwards = (vars(module).get("forward") for module in model.raw.model.modules())
    return {type(forward).__name__ for forward in forwards} & {"PlainAttention", "PlainLayer"}


def test_short_forwards_only_where_the_shape_is_theirs() -> None:
    assert shapes_found("llama") == shapes_found("qwen2") == {"PlainAttention", "PlainLayer"}
    assert shapes_found("mistral") == {"PlainLayer"}, "its window is on the attention module"
    assert shapes_found("qwen3") == {"PlainAttention", "PlainLayer"}, "it normalises each head of queries and keys"
    assert "PlainAttention" not in shapes_found("olmo2"), "it normalises all heads together"
    assert shapes_found("granite", residual_multiplier=0.5, attention_multiplier=0.25) == {"PlainAttention"}
    assert shapes_found("olmo2") == shapes_found("gemma2") == set(), "norms behind attention and MLP"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "olmo2"])
def test_families_in_bf16_pass_the_probe(family: str) -> None:
    assert probe(Model(tiny(family, sharpness=1.0).bfloat16())) <= 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_instructions", [None, False])
def test_without_the_kernels_torch_does_their_work(
    dtype: torch.dtype, has_instructions: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """has_instructions: whether oneDNN has any for such weights; None, as this processor says."""
    monkeypatch.setattr("prerope.server.models.cpu.products.library", lambda: None)
    if has_instructions is not None:
        for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
            monkeypatch.setattr(torch.ops.mkldnn, name, lambda: has_instructions)
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *_: pytest.fail("it raises there"))
    assert replaced("llama") == {"Linear": "function"}
    assert probe(Model(tiny("llama", sharpness=1.0).to(dtype))) <= 2 * TOLERANCE[dtype]


def test_with_matrix_tiles_many_rows_go_to_torch_and_few_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    layers, calls = [linear(48, 64, bias=True), linear(32, 64)], []
    multiply = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(1) or multiply(*args))
    products = Products(layers)
    for rows, expected_calls in ((products.few_rows, 0), (products.few_rows + 1, len(layers))):
        x = random(rows, 64)
        calls.clear()
        outs = products(x)
        assert len(calls) == expected_calls
        for out, module in zip(outs, layers, strict=True):
            expected = exact(x, module)
            assert ((out.double() - expected).abs() <= expected.abs() * 2**-7 + 1e-4).all()
    assert probe(Model(tiny("llama", sharpness=1.0).bfloat16())) <= 2 * TOLERANCE[torch.bfloat16]
