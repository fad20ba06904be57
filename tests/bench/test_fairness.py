"""The bound on a short request's first token, counted in steps: our scheduler keeps it, FIFO prefill does not.

The scheduler and the block tables are the real ones; only the model is left out (`tests.engine.scripted`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prerope.cache.blocks.manager import KVCacheManager
from prerope.server.engine.scheduler import Scheduler
from prerope.server.engine.sequence import Sequence

from bench import BenchError
from bench.fairness.__main__ import steps_bound
from bench.fairness.load import Latencies
from bench.fairness.policy import FifoScheduler, most_steps, scheduling
from bench.fairness.report import Fairness, report
from tests.conftest import Servers
from tests.engine.scripted import sequence, unique


class Steps:
    """A scheduler, and what a model would do after each of its steps; `in_flight` long prompts never run out."""

    def __init__(self, policy: type[Scheduler], budget: int, *, streams: int, long: int, in_flight: int) -> None:
        cache = KVCacheManager(20_000, 16, prefix_caching=True)
        self.scheduler = policy(cache, max_num_seqs=64, max_batched_tokens=budget)
        self.long, self.in_flight = long, in_flight
        self.streams = [sequence(unique(5), max_tokens=100_000) for _ in range(streams)]
        for stream in self.streams:
            self.scheduler.add(stream)
        while any(not stream.num_output_tokens for stream in self.streams):
            self.step([])
        self._refill()

    def _refill(self) -> None:
        under_way = [one for one in self.scheduler.sequences if one.num_prompt_tokens == self.long]
        for _ in range(self.in_flight - len(under_way)):
            self.scheduler.add(sequence(unique(self.long), max_tokens=1))

    def step(self, arriving: list[Sequence]) -> None:
        """One step; what arrives comes while it runs, too late to be in it."""
        plan = self.scheduler.schedule()
        for one in arriving:
            self.scheduler.add(one)
        for one, count, *_ in plan:
            known = one.num_computed_tokens
            one.num_computed_tokens += count
            self.scheduler.cache.remember(one, known)
            if one.num_remaining_tokens == 0:
                one.append(7)
                if one.num_output_tokens >= one.sampling.max_tokens:
                    self.scheduler.remove(one.request_id)
        self._refill()

    def to_first_token(self, shorts: list[Sequence]) -> int:
        """Steps until all of them have a token, the one that ran when they came included."""
        self.step(shorts)
        steps = 1
        while not all(short.num_output_tokens for short in shorts):
            before = [stream.num_output_tokens for stream in self.streams]
            self.step([])
            steps += 1
            assert [stream.num_output_tokens for stream in self.streams] == [n + 1 for n in before], "a stream stalled"
        return steps


def test_the_bound_by_hand() -> None:
    """512 − 1 decode leave 511; ⌊511 ÷ 4⌋ = 127 go to the oldest, 384 to short prompts."""
    assert most_steps(512, 1, 64) == 2
    assert most_steps(512, 1, 384) == 2
    assert most_steps(512, 1, 385) == 3
    assert most_steps(8, 0, 60) == 11  # 6 of 8 a step
    with pytest.raises(ValueError, match="leaves nothing"):
        most_steps(4, 3, 1)


def test_a_short_request_of_64_tokens_waits_two_steps_and_under_fifo_for_every_long_prompt_before_it() -> None:
    counts = {}
    for policy in (Scheduler, FifoScheduler):
        steps = Steps(policy, 512, streams=1, long=6144, in_flight=2)
        for _ in range(3):
            steps.step([])
        counts[policy] = steps.to_first_token([sequence(unique(64))])
    assert counts[Scheduler] == most_steps(512, 1, 64) == 2
    # 2 × 6144 tokens less the three steps it came after, 511 a step; then its own
    assert counts[FifoScheduler] == 1 + -(-(2 * 6144 - 4 * 511 + 64) // 511)


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(16, 600),
    streams=st.integers(0, 8),
    in_flight=st.integers(1, 4),
    warm=st.integers(0, 12),
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=4),
)
def test_the_bound_holds_for_any_load_of_long_prompts(
    budget: int, streams: int, in_flight: int, warm: int, lengths: list[int]
) -> None:
    """Whatever has been read of the long prompts; short ones are shorter than what is left of any."""
    steps = Steps(Scheduler, budget, streams=streams, long=9000, in_flight=in_flight)
    for _ in range(warm):
        steps.step([])
    needed = steps.to_first_token([sequence(unique(n)) for n in lengths])
    # Those that are done decode beside the rest: they are streams, too, from then on.
    assert needed <= most_steps(budget, streams + len(lengths) - 1, sum(lengths))


def test_fifo_breaks_the_bound_by_the_length_of_what_is_before() -> None:
    waits = []
    for long in (1000, 2000, 4000):
        steps = Steps(FifoScheduler, 100, streams=1, long=long, in_flight=2)
        waits.append(steps.to_first_token([sequence(unique(20))]))
    assert all(wait > most_steps(100, 1, 20) for wait in waits)
    assert waits[2] > 1.9 * waits[1] > 3.6 * waits[0], "in proportion"


def test_the_rival_is_served_by_the_products_own_app(serve: Servers, tiny_checkpoint: Path) -> None:
    """Only the scheduler differs, and not what is generated."""
    body = {"prompt": list(range(1000, 1100)), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    replies = {}
    for policy in ("ours", "fifo"):
        with scheduling(policy):
            url = serve(model_id=str(tiny_checkpoint), max_batched_tokens=64)
        scheduler = serve.running(url).service.engine.engine.scheduler
        assert type(scheduler) is (FifoScheduler if policy == "fifo" else Scheduler)
        replies[policy] = httpx.post(f"{url}/generate", json=body, timeout=60).raise_for_status().json()["token_ids"]
    assert replies["fifo"] == replies["ours"]
    with pytest.raises(ValueError, match="no policy 'lifo'"), scheduling("lifo"):
        pass


def options(**changes: float) -> argparse.Namespace:
    return argparse.Namespace(**{"budget": 512, "short_tokens": 64, "short_every": 4.0} | changes)


def test_the_bound_of_a_measurement_counts_the_short_requests_that_come_together() -> None:
    assert steps_bound(options(), 1.0) == 2
    assert steps_bound(options(short_tokens=300), 1.0) == 3
    with pytest.raises(BenchError, match="raise --short-every"):
        steps_bound(options(short_every=0.01), 3.0)


def found(ours: list[float], fifo: list[float], *, waiting: float = 0.0) -> Fairness:
    """A step of 1 s: the bounds are 2 s and 1 s."""
    about = {"date": "today", "cpu": "a", "cores": 2, "in_flight": 2, "long_tokens": 6144, "short_tokens": 64}
    about |= {"short_every": 4, "seconds": 100}
    gaps = [(0.0, 0.5), (1.0, 0.9)]
    latencies = {
        "ours": Latencies([(float(at), ttft) for at, ttft in enumerate(ours)], [(9.0, waiting)], gaps, 3),
        "fifo": Latencies([(float(at), ttft) for at, ttft in enumerate(fifo)], [(9.0, 40.0)], gaps, 3),
    }
    return Fairness(about, latencies, budget=512, chunk_s=1.0, steps=2)


def test_a_report_says_whether_the_bounds_held(tmp_path: Path) -> None:
    good = found([1.0, 1.5, 1.9], [20.0, 30.0])
    assert good.held
    assert good.keeps("fifo") == (False, True)
    made = report(good)
    assert [path.stat().st_size > 0 for path in made.save(tmp_path)] == [True] * 3
    text = (tmp_path / "fairness.md").read_text()
    assert "Both bounds held" in text
    assert "25.00" not in text, "the request that FIFO left without an answer counts as what it waited"


def test_a_slow_answer_and_one_that_never_came_break_the_bound() -> None:
    assert not found([1.0, 2.5], [20.0]).held
    assert not found([1.0, 1.0], [20.0], waiting=7.0).held
    assert found([1.0, 1.0], [20.0], waiting=1.5).held, "it had just come"
    assert not found([], [20.0]).held, "nothing was measured"
