"""int8 weights: torchao's numbers, our products of them in fp64 to one rounding, models that run on them, refusals."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prerope.cache.kernels.build import library
from prerope.server.config import EngineConfig
from prerope.server.engine.loading import load_engine
from prerope.server.errors import ConfigurationError
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.models.checks.probe import TOLERANCE, probe
from prerope.server.models.cpu.products import FEW_ROWS, GatedProducts, Products, can_multiply
from prerope.server.models.model import Model
from prerope.server.models.quantized.int8 import INSTALL, check_quantization, int8_rows, quantize
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.engine.tiny_models import generate, greedy, prompt_of, request, run, tiny, tiny_engine
from tests.tiers import every

ROWS = (1, 2, 3, 4, 5, 8, 11, FEW_ROWS, FEW_ROWS + 1, 100, 300)


class Layers(nn.Module):
    """Enough of a transformers model for `quantize`."""

    def __init__(self, *linears: nn.Linear, config: Any = None) -> None:
        super().__init__()
        self.linears, self.config = nn.ModuleList(linears), config or SimpleNamespace()

    def get_output_embeddings(self) -> nn.Module | None:
        return None


def linear(features: int, inputs: int, *, bias: bool = False) -> nn.Linear:
    """bf16, not quantised; rows of very different size."""
    module = nn.Linear(inputs, features, bias=bias).requires_grad_(False)
    generator = torch.Generator().manual_seed(features)
    module.weight.copy_(torch.randn(features, inputs, generator=generator))
    module.weight.mul_(torch.logspace(-3, 2, features)[:, None])
    return module.bfloat16()


def quantized(*linears: nn.Linear) -> list[nn.Linear]:
    quantize(Layers(*linears))
    return list(linears)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def exact(x: Tensor, module: nn.Linear) -> Tensor:
    """By torchao's own weight, in fp64."""
    bias = 0.0 if module.bias is None else module.bias.double()
    return x.double() @ module.weight.dequantize(torch.float32).double().T + bias


def int8_model(family: str, **config: Any) -> Any:
    model = tiny(family, **config)
    quantize(model)
    return model


needs_kernels = pytest.mark.usefixtures("_kernels")


@pytest.fixture
def _kernels(decode_kernel: str) -> None:
    if library() is None:
        pytest.skip(decode_kernel)


# --- what the weights are ---


def test_a_weight_is_the_nearest_multiple_of_its_rows_scale() -> None:
    """Which spreads −128 to 127 over the row's range; torchao works it out in the weight's dtype."""
    module = linear(40, 64)
    before = module.weight.double()
    quantized(module)
    rows = int8_rows(module.weight)
    assert rows is not None
    data, scales = rows
    assert data.nbytes * 2 == before.numel() * torch.bfloat16.itemsize
    torch.testing.assert_close(scales.double(), before.abs().amax(1) / 127.5, rtol=2**-8, atol=0)
    nearest = (before / scales.double()[:, None]).round().clamp(-128, 127)
    assert ((data - nearest).abs() <= 1).all(), "but for ties"
    assert (data == nearest).double().mean() > 0.99
    assert not module.weight.requires_grad


def test_linear_layers_are_quantised_and_nothing_else() -> None:
    model = tiny("llama", tie_word_embeddings=True).bfloat16()
    others = {name: value.clone() for name, value in model.named_parameters() if "_proj" not in name}
    said = quantize(model)
    int8 = {name for name, value in model.named_parameters() if int8_rows(value)}
    assert int8 == {name for name, _ in model.named_parameters() if "_proj" in name}
    assert said.startswith(f"{len(int8)} linear layers in int8")
    for name, value in others.items():
        assert torch.equal(model.get_parameter(name), value)
    untied = int8_model("llama")
    assert int8_rows(untied.lm_head.weight) is None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_the_bf16_weights_are_let_go(tmp_path: Path) -> None:
    """Also in the file's pages: one tensor that lies there would keep all of it."""
    tiny("llama").bfloat16().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    before = model.model.embed_tokens.weight.clone()
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    quantize(model)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_what_is_more_than_rows_and_scales_is_left_to_torchao() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = linear(16, 32)
    quantize_(module, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    assert module.weight.qdata.dtype == torch.int8
    assert int8_rows(module.weight) is None
    assert not can_multiply(module)
    (shifted,) = quantized(linear(16, 32))
    assert int8_rows(shifted.weight) is not None
    shifted.weight.zero_point[3] = 1
    assert int8_rows(shifted.weight) is None


# --- products ---


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("inputs", [32, 192])
def test_products_are_exact_to_one_rounding(rows: int, inputs: int) -> None:
    """Feature counts that fill blocks and panels and that do not, with a bias and without, in one call."""
    linears = quantized(*(linear(n, inputs, bias=n % 2 == 1) for n in (48, 16, 17, 61, 200)))
    x = random(rows, inputs)
    for out, module in zip(Products(linears)(x), linears, strict=True):
        expected = exact(x, module)
        size = x.double().abs() @ module.weight.dequantize(torch.float32).double().abs().T
        assert out.dtype == torch.bfloat16
        assert ((out.double() - expected).abs() <= expected.abs() * 2**-8 + size * 1e-6).all()


@needs_kernels
@pytest.mark.parametrize("rows", [1, 8, FEW_ROWS + 1])
def test_every_int8_value_at_every_place(rows: int) -> None:
    """−128 too, beside any other: 256 rows that are each other's neighbours, shifted."""
    (module,) = quantized(linear(256, 256))
    places = torch.arange(256)
    int8_rows(module.weight)[0].copy_((places[:, None] * 3 + places) % 256 - 128)
    x = random(rows, 256)
    (out,) = Products([module])(x)
    assert ((out.double() - exact(x, module)).abs() <= exact(x, module).abs() * 2**-8 + 1e-3).all()


@needs_kernels
@pytest.mark.parametrize("rows", [9, 300])
def test_rows_do_not_depend_on_each_other_or_on_threads(rows: int) -> None:
    products, x = Products(quantized(linear(100, 64))), random(rows, 64)
    (together,) = products(x)
    least = 1 if rows <= FEW_ROWS else FEW_ROWS + 1
    assert torch.equal(products(x[:least].contiguous())[0], together[:least])
    torch.set_num_threads(3)
    try:
        (threaded,) = products(x)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(threaded, together)


@needs_kernels
def test_the_gated_mlp() -> None:
    gate, up, down = quantized(linear(64, 32), linear(64, 32), linear(48, 64))
    for rows in (3, 40):
        x = random(rows, 32)
        first, second = (exact(x, module).bfloat16() for module in (gate, up))
        expected = exact(nn.functional.silu(first) * second, down)
        difference = GatedProducts(gate, up, down)(x).double() - expected
        assert difference.square().mean() <= 2**-14 * expected.square().mean()


@needs_kernels
def test_what_the_kernels_take() -> None:
    assert can_multiply(quantized(linear(16, 32))[0])
    assert not can_multiply(quantized(linear(16, 40))[0])
    assert not can_multiply(quantized(linear(16, 32).float())[0])
    with pytest.raises(AssertionError):  # one product reads its weights in one way
        Products([linear(16, 32), *quantized(linear(16, 32))])


@needs_kernels
def test_with_matrix_tiles_many_rows_go_to_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    (module,) = quantized(linear(48, 64, bias=True))
    x = random(FEW_ROWS + 1, 64)
    assert torch.equal(Products([module])(x)[0], nn.functional.linear(x, module.weight, module.bias))


# --- models ---

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", "mixtral"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", every(2, FAMILIES))
def test_families_pass_the_probe_beside_torchaos_forward(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, sharpness=1.0).to(dtype)
    quantize(model)
    assert probe(Model(model)) <= 2 * TOLERANCE[dtype]


def dequantized(model: Any) -> Any:
    """The same model in fp32, with ordinary weights of the int8 values: what greedy decoding is compared with."""
    copy = tiny("llama", sharpness=1.0)
    for name, value in model.named_parameters():
        plain = value.dequantize(torch.float32) if int8_rows(value) else value.float()
        copy.get_parameter(name).data.copy_(plain)
    return copy


def reference_logits(model: Any, prompt: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    return logits


def test_greedy_tokens_are_those_of_transformers_on_the_dequantised_weights() -> None:
    int8 = int8_model("llama", sharpness=1.0)
    plain = dequantized(int8)
    prompt, tokens = prompt_of(40), list[int]()
    for _ in range(12):
        tokens.append(int(reference_logits(plain, prompt + tokens)[-1].argmax()))
    assert generate(tiny_engine(Model(int8)), [prompt], greedy(12)) == [tokens]


@needs_kernels
@pytest.mark.parametrize("rows", [1, 5])
def test_a_bf16_engine_in_one_call_as_layer_by_layer_and_near_the_dequantised_weights(rows: int) -> None:
    int8 = tiny("llama", sharpness=1.0).bfloat16()
    quantize(int8)
    plain, model = dequantized(int8), Model(int8)
    stack, model.stack = model.stack, None
    assert stack is not None
    found = []
    for chosen in (None, stack):
        model.stack = chosen
        engine = tiny_engine(model, cache_dtype=torch.bfloat16, max_num_seqs=rows, num_blocks=16 * rows)
        requests = [request(f"{n}", prompt_of(20 + n, n), greedy(8, logprobs=2)) for n in range(rows)]
        found.append({name: [output.logprobs for output in given] for name, given in run(engine, requests).items()})
    assert found[0] == found[1]
    for n in range(rows):
        prompt, logprobs = prompt_of(20 + n, n), found[0][f"{n}"]
        tokens = [given[0].token_id for given in logprobs]
        expected = reference_logits(plain, prompt + tokens).log_softmax(-1)
        for place, given in enumerate(logprobs):
            assert given[0].logprob == pytest.approx(float(expected[len(prompt) + place - 1, tokens[place]]), abs=0.1)


def test_without_the_kernels_torchao_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prerope.server.models.cpu.products.library", lambda: None)
    int8 = tiny("llama", sharpness=1.0).bfloat16()
    quantize(int8)
    model = Model(int8)
    projections = [module for name, module in int8.named_modules() if name.endswith("_proj")]
    assert projections
    assert not any("forward" in vars(module) for module in projections)
    assert probe(model) <= 2 * TOLERANCE[torch.bfloat16]


def test_an_engine_that_is_configured_so_loads_so(tiny_checkpoint: Path) -> None:
    config = EngineConfig(
        dtype="bfloat16", device="cpu", weight_quantization="int8", max_model_len=128, kv_cache_memory=2**20
    )
    lines: list[str] = []
    engine = load_engine(Checkpoint(str(tiny_checkpoint), "tiny"), config, lines.append)
    assert any(line.startswith("14 linear layers in int8") for line in lines)
    attention = engine.model.layers[0].module
    assert int8_rows(attention.q_proj.weight) is not None
    assert len(generate(engine, [[5, 6, 7]], greedy(4))[0]) == 4


# --- refusals ---


def test_only_on_the_cpu() -> None:
    with pytest.raises(ConfigurationError, match=r"int8, but the model runs on cuda:1.*WEIGHT_QUANTIZATION=none"):
        check_quantization("int8", torch.device("cuda:1"))
    check_quantization("none", torch.device("cuda:1"))


def test_without_torchao_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigurationError) as refused:
        check_quantization("int8", torch.device("cpu"))
    assert INSTALL in str(refused.value)
    check_quantization("none", torch.device("cpu"))


def test_the_command_installs_what_the_extra_asks_for() -> None:
    path = Path(__file__).parents[3] / "pyproject.toml"
    extras = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [f"pip install '{requirement}'" for requirement in extras["int8"]] == [INSTALL]
    assert set(extras["int8"]) <= set(extras["test"])


def test_a_quantised_checkpoint_is_not_quantised_again() -> None:
    model = Layers(linear(16, 32), config=SimpleNamespace(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(ConfigurationError, match="quantised already"):
        quantize(model)
    assert int8_rows(model.linears[0].weight) is None
