"""Tiny random models of many families, engines over them, and a loop that runs requests to their end.

Norm weights are random too: all ones, as transformers makes them, would hide a norm in the wrong place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from prerope.rope.model import ModelPositions, resolve_model
from prerope.rope.spec import RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.engine.engine import Engine
from prerope.server.engine.memory.sizing import CacheSize
from prerope.server.engine.outputs import TokenOutput
from prerope.server.engine.sequence import EngineRequest, SamplingParams
from prerope.server.models.model import Model
from transformers import AutoConfig, AutoModelForCausalLM

from tests.device import DEVICE

VOCABULARY = 128
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {},
    "gpt_neox": {},
    "cohere": {},
    "glm": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 8, "rope_parameters": YARN},
}
"""Families that are served, each with what its tiny config needs beside `SHAPE`."""


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")


def tiny(family: str, *, seed: int = 0, sharpness: float = 2.0, **config: Any) -> Any:
    """A random causal LM in fp32 on the device under test, the same numbers on any.

    sharpness: scales queries, keys and values, for attention that is peaked.
    """
    options = {**SHAPE, **FAMILIES.get(family, {}), **config}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **options), attn_implementation="eager", dtype=torch.float32
        ).eval()
        randomize(model, sharpness)
    return model.to(DEVICE)


def randomize(model: Any, sharpness: float = 2.0) -> Any:
    """Give every parameter random numbers, from torch's generator."""
    for name, parameter in model.named_parameters():
        random = torch.randn_like(parameter)
        if parameter.dim() > 1:
            projection = any(part in name for part in PROJECTIONS)
            parameter.data = random * (0.08 * sharpness if projection else 0.08)
        elif "norm" in name and "bias" not in name:
            parameter.data = 1 + 0.3 * random
        else:
            parameter.data = 0.1 * random
    return model


TWO_LAYERS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0]},
}


def two_layers(family: str, **config: Any) -> Any:
    """`tiny` of two layers, of both kinds where a family has two: for tests that run kernels in an interpreter."""
    return tiny(family, num_hidden_layers=2, **TWO_LAYERS.get(family, {}), **config)


def tiny_engine(
    model: Model,
    spec: RopeSpec | None = None,
    *,
    max_model_len: int = 256,
    num_blocks: int = 100,
    cache_dtype: torch.dtype = torch.float32,
    num_states: int = 12,
    **config: Any,
) -> Engine:
    """An engine of `num_blocks` blocks, which are 16 tokens each unless `block_size` says otherwise."""
    settings = EngineConfig(rope=spec or RopeSpec(method="model"), max_model_len=max_model_len, **config)
    positions = resolve_model(settings.rope, model.rotaries, max_model_len)
    size = CacheSize(num_blocks, 0, cache_dtype, max_model_len, num_states if model.states else 0)
    return Engine(model, settings, positions, size)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random tokens, the special ones left out."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(max_tokens: int, **sampling: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, "ignore_eos": True, **sampling})


def request(
    request_id: str,
    prompt: Sequence[int],
    sampling: SamplingParams,
    positions: ModelPositions | None = None,
    **options: Any,
) -> EngineRequest:
    return EngineRequest(request_id, prompt, sampling, positions, **options)


def run(engine: Engine, requests: Iterable[EngineRequest]) -> dict[str, list[TokenOutput]]:
    """Add all, step until nothing is left; every output by request id. Integrity is checked after each step."""
    outputs: dict[str, list[TokenOutput]] = {}
    for one in requests:
        engine.add(one)
        outputs[one.request_id] = []
    while engine.has_work():
        for request_id, output in engine.step():
            outputs[request_id].append(output)
        engine.check_integrity()
    return outputs


def tokens_of(outputs: Iterable[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def generate(engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[int]]:
    """All prompts at once; the new tokens of each."""
    outputs = run(engine, [request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)])
    return [tokens_of(outputs[str(i)]) for i in range(len(prompts))]


def assert_idle(engine: Engine) -> None:
    """Every block is free or cached, and nothing is left behind."""
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (0, 0, 0)
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_free_states == stats.num_states
    engine.check_integrity()
