"""Hybrid models: layers that keep a state of a sequence beside keys and values, through transformers' own modules.

What transformers' `generate` says is the truth; a state that is one token off changes every token after it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prerope.cache.blocks.documents import DocumentSpan
from prerope.server.config import EngineConfig
from prerope.server.engine.limits import check_documents
from prerope.server.engine.memory.sizing import check_recurrent, size_cache
from prerope.server.errors import ConfigurationError, InvalidRequest
from prerope.server.models.checks.probe import TOLERANCE, probe
from prerope.server.models.model import Model

from tests.engine.models.model_types import tiny_of_type
from tests.engine.models.test_families import NUM_TOKENS, transformers_greedy
from tests.engine.tiny_models import assert_idle, generate, greedy, prompt_of, request, run, tiny_engine, tokens_of
from tests.tiers import every

HYBRIDS = ("lfm2", "qwen3_5_text", "granitemoehybrid")
"""A short convolution, a gated delta net, Mamba 2; test_model_types.py has all others."""

LENGTHS = (1, 5, 16, 33, 60, 100)


@pytest.mark.parametrize("family", every(4, [*HYBRIDS, "jamba"]))
def test_greedy_equals_generate(family: str) -> None:
    """In small chunks beside decodes; with so few blocks that sequences are preempted; with as few states as possible;
    and again over a warm cache."""
    transformers_model = tiny_of_type(family, max_position_embeddings=256)
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    expected = transformers_greedy(transformers_model, prompts)
    model = Model(transformers_model)
    assert probe(model) <= TOLERANCE[torch.float32] / 5
    tight = {"max_batched_tokens": 64, "num_blocks": 12, "stream_gap_s": None}
    for config in ({"max_batched_tokens": 37, "overlap": True}, tight, {"num_states": 2}):
        engine = tiny_engine(model, max_num_seqs=8, **config)  # type: ignore[arg-type]
        assert generate(engine, prompts, greedy(NUM_TOKENS)) == expected, config
        assert (engine.scheduler.num_preemptions > 0) == (config is tight)
        hits = engine.stats().prefix_hit_tokens
        assert generate(engine, prompts, greedy(NUM_TOKENS)) == expected, config
        found = engine.stats().prefix_hit_tokens - hits
        assert config is tight or (found > 0) == ("num_states" not in config), "two slots have no room for kept ones"
        assert_idle(engine)


@pytest.mark.parametrize(("family", "stepwise"), [("jamba", True), ("zaya", False), ("qwen3_5_text", False)])
def test_modules_that_begin_a_chunk_from_nothing_run_token_by_token(family: str, stepwise: bool) -> None:
    assert {layer.stepwise for layer in Model(tiny_of_type(family)).recurrent} == {stepwise}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(tiny_of_type("lfm2", max_position_embeddings=256))


def hits(engine: Any, prompt: list[int]) -> tuple[int, list[int]]:
    """(tokens found, reply) of one prompt."""
    before = engine.stats().prefix_hit_tokens
    (reply,) = generate(engine, [prompt], greedy(20))
    return engine.stats().prefix_hit_tokens - before, reply


def test_where_states_are_found(model: Model) -> None:
    """At the end of a prompt, at the end of its reply, and from the second time on where prompts part."""
    engine, cold = tiny_engine(model), tiny_engine(model, prefix_caching=False)
    system, own = prompt_of(50), [prompt_of(30, seed=seed) for seed in range(4)]
    found, reply = hits(engine, system + own[0])
    assert found == 0
    assert hits(engine, system + own[0])[0] == 64, "the last edge before the last token"
    turn = system + own[0] + reply + own[1]
    assert hits(engine, turn) == (96, hits(cold, turn)[1]), "the last edge of prompt and reply"
    assert hits(engine, system + own[2])[0] == 0, "its state at 48 was kept by nobody"
    assert hits(engine, system + own[3]) == (48, hits(cold, system + own[3])[1])
    assert cold.stats().num_cached_states == 0


def test_choices_and_aborts(model: Model) -> None:
    """Four choices of one prompt, drawn; and one that is aborted between two steps."""
    prompt = prompt_of(70)
    asked = [
        request(str(seed), prompt, greedy(16, temperature=1.0, seed=seed), cache_salt="" if seed else "alone")
        for seed in range(4)
    ]
    engine, replies = tiny_engine(model, max_batched_tokens=24), {}
    for one in asked:
        replies |= run(tiny_engine(model, prefix_caching=False), [one])
    for one in asked:
        engine.add(one)
    outputs: dict[str, list[Any]] = {one.request_id: [] for one in asked}
    while engine.has_work():
        for name, output in engine.step():
            outputs[name].append(output)
        if len(outputs["2"]) == 3 and engine.scheduler.running.get("2"):
            engine.abort("2")
        engine.check_integrity()
    for name in ("0", "1", "3"):
        assert tokens_of(outputs[name]) == tokens_of(replies[name])
    assert tokens_of(outputs["2"]) == tokens_of(replies["2"])[:3]
    assert_idle(engine)


@pytest.mark.parametrize("family", every(2, HYBRIDS))
def test_rows_do_not_see_their_neighbours(family: str) -> None:
    """In a step of many decodes a row has the bits that it has alone."""
    model = Model(tiny_of_type(family, max_position_embeddings=256).bfloat16())
    prompts = [prompt_of(length, seed=length) for length in (17, 40, 41, 90)]
    sampling = greedy(NUM_TOKENS, logprobs=3)
    together = run(tiny_engine(model), [request(str(n), prompt, sampling) for n, prompt in enumerate(prompts)])
    for number, prompt in enumerate(prompts):
        alone = run(tiny_engine(model), [request(str(number), prompt, sampling)])
        assert [output.logprobs for output in alone[str(number)]] == [
            output.logprobs for output in together[str(number)]
        ], family


def test_what_a_state_rules_out(model: Model) -> None:
    engine = tiny_engine(model)
    with pytest.raises(InvalidRequest, match=r"'documents'.*recurrent layers.*put the documents into the prompt"):
        check_documents([DocumentSpan(4, 20)], 30, 1, engine.info)
    with pytest.raises(ConfigurationError, match=r"CACHE_TIER_DIR.*'lfm2'.*leave both unset"):
        check_recurrent(model, EngineConfig(tier_memory=2**20))


def test_the_memory_of_states(model: Model) -> None:
    """Three a sequence, a quarter of the cache at most, or what is asked for; two at least."""
    one = sum(shape.num_bytes for shape in model.states)
    assert one == 2 * 64 * 3 * 4, "two convolutions of 64 channels over 3 tokens, fp32"
    config = EngineConfig(kv_cache_memory=2**22, max_model_len=64, max_num_seqs=4)
    size = size_cache(model, config)
    assert (size.num_states, size.state_bytes) == (12, 12 * one)
    small = size_cache(model, EngineConfig(kv_cache_memory=20 * one, max_model_len=16))
    assert small.num_states == 5
    assert small.num_bytes + small.state_bytes <= 20 * one
    asked = size_cache(model, EngineConfig(state_cache_memory=7 * one + 1, kv_cache_memory=2**22))
    assert asked.num_states == 7
    with pytest.raises(ConfigurationError, match=rf"STATE_CACHE_MEMORY is 5 bytes.*raise it to {2 * one} bytes"):
        size_cache(model, EngineConfig(state_cache_memory=5, kv_cache_memory=2**22))
