"""Speculation changes no token: with drafts and without, alone and in company, whatever is asked for and comes between.

Drafts are of an oracle, which knows what comes, so that many come true, and lies, so that many do not.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Several
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prerope.cache.blocks.manager import KVCacheManager
from prerope.cache.kernels.build import library
from prerope.rope.spec import RopeSpec
from prerope.server.engine import scheduler as scheduler_module
from prerope.server.engine import speculation
from prerope.server.engine import step as step_module
from prerope.server.engine.sampling import mask as mask_module
from prerope.server.engine.sequence import SamplingParams, Sequence
from prerope.server.engine.speculation import (
    GRAM,
    KINDS,
    MAX_COMMON,
    MAX_DRAFTS,
    PIECE,
    Acceptance,
    Drafter,
    History,
    Speculator,
    StepTimes,
)
from prerope.server.engine.step import Verification
from prerope.server.models.model import Model

from tests.device import DEVICE
from tests.engine.overlap.test_overlap_histories import History as RandomHistory
from tests.engine.scripted import sequence
from tests.engine.scripted_model import BLOCK, VOCABULARY, expected
from tests.engine.tiny_models import (
    assert_idle,
    generate,
    greedy,
    prompt_of,
    request,
    run,
    tiny,
    tiny_engine,
    tokens_of,
)


class Oracle(Speculator):
    """Drafts what comes, as far as it pleases, and now and then what does not."""

    def __init__(self, outputs: dict[str, list[int]], seed: int) -> None:
        super().__init__(max_num_seqs=64)
        self.random, self.outputs = random.Random(seed), outputs

    def plan(self, decoding: Several[Sequence], *, num_others: int, most: int) -> dict[Sequence, list[int]]:
        del num_others
        found = {}
        for one in decoding:
            rest = self.outputs[one.request_id][one.num_output_tokens :]
            drafts = rest[: min(self.random.randint(0, 5), one.num_more_drafts, most)]
            if drafts and self.random.random() < 0.4:
                place = self.random.randrange(len(drafts))
                drafts[place:] = [(drafts[place] + 1) % VOCABULARY] * (len(drafts) - place)
            if drafts and one.request.speculation:
                found[one] = drafts
                most -= len(drafts)
        return found


@pytest.fixture
def histories(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[RandomHistory]]:
    """Of requests of all kinds, added, aborted and preempted at random, over a cache that is too small for them."""
    monkeypatch.setattr(scheduler_module, "DRAFT_SHARE", 1)

    def run_all(overlap: bool) -> list[RandomHistory]:
        found = [RandomHistory(seed, overlap=overlap) for seed in range(6)]
        for seed, history in enumerate(found):
            outputs = {name: expected(one) for name, one in history.requests.items()}
            history.engine.scheduler.speculator = Oracle(outputs, seed)
            history.run()
        return found

    return run_all


@pytest.mark.parametrize("overlap", [False, True])
def test_histories(histories: Callable[[bool], list[RandomHistory]], *, overlap: bool) -> None:
    stats = [history.engine.stats() for history in histories(overlap)]
    drafted, accepted = (sum(getattr(one, f"{name}_tokens") for one in stats) for name in ("drafted", "accepted"))
    assert 300 < accepted < drafted - 100, (accepted, drafted)
    assert sum(one.num_preemptions for one in stats) > 50
    assert sum(one.prefix_hit_tokens for one in stats) > 500


def remembering_all(manager: KVCacheManager, sequence: Any, start: int, stop: int | None = None) -> Any:
    """As if every row of a step had come true."""
    return remember(manager, sequence, start, None if stop is None else len(sequence.block_table) * BLOCK)


def judging_at_once(verification: Verification) -> None:
    """As if no choice took the tokens that were chosen before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "needs_host", lambda *_, **__: False)
        begin(verification)


remember, begin = KVCacheManager.remember, Verification.begin


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        pytest.param(Verification, "end", lambda _: None, id="numbers of rows that nobody asked for are lost"),
        pytest.param(KVCacheManager, "remember", remembering_all, id="blocks of drafts are remembered"),
        pytest.param(Verification, "begin", judging_at_once, id="drafts are judged without their past"),
    ],
)
def test_histories_see_what_is_missing(
    owner: Any,
    name: str,
    broken: Any,
    monkeypatch: pytest.MonkeyPatch,
    histories: Callable[[bool], list[RandomHistory]],
) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        histories(True)


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Model:
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    config = {"max_position_embeddings": 64, "rope_parameters": parameters}
    return Model(tiny("llama", **config).to(getattr(torch, request.param)))


METHODS = ("rope", "dynamic_leaky", "dual_chunk", "xpos", "dynamic_ntk:logn")


def test_tokens_and_logprobs_to_the_bit(model: Model, decode_kernel: str) -> None:
    """Over lengths at which readings change; drafts as single rows, and in more rows than those may be as chunks."""
    if library() is None or DEVICE != "cpu" or torch.cpu._is_amx_tile_supported():
        pytest.skip(decode_kernel)
    engine = tiny_engine(model, max_model_len=512, cache_dtype=model.dtype, speculation="off")
    asked = []
    for number, method in enumerate(METHODS):
        positions = engine.resolve_positions(RopeSpec.parse(method))
        drawn = greedy(60, temperature=0.8, top_p=0.9, seed=3, logprobs=2, presence_penalty=0.5)
        for one in (greedy(60, logprobs=2), drawn):
            asked.append(request(str(len(asked)), prompt_of(30, number), one, positions))
    alone = run(engine, asked)
    for num_seqs in (1, 10):
        engine = tiny_engine(model, max_model_len=512, cache_dtype=model.dtype, max_num_seqs=num_seqs)
        engine.scheduler.speculator = Oracle({name: tokens_of(outputs) for name, outputs in alone.items()}, num_seqs)
        found = run(engine, asked)
        assert_idle(engine)
        assert 200 < engine.stats().accepted_tokens < engine.stats().drafted_tokens
        assert [one.logprobs for own in found.values() for one in own] == [
            one.logprobs for own in alone.values() for one in own
        ]


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=120)
    | st.lists(st.integers(0, 40000), max_size=40, min_size=1),
    prompt=st.integers(1, 120),
)
def test_history_is_at_the_place_with_most_in_common(tokens: list[int], prompt: int) -> None:
    history = History(tokens)
    history.read(min(prompt, len(tokens)))
    for end in range(history.num_known, len(tokens) + 1):
        place = history.place
        if place is not None:
            assert tokens[place - GRAM : place] == tokens[end - GRAM : end]
            assert place < end
            assert history.expected(3)[0] == tokens[place]
        else:
            ends = [tokens[at - GRAM : at] for at in range(GRAM, end)]
            assert end < GRAM or tokens[end - GRAM : end] not in ends
        if end < len(tokens):
            expected = None if place is None else tokens[place] == tokens[end]
            assert history.follow(tokens[end]) == expected


def test_a_long_history_is_found_again() -> None:
    """Read at once or token after token, across the sizes at which its tables grow."""
    past = [(n * n * 7919) % 5003 for n in range(5000)]
    tokens = past + past[1234:1300]
    for read in (1, 1023, 5000):
        history = History(tokens)
        history.read(read)
        for token in tokens[read:]:
            history.follow(token)
        assert history.place == 1300
        assert history.common >= MAX_COMMON
        assert history.expected(5) == past[1300:1305]


@pytest.mark.parametrize("prompt", [PIECE, PIECE + GRAM - 1, PIECE + GRAM, 20_000, 32_767])
def test_a_long_prompt_is_read_over_several_steps(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is expected until it is, or while there is no more room; then all is as if it had been read at once."""
    past = [(n * n * 7919) % 5003 for n in range(5000)]
    tokens = (7 * past)[: prompt + 40]
    drafter, at_once = Drafter(tokens, Acceptance()), History(tokens)
    with monkeypatch.context() as patch:
        patch.setattr(speculation, "PIECE", len(tokens))
        assert at_once.read(prompt)
        for token in tokens[prompt:]:
            at_once.follow(token)
    for known in (*range(prompt, len(tokens)), *[len(tokens)] * 5):
        drafter.follow(known)
        assert drafter.history.place is None or not drafter.history.reads
        if known == prompt:
            assert drafter.history.reads == (prompt >= GRAM + PIECE)
    assert (drafter.history.place, drafter.history.num_known) == (at_once.place, len(tokens))
    assert drafter.history.place is not None


def test_expected_tokens_go_round() -> None:
    history = History([1, 2, 3, 1, 2, 3])
    history.read(6)
    assert history.expected(7) == [1, 2, 3, 1, 2, 3, 1]


def test_steps_of_rows_that_cost_too_much_have_no_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same requests: where each row costs a step, where rows are free, and where one asks for none."""
    model, prompt = Model(tiny("llama")), prompt_of(5, 1) * 8
    drafted = []
    for power in (1, 0):
        costs = {n: float(n**power) for n in range(1, 300)}
        monkeypatch.setattr(StepTimes, "of", lambda _, n, k, costs=costs: np.array([costs[n + m] for m in range(k)]))
        engine = tiny_engine(model)
        generate(engine, [prompt], greedy(40))
        drafted.append(engine.stats().drafted_tokens)
        run(engine, [request("off", prompt, greedy(40), speculation=False)])
        assert engine.stats().drafted_tokens == drafted[-1]
    assert drafted[0] == 0 < drafted[1]


def test_drafts_lengthen_no_step_much_in_which_others_decode() -> None:
    """Ten rows cost a step here, and each draft comes true: alone as many are taken as there may be."""
    speculator = Speculator(max_num_seqs=64)
    for rows in range(1, 65):
        speculator.step_times.add(rows, 1.0 + rows / 10)
    for kind in range(KINDS):
        for _ in range(3000):
            speculator._acceptance.count(2**kind - 1, hit=True)
    repeating, other = sequence([5, 6, 7, 8, 9, 10, 11, 12] * 20, 99), sequence([1], 99)
    for decoding, most in (([repeating], MAX_DRAFTS), ([repeating, other], 12)):
        drafts = speculator.plan(decoding, num_others=0, most=64)
        assert [len(drafts[repeating]), other in drafts] == [most, False]


class Eager(Speculator):
    """Drafts as much as it may, all of it wrong."""

    def plan(self, decoding: Several[Sequence], *, num_others: int, most: int) -> dict[Sequence, list[int]]:
        del num_others
        return {one: [0] * count for one in decoding if (count := min(most, one.num_more_drafts, 31)) > 0}


def test_drafts_take_no_block_that_a_prompt_was_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that was admitted is read to its end beside a sequence whose drafts could use its blocks."""
    monkeypatch.setattr(scheduler_module, "DRAFT_SHARE", 1)
    config = {"num_blocks": 14, "max_batched_tokens": 64, "prefix_caching": False, "speculation": "off"}
    engine = tiny_engine(Model(tiny("llama")), **config)  # type: ignore[arg-type]
    engine.add(request("stream", prompt_of(16), greedy(60)))
    for _ in range(3):
        engine.step()
    engine.add(request("prompt", prompt_of(engine.stats().num_free_blocks * 16), greedy(1)))
    engine.step()
    engine.scheduler.speculator = Eager(max_num_seqs=64)
    ended: list[str] = []
    while "prompt" not in ended:
        ended += [name for name, output in engine.step() if output.finish_reason]
        engine.check_integrity()
    assert engine.stats().num_preemptions == 0
    while engine.has_work():
        engine.step()
    assert engine.stats().drafted_tokens > 0
    assert_idle(engine)


def test_drafts_take_no_block_that_a_waiting_prompt_fits_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor keep one: a table is as long as its tokens want once a step with drafts is over."""
    monkeypatch.setattr(scheduler_module, "DRAFT_SHARE", 1)
    config = {"num_blocks": 14, "max_batched_tokens": 64, "prefix_caching": False}
    engine = tiny_engine(Model(tiny("llama")), **config)  # type: ignore[arg-type]
    engine.scheduler.speculator = Eager(max_num_seqs=64)
    engine.add(request("stream", prompt_of(16), greedy(90)))
    (stream,) = engine.scheduler.sequences
    for _ in range(3):
        engine.step()
        assert len(stream.block_table) <= engine.scheduler.cache.blocks_for(len(stream.token_ids))
    engine.add(request("prompt", prompt_of(engine.stats().num_free_blocks * 16 - 16), greedy(1)))
    engine.step()
    assert engine.stats().num_waiting == 0
    while engine.has_work():
        engine.step()
        engine.check_integrity()
    assert engine.stats().drafted_tokens > 0
    assert_idle(engine)


class Seer(Eager):
    """The same, all of it right."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(max_num_seqs=64)
        self.tokens = tokens

    def plan(self, decoding: Several[Sequence], *, num_others: int, most: int) -> dict[Sequence, list[int]]:
        counts = super().plan(decoding, num_others=num_others, most=most)
        return {
            one: self.tokens[one.num_output_tokens :][: len(drafts)]
            for one, drafts in counts.items()
            if one.request_id == "bound" and len(self.tokens) > one.num_output_tokens
        }


class Clock:
    """Time that passes where a step waits for masks, and a millisecond a step besides."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, masks: Several[LateMask], timeout: float, *_: Any) -> SimpleNamespace:
        self.now = min(self.now + timeout, max(self.now, *(mask.due for mask in masks)))
        return SimpleNamespace(done={mask for mask in masks if mask.done()})


class LateMask:
    """There 4 ms after it is asked for; allows all tokens."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.due = clock, clock.now + 0.004

    def done(self) -> bool:
        return self.clock.now >= self.due


class LateMasks:
    """A grammar, and its matcher."""

    accepting = finished = False
    failure = ""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.next: LateMask | None = None

    def matcher(self) -> LateMasks:
        return LateMasks(self.clock)

    @property
    def begun(self) -> bool:
        return self.next is not None

    @property
    def ready(self) -> LateMask:
        self.next = self.next or LateMask(self.clock)
        return self.next

    def mask(self) -> bytes:
        assert self.ready.done()
        return b"\xff" * (-(-VOCABULARY // 8))

    def accept(self, _token_id: int) -> None:
        self.next = None


def test_drafts_with_late_masks_do_not_hold_up_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """31 drafts that all come true, each with a mask that takes 4 ms: 124 ms if the step waited for all of them."""
    model, clock = Model(tiny("llama")), Clock()
    monkeypatch.setattr(mask_module, "time", clock)
    monkeypatch.setattr(mask_module, "wait", clock.wait)
    grammar: Any = LateMasks(clock)
    bound = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, grammar=grammar)
    asked = [request("free", prompt_of(20), greedy(60)), request("bound", prompt_of(30), bound)]
    alone = {name: tokens_of(outputs) for name, outputs in run(tiny_engine(model, speculation="off"), asked).items()}
    engine = tiny_engine(model, max_batched_tokens=128)
    engine.scheduler.speculator = Seer(alone["bound"])
    for one in asked:
        engine.add(one)
    tokens: dict[str, list[int]] = {"free": [], "bound": []}
    while engine.has_work():
        began, streaming = clock.now, 0 < len(tokens["free"]) < 60
        for name, output in engine.step():
            tokens[name] += output.token_ids
        assert not streaming or clock.now - began <= 2 * mask_module.MASK_WAIT_S + 1e-9, "before the step and within it"
        clock.now += 0.001
    assert tokens == alone
    stats = engine.stats()
    assert 20 < stats.accepted_tokens < stats.drafted_tokens / 4
    assert_idle(engine)


def test_step_times() -> None:
    times = StepTimes()
    assert times.of(1, 2) is None
    for seconds in (1.0, 9.0, 1.0):
        times.add(1, seconds)  # the second was late by chance
    times.add(9, 5.0)
    assert times.of(1, 9).tolist() == [1 + n / 2 for n in range(9)]  # type: ignore[union-attr]
    times.add(5, 9.0)  # more than nine rows took: neither is known better
    assert times.of(5, 5).tolist() == [7.0] * 5  # type: ignore[union-attr]
    times.add(5, 3.0)
    beyond = times.of(9, 3)
    assert beyond is not None
    assert 5.0 == beyond[0] < beyond[1] < beyond[2] < 5.5
