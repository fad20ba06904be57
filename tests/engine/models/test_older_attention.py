"""Decoders that attend in code of their own, some with scores that fall with the distance: variants, and an engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prerope.rope.spec import RopeSpec
from prerope.server.models.checks.probe import probe
from prerope.server.models.model import Model

from tests.engine.models.model_table import Verdict, as_people_run_it, examine
from tests.engine.models.model_types import tiny_of_type
from tests.engine.models.test_families import NUM_TOKENS, transformers_greedy
from tests.engine.tiny_models import assert_idle, generate, greedy, prompt_of, tiny_engine
from tests.tiers import every

NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}


@pytest.mark.parametrize(
    ("model_type", "config"),
    every(
        3,
        [
            ("bloom", {"n_head": 6, "hidden_size": 96}),  # slopes of a number of heads that is no power of two
            ("mpt", {"n_heads": 6, "d_model": 96, "attn_config": {"clip_qkv": 0.5}}),
            ("falcon", {"alibi": True}),
            ("falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 4}),
            ("falcon", NEW),
            ("falcon", NEW | {"alibi": True}),
        ],
        quick=1,
    ),
)
def test_variants(model_type: str, config: dict[str, Any]) -> None:
    """Beyond the trained length, in fp32 and bf16, in one piece, in chunks and one token at a time."""
    assert examine(model_type, **config) == Verdict("served")


def test_a_key_is_kept_once_for_all_heads_that_read_it() -> None:
    """transformers copies Falcon's keys to every query head before it attends."""
    model = Model(tiny_of_type("falcon", **NEW))
    assert {layer.shape.num_kv_heads for layer in model.layers} == {2}


@pytest.mark.parametrize(
    ("model_type", "config", "longest"),
    every(
        1,
        [
            ("bloom", {"tie_word_embeddings": False}, 100),
            ("deepseek_v3", {}, 100),  # multi-head latent attention, its keys and values expanded
            ("mpt", {}, 100),
            ("falcon", {"alibi": True}, 100),
            ("xglm", {"tie_word_embeddings": False}, 48),
        ],
        quick=2,
    ),
)
def test_greedy_equals_generate(model_type: str, config: dict[str, Any], longest: int) -> None:
    """Chunks beside decodes, with hits in the prefix cache; and with so few blocks that a sequence is preempted."""
    transformers_model = tiny_of_type(model_type, **config)
    prompts = [prompt_of(length, seed=length) for length in (5, longest // 2, longest)]
    prompts.append(prompts[-1][:40] + prompt_of(8))
    with as_people_run_it(transformers_model, 256):
        expected = transformers_greedy(transformers_model, prompts)
    model = Model(transformers_model)
    probe(model)
    length = model.raw.reach or 256
    engine = tiny_engine(model, max_model_len=length, max_batched_tokens=37, max_num_seqs=8)
    assert generate(engine, prompts[:3], greedy(NUM_TOKENS)) == expected[:3]
    assert generate(engine, prompts[3:], greedy(NUM_TOKENS)) == expected[3:]
    assert engine.stats().prefix_hit_tokens == 32
    tight = tiny_engine(
        model, max_model_len=length, max_batched_tokens=64, num_blocks=-(-longest // 16) + 4, speculation="off",
        stream_gap_s=None,
    )  # fmt: skip
    assert generate(tight, prompts, greedy(NUM_TOKENS)) == expected
    assert tight.scheduler.num_preemptions > 0
    for one in (engine, tight):
        assert_idle(one)


def test_a_table_of_positions_does_not_bound_a_rotation() -> None:
    """GPT-J's forward in transformers ends with its table; keys that are turned as they are read go on."""
    model = Model(tiny_of_type("gptj"))
    assert model.raw.reach == 64
    rotary = model.rotaries[""]
    assert (rotary.dim, rotary.interleaved, rotary.train_length) == (8, True, 64)
    engine = tiny_engine(model, RopeSpec(method="rerope", window=16), max_model_len=256)
    (tokens,) = generate(engine, [prompt_of(150)], greedy(8))
    assert len(tokens) == 8


def test_slopes_are_those_of_transformers() -> None:
    """As published (Press 2021): 2^(−8h/n) for n heads, a power of two."""
    model = Model(tiny_of_type("bloom"))
    calls: list[torch.Tensor] = []
    with torch.inference_mode():
        model.raw.forward(
            torch.arange(3, 9),
            torch.arange(6),
            torch.tensor([5]),
            lambda _module, query, _key, _value, call: (calls.append(call.slopes), query)[1],
        )
    assert all(torch.equal(slopes, 2.0 ** -torch.arange(2, 9, 2)) for slopes in calls)
