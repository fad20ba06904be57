"""How far a config reaches and what counts as its trained length, on the facts of public configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prerope.rope.frequencies import Rotary
from prerope.rope.methods import native_length, resolve
from prerope.rope.model import default_max_model_len
from prerope.rope.reading import ROW_LENGTH_BUCKET
from prerope.rope.scores import method_scores
from prerope.rope.spec import RopeSpec
from transformers import AutoConfig

K = 1024
LONG = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PUBLIC: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    # name: what config.json says, (L of auto, limit of model, limit of auto)
    "Llama-3.1-8B": (
        {
            "model_type": "llama",
            "max_position_embeddings": 128 * K,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8 * K,
            },
        },
        (128 * K, 128 * K, 512 * K),
    ),
    "Llama-3.2-1B": (
        {
            "model_type": "llama",
            "max_position_embeddings": 128 * K,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8 * K,
            },
        },
        (128 * K, 128 * K, 512 * K),
    ),
    "Qwen2.5-7B": ({"model_type": "qwen2", "max_position_embeddings": 32 * K}, (32 * K, 32 * K, 128 * K)),
    "Qwen2.5-7B, its YaRN recipe": (
        {
            "model_type": "qwen2",
            "max_position_embeddings": 32 * K,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32 * K},
        },
        (128 * K, 128 * K, 512 * K),
    ),
    "Qwen3-8B, its YaRN recipe": (
        {
            "model_type": "qwen3",
            "max_position_embeddings": 40 * K,
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32 * K},
        },
        (128 * K, 128 * K, 512 * K),
    ),
    "yarn without an original": (
        {
            "model_type": "llama",
            "max_position_embeddings": 128,
            "rope_theta": 1e4,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        },
        (512, 512, 2 * K),
    ),
    "Qwen2.5-7B-Instruct-1M": (
        {
            "model_type": "qwen2",
            "max_position_embeddings": 1010000,
            "rope_theta": 1e7,
            "dual_chunk_attention_config": {
                "chunk_size": 256 * K,
                "local_size": 8 * K,
                "original_max_position_embeddings": 256 * K,
            },
        },
        (256 * K, 1010000, 1010000),
    ),
    "Phi-3-mini-128k": (
        {
            "model_type": "phi3",
            "pad_token_id": 0,
            "max_position_embeddings": 128 * K,
            "original_max_position_embeddings": 4 * K,
            "hidden_size": 96 * 32,
            "rope_scaling": {"type": "longrope"} | LONG,
        },
        (128 * K, 128 * K, 128 * K),
    ),
    "gemma-3-4b": (
        {
            "model_type": "gemma3_text",
            "max_position_embeddings": 128 * K,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        (128 * K, 128 * K, 512 * K),
    ),
    "deepseek-coder-6.7b": (
        {
            "model_type": "llama",
            "max_position_embeddings": 16 * K,
            "rope_theta": 1e5,
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
        (16 * K, 16 * K, 64 * K),
    ),
    "vicuna-7b-v1.5-16k": (
        {
            "model_type": "llama",
            "max_position_embeddings": 4 * K,
            "max_sequence_length": 16 * K,
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
        (16 * K, 16 * K, 64 * K),
    ),
    "internlm2_5-7b": (
        {
            "model_type": "llama",
            "max_position_embeddings": 32 * K,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        (32 * K, 64 * K, 64 * K),
    ),
    "gpt-oss-20b": (
        {
            "model_type": "gpt_oss",
            "max_position_embeddings": 128 * K,
            "rope_theta": 150000,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4 * K,
            },
        },
        (128 * K, 128 * K, 512 * K),
    ),
    "Ministral-3-3B": (
        {
            "model_type": "ministral3",
            "max_position_embeddings": 256 * K,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 16 * K,
            },
        },
        (256 * K, 256 * K, 1024 * K),
    ),
    "SmolLM3-3B": (
        {"model_type": "smollm3", "max_position_embeddings": 64 * K, "rope_theta": 5e6},
        (64 * K, 64 * K, 256 * K),
    ),
    "GLM-4-9B-0414": ({"model_type": "glm4", "max_position_embeddings": 32 * K}, (32 * K, 32 * K, 128 * K)),
    "c4ai-command-r-v01": (
        {"model_type": "cohere", "max_position_embeddings": 8 * K, "model_max_length": 128 * K, "rope_theta": 8e6},
        (128 * K, 128 * K, 512 * K),
    ),
    "CodeLlama-7b": (
        {"model_type": "llama", "max_position_embeddings": 16 * K, "rope_theta": 1e6},
        (16 * K, 16 * K, 64 * K),
    ),
    "Yarn-Llama-2-7b-128k": (
        {
            "model_type": "llama",
            "max_position_embeddings": 128 * K,
            "rope_scaling": {
                "type": "yarn",
                "factor": 32.0,
                "original_max_position_embeddings": 4 * K,
                "finetuned": True,
            },
        },
        (128 * K, 128 * K, 512 * K),
    ),
}


def rotary_of(facts: dict[str, Any]) -> Rotary:
    config = AutoConfig.for_model(**facts)
    nested = "full_attention" if "full_attention" in config.rope_parameters else None
    return Rotary.from_config(config, nested)


@pytest.mark.parametrize("name", PUBLIC)
def test_trained_length_and_limits_of_public_configs(name: str) -> None:
    facts, expected = PUBLIC[name]
    rotary = rotary_of(facts)
    limits = [default_max_model_len(RopeSpec(method=method), rotary) for method in ("model", "auto")]
    assert (native_length(rotary), *limits) == expected


DUAL_CHUNK = {
    "model_type": "qwen2",
    "max_position_embeddings": 1000,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "dual_chunk_attention_config": {"chunk_size": 40, "local_size": 8, "original_max_position_embeddings": 40},
}


@pytest.mark.parametrize("row", [3, 31, 32, 39, 40, 63, 64, 100, 300, 999])
def test_a_config_with_dual_chunk_attention_is_read_by_it(row: int) -> None:
    """Against the published positions, written out for one row: chunk_size 40, local_size 8, so chunks of 32."""
    method = resolve(RopeSpec(method="model"), rotary_of(DUAL_CHUNK))
    assert (method.name, method.train_length) == ("dual_chunk", 40)
    assert resolve(RopeSpec(method="auto"), rotary_of(DUAL_CHUNK)).digest() == method.digest()
    query, keys = torch.randn(1, 16, dtype=torch.float64), torch.randn(row + 1, 16, dtype=torch.float64)
    theta = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        pairs = torch.complex(x[:8], x[8:]) * torch.polar(torch.ones(8, dtype=torch.float64), position * theta)
        return torch.cat([pairs.real, pairs.imag])

    chunk = row // 32
    length = 40 if row < 40 else ROW_LENGTH_BUCKET * (row // ROW_LENGTH_BUCKET + 1)
    length = min(length, 32 * (chunk + 1))
    expected = []
    for j in range(row + 1):
        query_position = [row % 32, min(row % 32 + 32, 40), 40][min(chunk - j // 32, 2)]
        expected.append(turned(query[0], query_position) @ turned(keys[j], j % 32))
    sharper = max(1.0, 0.1 * float(torch.tensor(length / 40).log()) + 1.0)
    found = method_scores(query[:, None].float(), keys[:, None].float(), method, row)
    torch.testing.assert_close(found.flatten().double(), torch.stack(expected) * sharper, rtol=1e-4, atol=1e-4)
