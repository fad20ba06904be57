"""The modules and the forward that a model gets on CUDA, without a card on the CPU, in Triton's interpreter.

Held to transformers' own modules, logits and `generate`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prerope.server.models import model
from prerope.server.models.checks.probe import TOLERANCE, probe
from prerope.server.models.cuda import stack as cuda_stack
from prerope.server.models.cuda.products import KERNELS, Products, RMSNorm, can_multiply
from prerope.server.models.model import BACKENDS, Chunk, Model, build_batch, own_positions
from prerope.server.models.modules import Siblings, fast_modules
from prerope.server.models.raw_keys import RawKeyModel
from torch import Tensor, nn

from tests.device import DEVICE
from tests.engine.tiny_models import generate, greedy, prompt_of, tiny, tiny_engine, two_layers
from tests.kernels.conftest import interpreter
from tests.tiers import every

__all__ = ["interpreter"]  # a fixture, of every test here

LENGTHS = (5, 26)
NUM_TOKENS = 3
STACKED = ("llama", "qwen2", "qwen3", "smollm3")
OTHERS = ("gemma2", "gemma3_text", "mistral", "phi3", "olmo2", "mixtral", "gpt_oss")


def on_cuda(transformers_model: Any) -> Model:
    return Model(transformers_model, BACKENDS["cuda"])


def biased(transformers_model: Any) -> Any:
    """With every bias far from zero."""
    for name, parameter in transformers_model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return transformers_model


def transformers_greedy(transformers_model: Any, prompts: list[list[int]]) -> list[list[int]]:
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=DEVICE)
        output = transformers_model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append(output[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("family", every(4, [*STACKED, *OTHERS], quick=2))
def test_greedy_equals_generate(family: str) -> None:
    """The probe holds both ways to transformers' logits: layer by layer, and the stack."""
    transformers_model = biased(two_layers(family))
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    expected = transformers_greedy(transformers_model, prompts)
    ours = on_cuda(transformers_model)
    assert isinstance(ours.stack, cuda_stack.Stack) == (family in STACKED)
    assert probe(ours) <= TOLERANCE[torch.float32] / 10
    engine = tiny_engine(ours, max_batched_tokens=24)
    assert generate(engine, prompts, greedy(NUM_TOKENS)) == expected


@pytest.mark.parametrize("family", every(2, STACKED))
def test_the_stack_is_what_layers_give_one_by_one(family: str) -> None:
    """In fp16, where another place of rounding would show, with K and V that were stored."""
    ours = on_cuda(biased(two_layers(family, sharpness=1.0)).half())
    found = []
    for stack in (ours.stack, None):
        ours.stack = stack
        engine = tiny_engine(ours, cache_dtype=torch.float16)
        storage, positions = engine.storage, own_positions(ours)
        chunks = [
            Chunk.of(prompt_of(count, seed), 0, range(4 * seed, 4 * seed + 4), positions, min(count, 2))
            for seed, count in enumerate((1, 17, 8))
        ]
        logits = ours.forward(build_batch(chunks, 16, ours.device), storage)
        assert logits.dtype == torch.float32
        found.append((logits, *storage.keys, *storage.values))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-9, atol=2**-9)
        assert (one == other).float().mean() > 0.98


def replaced(family: str, **config: Any) -> dict[str, str]:
    """Type of module → type of the forward that a model of this family gets."""
    raw = RawKeyModel(two_layers(family, **config))
    return {type(module).__name__: type(forward).__name__ for module, forward in fast_modules(raw, KERNELS)}


def test_which_modules_are_replaced() -> None:
    llama = replaced("llama")
    assert llama == {"LlamaMLP": "GatedProducts", "LlamaRMSNorm": "RMSNorm", "Linear": "method"}
    gemma = replaced("gemma2")
    assert gemma["Gemma2RMSNorm"] == "RMSNorm"
    assert "Gemma2MLP" not in gemma, "its activation is not SiLU"
    assert "LlamaMLP" not in replaced("llama", hidden_act="gelu_pytorch_tanh")
    assert "CohereLayerNorm" not in replaced("cohere")
    assert replaced("phi3")["Phi3MLP"] == "GatedProducts", "gate and up are one layer"
    assert "Phi3MLP" not in replaced("phi3", hidden_act="gelu")
    for family, norm in (("qwen3", "Qwen3RMSNorm"), ("olmo2", "Olmo2RMSNorm"), ("gpt_oss", "GptOssRMSNorm")):
        assert replaced(family)[norm] == "RMSNorm"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_norms_round_as_their_modules(family: str) -> None:
    """Found in fp16, where each way of rounding gives other members."""
    raw = RawKeyModel(two_layers(family).half())
    norms = [forward for _, forward in fast_modules(raw, KERNELS) if isinstance(forward, RMSNorm)]
    ways = {(norm.add_one, norm.round_once) for norm in norms}
    assert ways == {{"llama": (False, False), "gemma3_text": (True, True), "olmo2": (False, True)}[family]}


def num_bytes(transformers_model: Any) -> int:
    """Of every storage that a parameter lies in."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in transformers_model.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("family", every(1, ["llama", "qwen2", "gemma3_text"], quick=1))
def test_merged_weights_are_the_only_ones(family: str) -> None:
    """Parameters lie in the merged tensors, whose bytes are theirs; transformers' own forward gives what it gave."""
    transformers_model = biased(two_layers(family))
    ids = torch.tensor([prompt_of(20)], device=DEVICE)
    before, expected = num_bytes(transformers_model), transformers_model(ids).logits
    ours = on_cuda(transformers_model)
    assert num_bytes(transformers_model) == before
    with ours.raw.stock():
        assert torch.equal(transformers_model(ids).logits, expected)
    held = {p.untyped_storage().data_ptr() for p in transformers_model.parameters()}
    assert len(held) < len(list(transformers_model.parameters()))
    if isinstance(ours.stack, cuda_stack.Stack):
        for layer in ours.stack._layers:
            for products in (layer.query_key_value, layer.output, layer.mlp._first, layer.mlp._second):
                assert products.weight.untyped_storage().data_ptr() in held


def exact(x: Tensor, linear: nn.Linear) -> Tensor:
    bias = 0.0 if linear.bias is None else linear.bias.double()
    return x.double() @ linear.weight.double().T + bias


@torch.inference_mode()
@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False)])
def test_products(biases: tuple[bool, bool]) -> None:
    """Merged twice, as siblings and by the stack, they are merged once."""
    with torch.inference_mode(False):
        linears = [nn.Linear(20, 12 + 4 * place, bias=bias) for place, bias in enumerate(biases)]
    x = torch.randn(1, 7, 20)
    expected = [exact(x, linear) for linear in linears]
    for products in (Products(linears), Products(linears)):
        outs = products(x)
        for out, wanted in zip(outs, expected, strict=True):
            torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)
            assert out.stride(-1) == 1
        assert products.weight.data_ptr() == linears[0].weight.data_ptr()
        assert products.weight.untyped_storage().data_ptr() == linears[1].weight.untyped_storage().data_ptr()


def test_siblings_keep_nothing() -> None:
    linears = [nn.Linear(20, 8), nn.Linear(20, 12)]
    siblings = Siblings(linears, KERNELS)
    first, second = (forward for _, forward in siblings.forwards())
    x = torch.randn(3, 20)
    for forward, linear in ((first, linears[0]), (second, linears[1])):
        torch.testing.assert_close(forward(x).double(), exact(x, linear), rtol=1e-5, atol=1e-6)
    assert siblings._input is None
    assert siblings._results == {}


@pytest.mark.parametrize(
    "module", [nn.Linear(8, 8).double(), nn.Identity(), nn.Bilinear(4, 4, 4), nn.Linear(8, 8).to(torch.float8_e5m2)]
)
def test_what_is_not_merged(module: nn.Module) -> None:
    assert not can_multiply(module)


def test_a_model_whose_window_is_off_has_a_stack() -> None:
    """Mistral's later models, and Qwen 2 as it is published."""
    assert on_cuda(two_layers("mistral", sliding_window=None)).stack is not None


def test_models_with_more_around_or_between_have_no_stack() -> None:
    """Granite with all its multipliers at 1 is Llama."""
    names = ("embedding_multiplier", "logits_scaling", "residual_multiplier")
    plain = dict.fromkeys(names, 1.0) | {"attention_multiplier": 0.25}
    assert on_cuda(tiny("granite", num_hidden_layers=1, **plain)).stack is not None
    for scaled in names:
        assert on_cuda(tiny("granite", num_hidden_layers=1, **plain | {scaled: 2.0})).stack is None, scaled


@pytest.mark.parametrize("family", every(2, ["qwen2", "qwen3"]))
def test_the_whole_path_of_a_gpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the GPU's attention and store, which take rows of the merged projection as they lie."""
    from prerope.cache import storage
    from prerope.cache.cuda import attention as cuda

    def store(self: Any, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        cuda.cuda_store(key, value, self.keys[layer], self.values[layer], slots)

    transformers_model = biased(two_layers(family))
    prompts = [prompt_of(length, seed=length) for length in (2, 9)]
    expected = transformers_greedy(transformers_model, prompts)
    monkeypatch.setattr(model, "attention_on", lambda _: cuda.cuda_attention)
    monkeypatch.setattr(storage.KVStorage, "store", store)
    ours = on_cuda(transformers_model)
    assert ours.stack is not None
    engine = tiny_engine(ours, max_batched_tokens=8, num_blocks=4)
    assert generate(engine, prompts, greedy(NUM_TOKENS)) == expected
