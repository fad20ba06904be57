"""The bound on a short request's first token, counted in steps: our scheduler keeps it, FIFO prefill does not.

The scheduler and the block tables are the real ones; only the model is left out (`tests.engine.scripted`).
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prerope.cache.blocks.manager import KVCacheManager
from prerope.server.engine.pace import OLDEST_SHARE
from prerope.server.engine.scheduler import Scheduler
from prerope.server.engine.sequence import Sequence
from prerope.server.engine.step import Scheduled

from tests.engine.scripted import sequence, unique


class FifoScheduler(Scheduler):
    """What a chunked-prefill scheduler does that orders prompts by arrival alone: the oldest gets the whole budget, and
    the next what is left once it is done. Decodes first, as in the product."""

    def _schedule_prefills(self, prompts: list[Sequence], _num_keys: int, plan: list[Scheduled]) -> None:
        budget = self.max_batched_tokens - sum(one.num_rows for one in plan)
        for one in sorted(prompts, key=lambda s: s.rank):
            num_tokens = min(one.num_remaining_tokens, budget)
            known = one.num_computed_tokens
            if num_tokens > 0 and one.request_id in self.running and self._grow(one, known + num_tokens, plan):
                plan.append(Scheduled.of(one, num_tokens, known))
                budget -= num_tokens


def most_steps(budget: int, num_decodes: int, num_short_tokens: int) -> int:
    """Steps from a short request's arrival to its first token, at most, the step that runs when it comes included.

    budget: tokens of a step, B. num_decodes: running streams, D. num_short_tokens: of all prompts that are not longer
    than what is left of it, its own included, n: those are served before it. Each step leaves B − D − ⌊(B − D) ÷ 4⌋
    tokens to them. This supposes that the request is admitted at once: the cache has room, and no more than
    MAX_NUM_SEQS run.
    """
    left = budget - num_decodes
    share = left - max(1, left // OLDEST_SHARE)
    if share < 1:
        raise ValueError(f"a budget of {budget} tokens leaves nothing to prefill beside {num_decodes} decodes")
    return 1 + -(-num_short_tokens // share)


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
