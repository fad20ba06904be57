"""What a transformers config says about rotation, against transformers' own `ROPE_INIT_FUNCTIONS`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from prerope.rope.frequencies import Rotary
from prerope.rope.methods import resolve
from prerope.rope.model import default_max_model_len, resolve_model
from prerope.rope.reading import UNBOUNDED, PositionMethod
from prerope.rope.spec import RopeSpec
from transformers import CohereConfig, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

MODEL = RopeSpec(method="model")
LONG = {"short_factor": [1 + 0.02 * m for m in range(16)], "long_factor": [1 + 0.7 * m for m in range(16)]}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024}
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": YARN,
    "yarn-original-only": YARN | {"factor": 3.0},
    "yarn-mscale": YARN | {"mscale": 1.4, "mscale_all_dim": 0.7},
    "yarn-mscale-alone": YARN | {"mscale": 1.4},
    "yarn-attention-factor": YARN | {"attention_factor": 1.25},
    "yarn-betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-untruncated": YARN | {"truncate": False},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "longrope": {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 1024} | LONG,
    "longrope-no-factor": {"rope_type": "longrope", "original_max_position_embeddings": 1024} | LONG,
    "longrope-attention": {"rope_type": "longrope", "attention_factor": 1.1, "original_max_position_embeddings": 1024}
    | LONG,
}


def llama(parameters: dict[str, Any], **more: Any) -> LlamaConfig:
    parameters = {"rope_theta": 50_000.0} | parameters
    return LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=8192,
        rope_parameters=parameters,
        **more,
    )


def assert_same(method: PositionMethod, length: int, config: Any, rope_type: str, **options: Any) -> None:
    theirs, factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), **options)
    reading = method.reading(length)
    np.testing.assert_allclose(reading.theta.numpy(), theirs.double().numpy(), rtol=2e-6)  # theirs are made in fp32
    assert reading.attention_factor == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("longrope")])
def test_static_types(name: str) -> None:
    config = llama(CONFIGS[name])
    method = resolve(MODEL, Rotary.from_config(config))
    assert_same(method, method.train_length, config, CONFIGS[name]["rope_type"])
    assert method.run_end(0) == UNBOUNDED


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("longrope")])
def test_longrope_short_and_long(name: str) -> None:
    config = llama(CONFIGS[name])
    method = resolve(MODEL, Rotary.from_config(config))
    assert_same(method, method.run_end(1023), config, "longrope", seq_len=1024)
    assert_same(method, method.run_end(1024), config, "longrope", seq_len=1025)


@pytest.mark.parametrize("row_length", [8192, 8448, 16384])
def test_dynamic_at_one_length(row_length: int) -> None:
    config = llama({"rope_type": "dynamic", "factor": 2.0})
    method = resolve(MODEL, Rotary.from_config(config))
    assert method.name == "dynamic_ntk"
    assert method.run_end(row_length - 1) == row_length
    assert_same(method, row_length, config, "dynamic", seq_len=row_length)


def test_proportional() -> None:
    config = llama({"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0})
    rotary = Rotary.from_config(config)
    assert rotary.dim == rotary.head_dim
    assert_same(resolve(MODEL, rotary), 8192, config, "proportional")


def test_the_method_chosen_by_name_equals_the_one_in_a_config() -> None:
    """yarn by ROPE_METHOD on a plain model is yarn as another model's config has it."""
    plain = llama({"rope_type": "default"})
    chosen = resolve(RopeSpec(method="yarn", factor=8.0, train_length=1024), Rotary.from_config(plain))
    configured = resolve(MODEL, Rotary.from_config(llama(YARN)))
    assert chosen.digest() == configured.digest()


def test_lengths() -> None:
    rotary = Rotary.from_config(llama(YARN))
    assert (rotary.train_length, rotary.max_length) == (1024, 8192)
    plain = Rotary.from_config(llama({"rope_type": "default"}))
    assert (plain.train_length, plain.max_length) == (8192, 8192)
    assert default_max_model_len(RopeSpec(method="rope"), plain) == 8192
    assert default_max_model_len(RopeSpec(method="yarn", factor=2.5), plain) == 20480
    assert default_max_model_len(RopeSpec(method="auto"), plain) == 4 * 8192


def test_partial_rotary() -> None:
    config = GPTNeoXConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )
    rotary = Rotary.from_config(config)
    assert (rotary.head_dim, rotary.dim) == (16, 4)
    assert resolve(MODEL, rotary).reading(256).theta.shape == (2,)


def test_partial_longrope_of_phi3() -> None:
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 128,
        "short_factor": [1.0 + m for m in range(4)],
        "long_factor": [2.0 + m for m in range(4)],
    }
    config = Phi3Config(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=512, pad_token_id=0, rope_parameters=parameters
    )
    method = resolve(MODEL, Rotary.from_config(config))
    assert_same(method, 128, config, "longrope", seq_len=128)
    assert_same(method, 129, config, "longrope", seq_len=512)


def test_interleaved_is_what_inspection_found() -> None:
    config = CohereConfig(hidden_size=64, num_attention_heads=4)
    assert Rotary.from_config(config, interleaved=True).interleaved
    assert not Rotary.from_config(config).interleaved


def test_a_layer_type_has_a_base_of_its_own() -> None:
    """Gemma 3: the deployment's method is laid over full attention, the sliding layers keep their own."""
    config = Gemma3TextConfig(
        head_dim=16,
        max_position_embeddings=1024,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    rotaries = {group: Rotary.from_config(config, group) for group in ("sliding_attention", "full_attention")}
    assert (rotaries["full_attention"].base, rotaries["sliding_attention"].base) == (1e6, 1e4)
    positions = resolve_model(RopeSpec(method="rerope", window=100), rotaries, 4096)
    assert positions.main == "full_attention"
    assert positions.methods["full_attention"].name == "rerope"
    assert positions.methods["sliding_attention"].name == "rope"
    assert positions.described == {"method": "rerope", "window": 100, "train_length": 1024}
