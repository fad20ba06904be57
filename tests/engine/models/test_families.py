"""Greedy output equals transformers' `generate`, token for token, for every family that is served."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from prerope.server.models.checks.probe import TOLERANCE, probe
from prerope.server.models.layers import PlainAttention
from prerope.server.models.model import Model

from tests.engine.tiny_models import FAMILIES, YARN, assert_idle, generate, greedy, prompt_of, tiny, tiny_engine
from tests.tiers import every

NUM_TOKENS = 16
LENGTHS = (5, 33, 60, 100)


@cache
def plain_greedy(lengths: tuple[int, ...]) -> list[list[int]]:
    """Of a Llama whose config says nothing of frequencies."""
    return transformers_greedy(tiny("llama"), [prompt_of(length, seed=length) for length in lengths])


def transformers_greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Before the model is taken over."""
    generated = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        generated.append(output[0, len(prompt) :].tolist())
    # Outputs that never vary would equal those of many wrong models too.
    assert len({token for tokens in generated for token in tokens}) >= 6
    return generated


@pytest.mark.parametrize("family", every(3, FAMILIES))
def test_greedy_equals_generate(family: str) -> None:
    """Chunked prefill beside decodes; and again with so few blocks that a sequence is preempted."""
    transformers_model = tiny(family)
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    expected = transformers_greedy(transformers_model, prompts)
    model = Model(transformers_model)
    assert probe(model) <= TOLERANCE[torch.float32] / 5
    engine = tiny_engine(model, max_batched_tokens=37, max_num_seqs=8)
    assert generate(engine, prompts, greedy(NUM_TOKENS)) == expected
    # Without drafts, which are made where they are faster, and chunks of any length: steps would be a matter of time.
    tight = tiny_engine(
        model, max_batched_tokens=64, max_num_seqs=8, num_blocks=16, speculation="off", stream_gap_s=None
    )
    assert generate(tight, prompts, greedy(NUM_TOKENS)) == expected
    assert tight.scheduler.num_preemptions > 0
    for one in (engine, tight):
        assert_idle(one)


SHORT, LONG = [1 + 0.1 * m for m in range(8)], [1 + 0.8 * m for m in range(8)]
ORIGINAL = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
# transformers gives all rows of a forward the frequencies of its longest row, so dynamic and longrope are compared
# where that is consistent: inside the trained length. The others have one set of frequencies.
CONFIGS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, LENGTHS),
    "yarn": (YARN, LENGTHS),
    "yarn-attention-factor": (YARN | {"attention_factor": 1.3}, LENGTHS),
    "llama3": (
        ORIGINAL | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        LENGTHS,
    ),
    "longrope": (ORIGINAL | {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}, (5, 33, 48)),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, LENGTHS),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_from_the_config(name: str) -> None:
    parameters, lengths = CONFIGS[name]
    transformers_model = tiny("llama", rope_parameters=parameters)
    prompts = [prompt_of(length, seed=length) for length in lengths]
    expected = transformers_greedy(transformers_model, prompts)
    if name != "dynamic":
        assert plain_greedy(lengths) != expected, "the config's frequencies must show in the output"
    model = Model(transformers_model)
    probe(model)
    assert generate(tiny_engine(model, max_batched_tokens=64), prompts, greedy(NUM_TOKENS)) == expected


SPECIAL: dict[str, dict[str, Any]] = {
    "ministral3": {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}},
    "olmo": {"clip_qkv": 0.5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SPECIAL)
def test_what_only_far_or_loud_rows_show(family: str, dtype: torch.dtype) -> None:
    """Ministral 3 scales the queries of rows past its trained length, and OLMo clips: no short forward may drop it."""
    transformers_model = tiny(family, **SPECIAL[family])
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    expected = transformers_greedy(transformers_model, prompts)
    model = Model(transformers_model.to(dtype))
    probe(model)
    assert not any(isinstance(layer.module.forward, PlainAttention) for layer in model.layers)
    if dtype == torch.float32:
        assert generate(tiny_engine(model, max_batched_tokens=64), prompts, greedy(NUM_TOKENS)) == expected


def test_longrope_past_the_trained_length_differs_from_transformers_in_early_rows_only() -> None:
    """Rows 0 … L−1 keep the short factors whatever follows: a prompt's beginning reads as it did when it was short."""
    parameters, _ = CONFIGS["longrope"]
    model = Model(tiny("llama", rope_parameters=parameters))
    engine = tiny_engine(model, max_batched_tokens=256, prefix_caching=True)
    short, longer = prompt_of(64), prompt_of(64) + prompt_of(120, seed=1)
    generate(engine, [short], greedy(1))
    cached = generate(engine, [longer], greedy(8))
    assert engine.stats().prefix_hit_tokens == 64
    assert cached == generate(tiny_engine(model, max_batched_tokens=256), [longer], greedy(8))
