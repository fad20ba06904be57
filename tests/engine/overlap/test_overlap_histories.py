"""Overlapped steps under any history: every output is its request's own chain of tokens, and nothing is left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from prerope.cache.blocks.states import StateCache
from prerope.server.engine.outputs import FinishReason, TokenOutput
from prerope.server.engine.scheduler import Scheduler
from prerope.server.engine.sequence import EngineRequest, Sequence
from prerope.server.engine.step import Scheduled
from prerope.server.models.model import Chunk

from tests.engine.scripted_model import (
    VOCABULARY,
    Alternating,
    RecurrentModel,
    expected,
    random_prompt,
    scripted_engine,
)
from tests.engine.tiny_models import assert_idle, greedy, request, tokens_of
from tests.tiers import every


class History:
    """Requests of all kinds added, aborted and preempted at random, over a cache that is too small for them."""

    def __init__(self, seed: int, *, overlap: bool = True, recurrent: bool = False) -> None:
        self.random = random.Random(seed)
        budget, num_states = self.random.randint(5, 20), self.random.randint(2, 14)
        self.engine = scripted_engine(
            24,
            RecurrentModel(24) if recurrent else None,
            num_states,
            overlap=overlap,
            max_num_seqs=5,
            max_batched_tokens=budget,
        )
        self.requests = {str(number): self._request(str(number)) for number in range(40)}
        self.outputs: dict[str, list[TokenOutput]] = {name: [] for name in self.requests}
        self.aborted: set[str] = set()
        self.expired: set[str] = set()
        self.num_stayed = 0

    def _request(self, name: str) -> EngineRequest:
        draw = self.random
        ids = random_prompt(24, seed=draw.randrange(2))[: draw.choice([0, 4, 13, 24])] + random_prompt(
            draw.randint(1, 12), int(name)
        )
        sampling: dict[str, Any] = draw.choice(
            [
                {},
                {},
                {"stop_token_ids": frozenset(draw.sample(range(VOCABULARY), 3))},
                {"seed": int(name), "temperature": 1.0, "ignore_eos": False},
                {"seed": int(name), "temperature": 0.7, "top_p": 0.8, "ignore_eos": False},
                {"min_tokens": 3, "ignore_eos": False},
                {"repetition_penalty": 1.5},
                {"logprobs": 1},
                {"grammar": Alternating(), "temperature": 1.0, "seed": int(name)},
            ]
        )
        return request(name, ids, greedy(draw.choice([1, 2, 5, 14]), **sampling), priority=draw.randint(-1, 1))

    def run(self) -> None:
        waiting = list(self.requests.values())
        while waiting or self.engine.has_work():
            for _ in range(self.random.randint(0, 3)):
                if waiting:
                    self.engine.add(waiting.pop())
            self._disturb()
            for name, output in self.engine.step():
                self.outputs[name].append(output)
            self.num_stayed += self.engine._in_flight is not None
            self.engine.check_integrity()
        self._check()

    def _disturb(self) -> None:
        scheduler = self.engine.scheduler
        if self.random.random() < 0.04 and scheduler.sequences:
            late = self.random.choice(list(scheduler.sequences))
            late.deadline = 0.0
            self.expired.add(late.request_id)
        if self.random.random() < 0.08 and scheduler.sequences:
            name = self.random.choice([one.request_id for one in scheduler.sequences])
            assert self.engine.abort(name) is not None
            self.aborted.add(name)
        if self.random.random() < 0.15 and scheduler.running:
            scheduler.preempt(self.random.choice(list(scheduler.running.values())))

    def _check(self) -> None:
        assert_idle(self.engine)
        for name, one in self.requests.items():
            whole, outputs = expected(one), self.outputs[name]
            if name in self.expired - self.aborted:
                end = outputs.pop()
                assert (end.token_ids, end.finish_reason) == ((), FinishReason.ABORT)
                assert (end.failure is None) == bool(outputs), "it fails where it has no token to show"
            assert all(len(output.token_ids) == 1 for output in outputs)
            if name in self.aborted | self.expired:
                assert tokens_of(outputs) == whole[: len(outputs)]
                assert all(output.finish_reason is None for output in outputs)
            else:
                assert tokens_of(outputs) == whole
                assert [output.finish_reason is None for output in outputs] == [True] * (len(outputs) - 1) + [False]


def run_histories(*, overlap: bool, recurrent: bool = False, number: int = 15) -> list[History]:
    histories = [History(seed, overlap=overlap, recurrent=recurrent) for seed in range(number)]
    for history in histories:
        history.run()
    return histories


def test_histories() -> None:
    histories = run_histories(overlap=True)
    stats = [history.engine.stats() for history in histories]
    assert sum(one.num_preemptions for one in stats) > 100
    assert sum(one.prefix_hit_tokens for one in stats) > 1000
    assert sum(history.num_stayed for history in histories) > 100
    assert not any(history.num_stayed for history in run_histories(overlap=False, number=5))


@pytest.mark.parametrize("overlap", every(2, [True, False]))
def test_histories_of_a_recurrent_model(overlap: bool) -> None:
    """Whose outputs are right only if each step began with the state of all tokens before it."""
    stats = [history.engine.stats() for history in run_histories(overlap=overlap, recurrent=True)]
    assert sum(one.num_preemptions for one in stats) > 50
    assert sum(one.prefix_hit_tokens for one in stats) > 500


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        pytest.param("usable", lambda _cache, hashes: len(hashes), id="known blocks are reused without a state"),
        pytest.param("_edges", lambda _cache, _state, start, stop: {stop} - {start}, id="states are kept off the edge"),
        pytest.param("rows_given", lambda _cache, _states: None, id="a sequence never reads its own state"),
    ],
)
def test_histories_see_a_wrong_state(name: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateCache, name, broken)
    with pytest.raises((AssertionError, ValueError, IndexError, KeyError)):
        run_histories(overlap=True, recurrent=True)


def as_decoded(one: Scheduled, block_size: int, first: int, chunk: Callable[..., Chunk] = Scheduled.chunk) -> Chunk:
    return replace(chunk(one, block_size, first), pending_place=None)


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        pytest.param(Scheduled, "chunk", as_decoded, id="the ids of pending tokens are not looked up"),
        pytest.param(Scheduled, "cached", True, id="blocks are remembered for sequences that lost them"),
        pytest.param(Scheduler, "holds", lambda *_: True, id="what has ended or gone goes on"),
        pytest.param(Sequence, "chosen_on_host", False, id="nobody waits for the history that a draw takes"),
        pytest.param(Sequence, "num_generated_tokens", Sequence.num_output_tokens, id="pending tokens count as known"),
    ],
)
def test_histories_see_what_is_missing(owner: type, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises((AssertionError, ValueError, IndexError, KeyError)):
        run_histories(overlap=True)
