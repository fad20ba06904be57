"""Quantised checkpoints: served with the weights that their numbers say, or refused by name with the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prerope.server.errors import ConfigurationError
from prerope.server.models.checkpoint import Checkpoint, resolve_checkpoint
from prerope.server.models.checks.probe import probe
from prerope.server.models.model import load_model
from prerope.server.models.quantized import schemes
from prerope.server.models.weights import load_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.tiny_models import tiny

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("original") / "model"
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def fp8_blocks(name: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // 32, 32, columns // 32, 32)
    scale = blocks.abs().amax((1, 3)) / 448
    stored = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
    return {f"{name}.weight": stored, f"{name}.weight_scale_inv": scale}


def fp8_channels(name: str, weight: Tensor) -> Tensors:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {f"{name}.weight": stored, f"{name}.weight_scale": scale.to(torch.bfloat16)}


def int4_groups(name: str, weight: Tensor) -> Tensors:
    """Eight numbers of four bits in an int32, the first in the lowest, each with 8 added."""
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, columns // 32, 32)
    scale = groups.abs().amax(2) / 7
    numbers = (groups / scale[..., None]).round().clamp(-8, 7).reshape(rows, columns // 8, 8).long() + 8
    packed = (numbers << (4 * torch.arange(8))).sum(2)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    return {
        f"{name}.weight_packed": packed,
        f"{name}.weight_scale": scale.to(torch.bfloat16),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }


def compressed(form: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, **more}},
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [32, 32]}
CT_FP8 = compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"})
W4A16 = compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32})


def written(original: Path, folder: Path, quantization: Any, store: Callable[[str, Tensor], Tensors]) -> Path:
    folder.mkdir()
    config = json.loads((original / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    tensors: Tensors = {}
    for name, weight in load_file(original / "model.safetensors").items():
        tensors |= store(name.removesuffix(".weight"), weight) if "proj" in name else {name: weight}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def assert_served(original: Path, folder: Path, error: float) -> None:
    """The weights are the original's but for rounding, and the check against transformers' own forward passes."""
    dense = load_file(original / "model.safetensors")
    model = load_model(Checkpoint(str(folder), "quantised"), "auto", "cpu", lambda _: None)
    probe(model)
    loaded = model.raw.model.state_dict()
    assert loaded.keys() == dense.keys()
    for name, tensor in dense.items():
        assert loaded[name].dtype == torch.bfloat16
        assert (loaded[name].float() - tensor.float()).norm() <= error * tensor.float().norm(), name


@pytest.mark.parametrize(
    ("quantization", "store", "error"),
    [(FP8, fp8_blocks, 0.04), (CT_FP8, fp8_channels, 0.04), (W4A16, int4_groups, 0.12)],
    ids=["fp8", "compressed-tensors FP8", "compressed-tensors W4A16"],
)
def test_schemes_of_float_and_packed_weights_are_dequantised(
    original: Path, tmp_path: Path, quantization: Any, store: Callable[[str, Tensor], Tensors], error: float
) -> None:
    assert_served(original, written(original, tmp_path / "model", quantization, store), error)


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4 = torch.cat([FP4, -FP4])
"""By its four bits: a sign, two of exponent, one of mantissa (OCP Microscaling Formats, 1.0)."""


def mxfp4(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Of four experts random blocks of 32 numbers, two in a byte, the first in the lower half; scales; the values."""
    bits = torch.randint(0, 16, (4, rows, columns), generator=generator)
    scales = torch.randint(118, 124, (4, rows, columns // 32), generator=generator)
    dense = FP4[bits] * torch.exp2(scales - 127.0).repeat_interleave(32, 2)
    blocks = (bits[..., ::2] | bits[..., 1::2] << 4).reshape(4, rows, columns // 32, 16)
    return blocks.to(torch.uint8), scales.to(torch.uint8), dense.transpose(1, 2)


def test_experts_in_mxfp4_are_dequantised(tmp_path: Path) -> None:
    """As gpt-oss has them."""
    generator = torch.Generator().manual_seed(0)
    whole = tiny("gpt_oss", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]).bfloat16()
    whole.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights, expected = load_file(tmp_path / "model.safetensors"), whole.state_dict()
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        columns, rows = weights.pop(name).shape[1:]
        weights[f"{name}_blocks"], weights[f"{name}_scales"], expected[name] = mxfp4(rows, columns, generator)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model = load_model(Checkpoint(str(tmp_path), "quantised"), "auto", "cpu", lambda _: None)
    probe(model)
    loaded = model.raw.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in expected.items())


@pytest.mark.parametrize(("option", "error"), [("load_in_4bit", 0.15), ("load_in_8bit", 0.02)])
def test_bitsandbytes_is_dequantised(original: Path, tmp_path: Path, option: str, error: float) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(**{option: True})
    AutoModelForCausalLM.from_pretrained(original, quantization_config=quantization, device_map="cpu").save_pretrained(
        tmp_path / "model"
    )
    assert_served(original, tmp_path / "model", error)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "by GPTQ (the package gptqmodel)"),
        ({"quant_method": "awq", "bits": 4}, "by AWQ (the package gptqmodel)"),
        ({"quant_method": "hqq"}, "by HQQ (the package hqq)"),
        ({"quant_method": "auto-round"}, "by AutoRound (the package auto-round)"),
        ({"quant_method": "bitnet"}, "by BitNet, which"),
        ({"quant_method": "modelopt_fp4"}, "by NVIDIA ModelOpt (the package nvidia-modelopt)"),
        ({"group_size": 64, "bits": 4}, "by MLX (the package mlx-lm)"),
        ({"quant_method": "strange"}, "by strange, which"),
    ],
)
def test_other_schemes_are_refused_by_name(original: Path, tmp_path: Path, quantization: Any, said: str) -> None:
    folder = written(original, tmp_path / "model", quantization, lambda name, weight: {f"{name}.weight": weight})
    with pytest.raises(ConfigurationError) as caught:
        load_weights(Checkpoint(str(folder), "quantised"), "auto", lambda _: None)
    assert said in str(caught.value)
    assert "Take the original checkpoint" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_text_model_of_several_says_is_read() -> None:
    inner = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    assert schemes.scheme_of({"model_type": "mistral3", "text_config": inner}) == "awq"
    assert schemes.scheme_of({"model_type": "mistral3", "text_config": {}}) is None


def test_modelopt_s_own_file_is_seen(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "model"))
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="ModelOpt"):
        load_weights(Checkpoint(str(folder), "quantised"), "auto", lambda _: None)


def test_a_package_that_is_not_there_is_named(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(original, tmp_path / "model", W4A16, int4_groups)
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(schemes.importlib.util, "find_spec", lambda _: None)
    checkpoint = resolve_checkpoint(str(folder), None, lambda _: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'prerope\[quantized\]'"):
        load_weights(checkpoint, "auto", lambda _: None)
