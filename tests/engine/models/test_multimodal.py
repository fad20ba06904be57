"""Folders of models that see: their text model is served, and says what the whole says of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prerope.server.errors import ConfigurationError
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.models.checks.probe import probe
from prerope.server.models.model import Model, load_model
from prerope.server.models.senses import without_timm
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM

from tests.engine.models.model_table import logits, row_errors, stock_logits
from tests.engine.models.model_types import tiny_config
from tests.engine.tiny_models import SHAPE, generate, greedy, prompt_of, randomize, tiny_engine
from tests.tiers import every

TEXT = SHAPE | {"num_hidden_layers": 2}
EYE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "num_heads": 2,
    "depth": 1,
    "embed_dim": 32,
    "out_hidden_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral"}),
    "qwen2_vl": ({"rope_parameters": AXES}, {"hidden_size": 64}),
    "qwen2_5_vl": ({"rope_parameters": AXES}, {}),
    "qwen3_vl": ({"rope_parameters": AXES | {"mrope_interleaved": True}}, {"deepstack_visual_indexes": [0]}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model"}),
    "internvl": ({"model_type": "qwen2"}, {"image_size": [28, 28], "patch_size": [14, 14]}),
    "glm4v": ({"rope_parameters": AXES | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}, {}),
    "smolvlm": ({"model_type": "llama"}, {}),
    "idefics3": ({"model_type": "llama"}, {}),
    "gemma3": ({"sliding_window": 8, "query_pre_attn_scalar": 16}, {"model_type": "siglip_vision_model"}),
    "paligemma": ({"model_type": "gemma"}, {"model_type": "siglip_vision_model"}),
}


def saved(family: str, folder: Path) -> Path:
    """A tiny random model with an eye, in fp32."""
    text, eye = FAMILIES[family]
    config = AutoConfig.for_model(family, tie_word_embeddings=False, text_config=TEXT | text, vision_config=EYE | eye)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.data = torch.randn_like(parameter) * 0.16
            elif "norm" in name:
                parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> tuple[Model, list[str]]:
    lines: list[str] = []
    model = load_model(Checkpoint(str(folder), folder.name), "float32", "cpu", lines.append)
    probe(model)
    return model, lines


@pytest.mark.parametrize("family", every(1, [family for family in FAMILIES if family != "paligemma"], quick=4))
def test_the_text_model_is_served_and_equals_the_whole(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / family)
    prompt = prompt_of(20)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    expected = whole.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
    )
    model, lines = load(folder)
    assert any("text alone is served" in line for line in lines)
    assert not any("vis" in name for name, _ in model.raw.model.named_parameters())
    assert generate(tiny_engine(model), [prompt], greedy(8)) == [expected[0, 20:].tolist()]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3", "internvl"])
def test_a_folder_of_its_text_weights_alone_is_served(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / family)
    file, prompt = folder / "model.safetensors", prompt_of(20)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    weights = load_file(file)
    text = {name: tensor for name, tensor in weights.items() if not any(eye in name for eye in ("vis", "projector"))}
    assert 0 < len(text) < len(weights)
    save_file(text, file, {"format": "pt"})
    model, lines = load(folder)
    assert any("text alone is served" in line for line in lines)
    assert row_errors(logits(model, prompt, 7), stock_logits(whole, prompt)).max() < 1e-3
    save_file({name: tensor for name, tensor in text.items() if "layers.1.mlp" not in name}, file, {"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"lacks 3 weights that its config asks for: .*layers\.1\.mlp"):
        load(folder)


def test_a_prefix_language_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="reads what follows it"):
        load(saved("paligemma", tmp_path / "paligemma"))


def add_weights(folder: Path, **more: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {name.replace("__", "."): tensor for name, tensor in more.items()}, folder / "model.safetensors"
    )


def test_an_eye_that_needs_a_package_is_not_made(tmp_path: Path) -> None:
    """Gemma 3n sees by timm, which is not installed here."""
    with pytest.raises(ImportError, match="timm"):
        AutoModelForImageTextToText.from_config(tiny_config("gemma3n"))
    with torch.random.fork_rng(), without_timm():
        torch.manual_seed(0)
        whole = AutoModelForImageTextToText.from_config(tiny_config("gemma3n"), dtype=torch.float32).eval()
        randomize(whole)
    whole.save_pretrained(tmp_path)
    add_weights(tmp_path, model__vision_tower__timm_model__blocks__0__layer_scale__gamma=torch.ones(4))
    prompt = prompt_of(20)
    expected = stock_logits(whole, prompt)
    model, lines = load(tmp_path)
    assert any("vision_tower" in line for line in lines)
    assert row_errors(logits(model, prompt, 7), expected).max() < 1e-3


@pytest.mark.parametrize("family", every(1, ["qwen2_5_omni", "qwen3_omni_moe"], quick=1))
def test_of_a_model_that_speaks_what_thinks_is_served(family: str, tmp_path: Path) -> None:
    config = tiny_config(family, enable_audio_output=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
        randomize(whole)
    whole.save_pretrained(tmp_path)
    add_weights(
        tmp_path, talker__model__layers__0__mlp__up_proj__weight=torch.ones(4, 4), code2wav__scale=torch.ones(1)
    )
    prompt = prompt_of(20)
    expected = stock_logits(whole.thinker, prompt)
    model, lines = load(tmp_path)
    assert any("text alone is served" in line for line in lines)
    assert row_errors(logits(model, prompt, 7), expected).max() < 1e-3
