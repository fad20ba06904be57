"""Requests through the engine: what is refused, how each ends, what outputs carry."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from prerope.rope.spec import RopeSpec
from prerope.server.config import EngineConfig
from prerope.server.engine.engine import Engine
from prerope.server.engine.loading import load_engine
from prerope.server.engine.memory.sizing import size_cache
from prerope.server.engine.outputs import FinishReason, TokenOutput
from prerope.server.engine.sequence import SamplingParams
from prerope.server.errors import ConfigurationError, DeadlineExceeded, InvalidRequest
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.models.model import Model

from tests.engine.tiny_models import (
    assert_idle,
    generate,
    greedy,
    prompt_of,
    request,
    run,
    tiny_engine,
    tokens_of,
)


@pytest.fixture
def engine(model: Model) -> Engine:
    return tiny_engine(model, max_batched_tokens=64)


def only(engine: Engine, prompt: list[int], sampling: SamplingParams, **options: Any) -> list[TokenOutput]:
    return run(engine, [request("0", prompt, sampling, **options)])["0"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_the_longest_request_runs(engine: Engine) -> None:
    outputs = only(engine, prompt_of(200), greedy(56))
    assert len(tokens_of(outputs)) == 56
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_bad_method_of_a_request(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="unknown position method 'spiral'") as refusal:
        engine.resolve_positions(RopeSpec(method="spiral"))
    assert refusal.value.param == "rope"
    with pytest.raises(InvalidRequest, match=r"ROPE_WINDOW\) is 64.*between 1 and 63"):
        engine.resolve_positions(RopeSpec(method="rerope", window=64))
    spec = RopeSpec(method="rerope", window=16)
    assert engine.resolve_positions(spec) is engine.resolve_positions(replace(spec)), (
        "one object, so that plans are shared"
    )
    assert engine.resolve_positions(RopeSpec(method="model")) is engine.info.positions


def test_running_and_waiting_tokens_are_those_still_to_be_computed(model: Model) -> None:
    engine = tiny_engine(model, max_batched_tokens=32, max_num_seqs=1)
    engine.add(request("0", prompt_of(100), greedy(5)))
    engine.add(request("1", prompt_of(70), greedy(5)))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running_tokens, stats.num_waiting_tokens) == (68, 70)


def test_more_sequences_than_tokens_in_a_step() -> None:
    with pytest.raises(ConfigurationError, match=r"MAX_NUM_SEQS is 64.*MAX_BATCHED_TOKENS \(32\)"):
        load_engine(Checkpoint("nowhere", "nothing"), EngineConfig(max_num_seqs=64, max_batched_tokens=32))


def test_the_cache_must_hold_the_longest_request(model: Model) -> None:
    token_bytes = 4 * 2 * (16 + 16) * 4
    room = EngineConfig(kv_cache_memory=100 * 16 * token_bytes, max_model_len=1600)
    size = size_cache(model, room)
    assert (size.num_blocks, size.max_model_len, size.num_bytes) == (100, 1600, 100 * 16 * token_bytes)
    with pytest.raises(ConfigurationError, match=r"MAX_MODEL_LEN is 1601 .* holds 1600 .*KV_CACHE_MEMORY"):
        size_cache(model, replace(room, max_model_len=1601))
    with pytest.raises(ConfigurationError, match=r"KV_CACHE_MEMORY: 1000 bytes .* one block of 16 tokens, 16384 bytes"):
        size_cache(model, replace(room, kv_cache_memory=1000, max_model_len=None))
    derived = size_cache(model, replace(room, max_model_len=None, rope=RopeSpec(method="auto")))
    assert derived.max_model_len == 4 * 64
    with pytest.raises(ConfigurationError, match="unknown position method"):
        size_cache(model, replace(room, max_model_len=None, rope=RopeSpec(method="spiral")))


# --- ends -------------------------------------------------------------------------------------------------------------


def test_ends(engine: Engine) -> None:
    """length; a stop id; end of sequence; and either of them held off by min_tokens."""
    prompt = prompt_of(20)
    (tokens,) = generate(engine, [prompt], greedy(30))
    # A token that comes again later, so that holding it off has somewhere to go.
    stop = tokens[4]
    first = tokens.index(stop)
    outputs = only(engine, prompt, greedy(30, stop_token_ids=frozenset({stop})))
    assert tokens_of(outputs) == tokens[: first + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert [output.finish_reason for output in outputs[:-1]] == [None] * first

    held = only(engine, prompt, greedy(30, stop_token_ids=frozenset({stop}), min_tokens=first + 3))
    assert stop not in tokens_of(held)[: first + 3]
    assert len(tokens_of(held)) >= first + 3

    engine.info = replace(engine.info, eos_token_ids=frozenset({stop}))
    assert tokens_of(only(engine, prompt, greedy(30, ignore_eos=False))) == tokens[: first + 1]
    assert tokens_of(only(engine, prompt, greedy(30, ignore_eos=True))) == tokens


def test_an_old_request_is_aborted(model: Model) -> None:
    engine = tiny_engine(model, request_timeout_s=0.0, max_batched_tokens=16)
    (output,) = only(engine, prompt_of(100), greedy(5))
    assert output.finish_reason is FinishReason.ABORT
    assert isinstance(output.failure, DeadlineExceeded), "it has no token to show"
    assert "0 of 100 prompt tokens" in str(output.failure)
    assert_idle(engine)


@pytest.mark.parametrize(("num_steps", "begun"), [(2, False), (8, True)])
def test_a_deadline_of_its_own_ends_one_request_and_no_other(model: Model, num_steps: int, begun: bool) -> None:
    """In mid-prefill with an error, in mid-decode with what it has."""
    engine = tiny_engine(model, max_batched_tokens=32)
    engine.add(request("late", prompt_of(100), greedy(50), deadline=time.monotonic() + 3600))
    engine.add(request("other", prompt_of(100, seed=1), greedy(20)))
    for _ in range(num_steps):
        engine.step()
    (late, _) = engine.scheduler.sequences
    late.deadline = time.monotonic()
    outputs: dict[str, list[TokenOutput]] = {"late": [], "other": []}
    while engine.has_work():
        for request_id, output in engine.step():
            outputs[request_id].append(output)
        engine.check_integrity()
    (end,) = outputs["late"]
    assert end.finish_reason is FinishReason.ABORT
    assert isinstance(end.failure, DeadlineExceeded) is not begun
    assert outputs["other"][-1].finish_reason is FinishReason.LENGTH
    assert_idle(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 3, 8])
def test_abort_frees_blocks_at_once(model: Model, num_steps: int) -> None:
    """While it waits, in mid-prefill, in mid-decode."""
    engine = tiny_engine(model, max_batched_tokens=32)
    engine.add(request("0", prompt_of(100), greedy(50)))
    for _ in range(num_steps):
        engine.step()
    output = engine.abort("0")
    assert output is not None
    assert output.finish_reason is FinishReason.ABORT
    assert_idle(engine)
    assert engine.abort("0") is None
    assert engine.step() == []


# --- what outputs carry -----------------------------------------------------------------------------------------------


def test_progress_of_a_long_prefill(model: Model) -> None:
    engine = tiny_engine(model, max_batched_tokens=32)
    outputs = only(engine, prompt_of(100), greedy(2), report_progress=True)
    assert [output.num_processed_tokens for output in outputs] == [32, 64, 96, 100, 100]
    assert [len(output.token_ids) for output in outputs] == [0, 0, 0, 1, 1]
    again = only(engine, prompt_of(100), greedy(2), report_progress=True)
    assert [output.num_processed_tokens for output in again] == [100, 100]
    assert {output.num_cached_tokens for output in again} == {96}


def test_counts_and_timings(engine: Engine) -> None:
    outputs = only(engine, prompt_of(40), greedy(7))
    assert {output.num_prompt_tokens for output in outputs} == {40}
    assert all(output.timings is not None for output in outputs), "its reader may end it at any of them"
    timings = outputs[-1].timings
    assert timings is not None
    assert min(timings.queue_s, timings.prefill_s, timings.decode_s) >= 0
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.num_steps) == (40, 7, 7)
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens, stats.num_preemptions) == (40, 0, 0)
    assert stats.num_cached_blocks == 2, "46 computed tokens fill two blocks of 16"


def test_scoring_alone_generates_nothing(engine: Engine) -> None:
    (output,) = only(engine, prompt_of(100), greedy(0, prompt_logprobs=0))
    assert (output.token_ids, output.finish_reason) == ((), FinishReason.LENGTH)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 100
    assert engine.stats().generation_tokens == 0


def test_prompt_logprobs_come_once_and_survive_preemption(model: Model) -> None:
    """Scored in chunks, thrown back in between, with a warm cache beside: each prompt token is scored exactly once."""
    prompt, sampling = prompt_of(100), greedy(3, prompt_logprobs=2, logprobs=0)
    plain = only(tiny_engine(model, max_batched_tokens=256), prompt, sampling)
    engine = tiny_engine(model, max_batched_tokens=16)
    only(engine, prompt, greedy(1))
    engine.add(request("0", prompt, sampling))
    outputs: list[TokenOutput] = []
    steps = 0
    while engine.has_work():
        steps += 1
        if steps in (3, 9):
            engine.scheduler.preempt(engine.scheduler.running["0"])
        outputs += [output for _, output in engine.step()]
    assert engine.scheduler.num_preemptions == 2
    assert [output.prompt_logprobs is not None for output in outputs] == [True, False, False]
    assert tokens_of(outputs) == tokens_of(plain)
    ours, theirs = outputs[0].prompt_logprobs, plain[0].prompt_logprobs
    assert ours is not None
    assert theirs is not None
    assert [one and one.token_id for one in ours] == [None, *prompt[1:]] == [one and one.token_id for one in theirs]
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert one is not None
        assert other is not None
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_rows_that_are_scored_are_few_in_a_step(engine: Engine) -> None:
    """Each costs as much as several that are only read, and everybody waits for the step. (Its budget: 64 tokens.)"""
    for start, steps in ((0, 13), (50, 7)):  # 99 or 50 rows, eight a step; what is read before them takes none
        before = engine.stats().num_steps
        only(engine, prompt_of(100, seed=start), greedy(0, prompt_logprobs=1, prompt_logprobs_start=start))
        assert engine.stats().num_steps - before == steps


def test_a_salt_keeps_prefixes_apart(engine: Engine) -> None:
    prompt = prompt_of(40)
    for salt, cached in (("a", 0), ("a", 32), ("b", 0), ("", 0), ("b", 32)):
        assert only(engine, prompt, greedy(1), cache_salt=salt)[0].num_cached_tokens == cached


def test_output_becomes_a_prefix(engine: Engine) -> None:
    """The next turn of a chat begins with this turn's answer: its blocks are found as well."""
    prompt = prompt_of(20)
    (answer,) = generate(engine, [prompt], greedy(30))
    outputs = only(engine, [*prompt, *answer, *prompt_of(10, seed=1)], greedy(5))
    assert outputs[0].num_cached_tokens == 48
    uncached = tiny_engine(engine.model, prefix_caching=False)
    assert tokens_of(outputs) == tokens_of(only(uncached, [*prompt, *answer, *prompt_of(10, seed=1)], greedy(5)))
