"""The scheduler and the cache's block tables alone, by script; see `scripted`. Random histories are in tests/fuzz."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from prerope.cache.blocks.manager import KVCacheManager
from prerope.server.engine.pace import FEW, FIRST, FIRST_SCORED, GROUP, WHOLE, Pace, share
from prerope.server.engine.scheduler import RowTimes, Scheduler
from prerope.server.engine.sequence import MAX_PRIORITY, PRIORITY_STEP_S, UNKNOWN, Sequence
from prerope.server.engine.step import Rows, Scheduled

from tests.engine.scripted import BLOCK, Script, sequence, unique


def counts(plan: list[Scheduled]) -> dict[str, int]:
    return {one.request_id: count for one, count, *_ in plan}


# --- one budget for prefill and decode --------------------------------------------------------------------------------


def test_a_short_prompt_is_not_stuck_behind_a_long_one() -> None:
    """A 16k prompt prefills at budget 512: a stream gets a token every step, a newcomer its first within three."""
    script = Script(2000)
    stream, long = sequence(unique(50), max_tokens=1000), sequence(unique(16_000))
    script.add(stream)
    script.step()
    script.add(long)
    for _ in range(5):
        script.step()
    short = sequence(unique(100))
    script.add(short)
    for _ in range(3):
        before = stream.num_output_tokens, long.num_computed_tokens
        script.step()
        assert stream.num_output_tokens == before[0] + 1
        assert long.num_computed_tokens > before[1]
        if short.num_output_tokens:
            break
    assert short.num_output_tokens >= 1
    assert not long.decoding, "the long prompt is still being prefilled"
    script.finish()


def test_three_short_prompts_at_once_are_also_served_within_three_steps() -> None:
    script = Script(2000)
    long = sequence(unique(16_000))
    script.add(long)
    script.step()
    shorts = [sequence(unique(200)) for _ in range(3)]
    script.add(*shorts)
    for _ in range(3):
        script.step()
    assert all(short.num_output_tokens for short in shorts)


def test_the_oldest_prefill_is_not_starved_by_a_stream_of_short_ones() -> None:
    script = Script(4000)
    long = sequence(unique(4000))
    script.add(long)
    script.step()
    steps = 0
    while not long.num_output_tokens:
        script.add(*(sequence(unique(300), max_tokens=1) for _ in range(2)))  # more than the budget, each step
        before = long.num_computed_tokens
        script.step()
        steps += 1
        assert long.num_computed_tokens - before >= 100 or long.num_output_tokens
    assert steps <= 4000 // 100
    script.finish()


def test_the_whole_budget_is_used_while_there_is_work() -> None:
    script = Script(1000, budget=64)
    script.add(sequence(unique(500)), sequence(unique(10)), sequence(unique(300)))
    plans = [sum(counts(script.step()).values()) for _ in range(12)]
    assert plans == [64] * 12


def test_share_gives_everyone_at_most_what_it_needs() -> None:
    prefills = [sequence(unique(n)) for n in (1000, 30, 5, 400)]
    granted = {one.num_prompt_tokens: tokens for one, tokens in share(prefills, 200)}
    assert granted == {1000: 50, 30: 30, 5: 5, 400: 115}
    assert sum(tokens for _, tokens in share(prefills, 1)) == 1
    assert share([], 100) == []
    urgent = sequence(unique(400), priority=-1)
    assert dict(share([urgent, *prefills], 200)) == {urgent: 200}


def test_decodes_come_first_and_take_one_token_each() -> None:
    script = Script(1000, budget=8, max_num_seqs=8)
    streams = [sequence(unique(1), max_tokens=50) for _ in range(6)]
    script.add(*streams)
    script.step()
    script.add(sequence(unique(100)))
    plan = script.step()
    assert [count for _, count, *_ in plan] == [1] * 6 + [2]
    assert [one for one, *_ in plan[:6]] == streams


# --- admission, priority, preemption ----------------------------------------------------------------------------------


def test_a_prompt_is_admitted_when_it_fits_beside_what_others_still_need() -> None:
    script = Script(10)
    first, second = sequence(unique(100)), sequence(unique(80))
    script.add(first, second)
    plan = script.step()
    assert list(counts(plan)) == [first.request_id], "7 blocks and 5: together more than 10"
    script.finish()
    assert script.scheduler.num_preemptions == 0


def test_no_one_overtakes_a_prompt_that_waits_for_room() -> None:
    script = Script(10)
    running, large, small = (sequence(unique(n), max_tokens=20) for n in (100, 120, 10))
    script.add(running)
    script.step()
    script.add(large, small)
    while not large.num_computed_tokens:
        assert small.num_computed_tokens == 0
        script.step()
    script.finish()


def test_at_most_max_num_seqs_run() -> None:
    script = Script(100, max_num_seqs=3)
    script.add(*(sequence(unique(5), max_tokens=3) for _ in range(10)))
    script.step()
    assert (len(script.scheduler.running), len(script.scheduler.waiting)) == (3, 7)
    script.finish()


def test_lower_priority_numbers_run_first_and_are_preempted_last() -> None:
    script = Script(8, max_num_seqs=2)
    late, urgent, normal = (sequence(unique(30), max_tokens=60, priority=p) for p in (5, -1, 0))
    script.add(late, urgent, normal)
    script.step()
    assert set(script.scheduler.running) == {urgent.request_id, normal.request_id}
    while not script.scheduler.num_preemptions:
        script.step()
    assert urgent.request_id in script.scheduler.running
    assert normal.request_id in script.scheduler.waiting
    script.finish()


def test_who_has_waited_long_passes_the_most_urgent_newcomer() -> None:
    """Whatever number it gives: a priority is a head start of seconds, and has an end."""
    script = Script(100, max_num_seqs=1)
    old, new = sequence(unique(5), priority=2**31 - 1), sequence(unique(5), priority=-(2**31) + 1)
    most = 2 * MAX_PRIORITY * PRIORITY_STEP_S
    for waited, first in ((most - 1, new), (most + 1, old)):
        old.arrived_at = new.arrived_at - waited
        script.add(old, new)
        script.scheduler.schedule()
        assert list(script.scheduler.running) == [first.request_id]
        script.scheduler.remove(old.request_id)
        script.scheduler.remove(new.request_id)


def test_the_latest_is_preempted_and_finds_its_blocks_again() -> None:
    """The victim's cached blocks are reused only as far as the other grew; the rest is not computed twice."""
    script = Script(12)
    first, second = sequence(unique(80), max_tokens=40), sequence(unique(80), max_tokens=40)
    script.add(first, second)
    while not script.scheduler.num_preemptions:
        script.step()
    assert second.request_id in script.scheduler.waiting
    assert (second.block_table, second.num_computed_tokens) == ([], 0)
    output = second.token_ids[80:]
    while second.request_id in script.scheduler.waiting:
        script.step()
    assert script.cache.hit_tokens > 0
    script.finish()
    assert second.token_ids[80 : 80 + len(output)] == output
    assert len(second.token_ids) == 120


def test_a_victim_that_was_scheduled_already_leaves_the_plan() -> None:
    """Urgent prefill, less urgent decodes that the plan holds before it: `Script` checks each plan."""
    script = Script(10, budget=512)
    streams = [sequence(unique(30), max_tokens=100, priority=1) for _ in range(2)]
    script.add(*streams)
    for _ in range(20):
        script.step()
    script.add(sequence(unique(90), priority=0))
    script.finish()


def test_a_removed_sequence_leaves_nothing() -> None:
    script = Script(100)
    sequences = [sequence(unique(200)) for _ in range(5)]
    script.add(*sequences)
    script.step()
    for one in sequences:
        assert script.scheduler.remove(one.request_id) is one
        script.check_integrity()
    assert script.scheduler.remove("never heard of") is None
    assert script.cache.pool.num_free == 100


# --- tokens that a step in flight samples -----------------------------------------------------------------------------


def launched(script: Script, one: Sequence) -> list[Scheduled]:
    """A step whose token is not known when the next one is scheduled."""
    plan = script.scheduler.schedule()
    for scheduled in plan:
        scheduled.sequence.num_computed_tokens += scheduled.num_new_tokens
    one.expect(0)
    return plan


def test_a_pending_token_is_scheduled_unless_it_is_the_last() -> None:
    script, one = Script(10), sequence(unique(20), max_tokens=2)
    script.add(one)
    assert counts(launched(script, one)) == {one.request_id: 20}
    assert counts(launched(script, one)) == {one.request_id: 1}
    assert script.scheduler.schedule() == []
    one.append(5)
    assert (one.num_generated_tokens, one.num_pending, one.token_ids[20:]) == (1, 1, [5, UNKNOWN])
    one.append(6)
    assert one.token_ids[20:] == [5, 6]


def test_a_preempted_sequence_waits_for_its_pending_token() -> None:
    script, one, other = Script(10), sequence(unique(20)), sequence(unique(20))
    script.add(one)
    launched(script, one)
    script.scheduler.preempt(one)
    script.add(other)
    assert script.scheduler.schedule() == [], "nobody overtakes it"
    one.append(5)
    assert counts(script.scheduler.schedule()) == {one.request_id: 21, other.request_id: 20}
    script.check_integrity()


def test_who_is_at_its_end_makes_room_first() -> None:
    """The most urgent of all, but its last token is under way: its blocks are read no more."""
    script = Script(4)
    ending, growing = sequence(unique(32), max_tokens=1, priority=-1), sequence(unique(32), max_tokens=20)
    script.add(ending, growing)
    launched(script, ending)
    growing.append(5)
    assert counts(script.scheduler.schedule()) == {growing.request_id: 1}
    assert list(script.scheduler.waiting) == [ending.request_id]
    script.check_integrity()


# --- a crowd, and the time that rows take -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [8, 9, 15])
def test_a_crowd_in_a_tiny_cache_ends(num_blocks: int) -> None:
    script = Script(num_blocks, budget=16, max_num_seqs=16, block_size=4)
    script.add(*(sequence([1] * 8 + unique(5), max_tokens=12, block_size=4) for _ in range(30)))
    script.finish(max_steps=5000)
    assert script.scheduler.num_preemptions > 0


TIMES = {
    256: {1: 15, 4: 16, 8: 17, 16: 26, 32: 45, 64: 109, 128: 146, 512: 560},
    4096: {1: 20, 4: 21, 8: 28, 16: 45, 32: 88, 64: 198, 128: 302, 512: 1180},
    20_000: {1: 47, 4: 54, 8: 69, 16: 139, 32: 366, 64: 675, 128: 1078, 512: 4250},
}
"""Keys → rows → ms of a step, measured on a processor where what is dear is no straight line (bench/RESULTS.md)."""
ORDINARY_S = 0.015


def seconds_of(rows: int, keys: int) -> float:
    """Of a step with a stream's row and so many of a prompt."""
    behind = [np.interp(rows + 1, list(times), list(times.values())) for times in TIMES.values()]
    return float(np.interp(keys, list(TIMES), behind)) / 1e3


def beside_stream(
    pace: Pace, num_tokens: int, seconds: Callable[[int, int], float] = seconds_of, beside: int = 0
) -> list[tuple[int, float]]:
    """(rows, seconds) of each step of a prompt that is read beside streams, whose rows `beside` tells, or not."""
    steps, keys = list[tuple[int, float]](), 0
    while keys < num_tokens:
        rows = min(pace.most_rows(511, keys, beside), num_tokens - keys)
        steps.append((rows, seconds(rows, keys)))
        pace.times.add(Rows(rows + (beside or 1), rows, 0, keys), steps[-1][1])
        keys += rows
    return steps


def known_stream(gap_s: float | None = 0.5, ordinary_s: float = ORDINARY_S) -> Pace:
    pace = Pace(gap_s, RowTimes())
    pace.times.add(Rows(1), ordinary_s)
    return pace


@pytest.mark.parametrize(
    ("num_tokens", "loss", "longest_s"), [(500, 0.1, 0.3), (2000, 0.1, 0.3), (8000, 0.1, 0.49), (20_000, 0.16, 0.49)]
)
def test_a_prompt_beside_a_stream_loses_a_tenth_and_its_steps_are_short(
    num_tokens: int, loss: float, longest_s: float
) -> None:
    """Against whole chunks with nobody beside them, of half a second to four. (Steps as long as the gap were 0.54 to
    1.02 s long, for some 0.05 of the rate.)"""
    steps = beside_stream(known_stream(), num_tokens)
    alone_s = sum(seconds_of(min(512, num_tokens - keys), keys) for keys in range(0, num_tokens, 512))
    assert 1 - alone_s / sum(seconds for _, seconds in steps) < loss
    assert max(seconds for _, seconds in steps) <= longest_s
    assert steps[0][0] == FIRST, "nothing is known at first"
    again = beside_stream(known_stream(), num_tokens)
    assert again == steps


def test_far_keys_are_read_a_few_rows_at_a_time_where_that_is_as_fast() -> None:
    steps = beside_stream(known_stream(), 2000, lambda rows, _: seconds_of(rows, 20_000))
    assert {rows for rows, _ in steps[10:-1]} <= {*FEW}
    assert max(seconds for _, seconds in steps[10:]) <= 10 * ORDINARY_S
    assert sum(seconds for _, seconds in steps) < 2000 * 1.078 / 128 * 1.2


def test_few_rows_are_taken_where_a_whole_chunk_is_late() -> None:
    """One core of a slow processor: 128 rows are half a second, and 32 are a third of it at nine tenths of the rate."""
    times = {1: 31, 4: 47, 8: 60, 12: 73, 16: 116, 32: 172, 64: 311, 128: 485, 512: 2317}
    steps = beside_stream(
        known_stream(0.5, 0.031), 4000, lambda rows, _: float(np.interp(rows, [*times], [*times.values()])) / 1e3
    )
    taken = [rows for rows, _ in steps[20:-1]]
    assert taken.count(32) > 0.95 * len(taken)
    assert max(taken) <= FEW[-1], "larger ones are not even tried"


TWO_CORES = {
    0: {1: 13, 5: 28, 9: 33, 13: 44, 17: 51, 33: 89, 65: 151, 129: 276, 513: 990},
    2048: {1: 15, 5: 37, 9: 47, 13: 65, 17: 77, 33: 136, 65: 235, 129: 443, 513: 1583},
    8192: {1: 21, 5: 68, 9: 90, 13: 123, 17: 154, 33: 267, 65: 495, 129: 943, 513: 3459},
}
"""As `TIMES`, of two cores bound by arithmetic, the stream's row counted: their products and attention apart."""


def test_a_long_prompt_keeps_three_quarters_of_its_rate_where_whole_chunks_are_late() -> None:
    """With 16 rows at most, where no 128 fit, it was two thirds."""

    def seconds(rows: int, keys: int) -> float:
        behind = [np.interp(rows + 1, list(times), list(times.values())) for times in TWO_CORES.values()]
        return float(np.interp(keys, list(TWO_CORES), behind)) / 1e3

    steps = beside_stream(known_stream(0.5, 0.013), 8000, seconds)
    alone_s = sum(seconds(min(512, 8000 - keys) - 1, keys) for keys in range(0, 8000, 512))
    assert alone_s / sum(took for _, took in steps) > 0.75
    assert max(took for _, took in steps) <= 0.5


ONE_CORE = {
    0: {1: 31, 2: 36, 5: 47, 9: 60, 13: 73, 17: 116, 33: 172, 65: 311, 129: 485, 513: 2317},
    2048: {1: 31, 2: 43, 5: 74, 9: 96, 13: 132, 17: 156, 33: 268, 65: 494, 129: 792, 513: 3428},
    8192: {1: 31, 2: 68, 5: 161, 9: 212, 13: 281, 17: 355, 33: 531, 65: 992, 129: 1978, 513: 6700},
}
"""As `TIMES`, of one core of a slow processor, the stream's row counted (bench/RESULTS.md, "Rate against gap")."""


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_gap_of_three_ordinary_steps_is_kept_and_costs_rate(noise: float) -> None:
    """Where not even four rows go into it: two are taken, or one. It is passed where a larger step is tried."""

    def seconds(rows: int, keys: int) -> float:
        behind = [np.interp(rows + 1, list(times), list(times.values())) for times in ONE_CORE.values()]
        return float(np.interp(keys, list(ONE_CORE), behind)) / 1e3 * (1 + noise * draw.random())

    draw = np.random.default_rng(0)
    steps = beside_stream(known_stream(0.093, 0.031), 8000, seconds)
    gaps = sorted(took for _, took in steps)
    assert gaps[int(0.98 * len(gaps))] <= 0.093 * (1 + noise)
    assert gaps[-1] <= 1.3 * 0.093
    assert {1, 2, 4, 8} <= {rows for rows, _ in steps}
    usual = beside_stream(known_stream(0.5, 0.031), 8000, seconds)
    assert sum(took for _, took in usual) < sum(gaps) < 3 * sum(took for _, took in usual)


def test_short_steps_are_as_large_as_they_may_be() -> None:
    """As on a GPU: nobody sees 30 ms."""
    steps = beside_stream(known_stream(), 50_000, lambda rows, _: 0.01 + 0.00004 * rows)
    assert {rows for rows, _ in steps[10:-1]} == {511}
    assert Pace(None, RowTimes()).most_rows(511) == known_stream(None).most_rows(511) == 511


@pytest.mark.parametrize("gap_s", [0.5, 1.0])
def test_the_scheduler_keeps_the_gap_from_the_first_step_on(gap_s: float) -> None:
    """Rows that cost ever more, as a prompt's do; without a stream chunks are whole."""
    for alone in (False, True):
        sizes, seconds = list[int](), list[float]()
        scheduler = beside_streams(gap_s)
        if not alone:
            scheduler.add(sequence(unique(3), 500))
            drive(scheduler)
        scheduler.add(sequence(unique(12_000)))
        while any(not one.decoding for one in scheduler.sequences):
            plan = drive(scheduler)
            rows = sum(one.num_new_tokens for one in plan if one.num_new_tokens > 1)
            keys = max(one.start for one in plan if one.num_new_tokens > 1)
            seconds.append(0.02 + rows * (0.0005 + 0.001 * keys / 12_000))
            scheduler.row_times.add(Rows(rows + len(plan) - 1, rows, 0, keys), seconds[-1])
            sizes.append(rows)
        if alone:
            assert set(sizes[:-1]) <= {511, 512}
            continue
        assert max(seconds) <= gap_s
        assert sizes[0] == FIRST - 1, "with the stream's own row they fill groups"
        behind = itertools.accumulate([0, *sizes[:-1]])
        least_s = sum(rows * (0.0005 + 0.001 * keys / 12_000) for rows, keys in zip(sizes, behind, strict=True))
        assert sum(seconds) < 1.25 * least_s


def test_a_gap_that_cannot_be_met_starves_nobody() -> None:
    pace = known_stream()
    pace.times.add(Rows(512, 512), 60.0)
    assert 1 <= pace.most_rows(500) < FIRST
    assert [pace.most_rows(budget) for budget in (0, 1)] == [0, 1]
    pace.times.add(Rows(512, 512), 6000.0)
    assert pace.most_rows(500) == 1
    for _ in range(8):
        pace.times.add(Rows(512, 512), 0.5)
    assert pace.most_rows(500) >= WHOLE, "one that was late is forgotten"


@pytest.mark.parametrize("first", [8, 12, 20, 512])
def test_what_others_take_is_not_taken_for_the_rows(first: int) -> None:
    """A step costs 30 ms for its weights and others, and 1 ms a row."""
    pace = known_stream(0.5, 0.03)
    pace.times.add(Rows(first + 1, first), 0.03 + 0.001 * first)
    rows = pace.most_rows(500)
    assert 0.03 + 0.001 * rows <= 0.5
    assert rows / (0.03 + 0.001 * rows) >= 0.88 * 470 / 0.5


@pytest.mark.parametrize("beside", [1, 2, 3, 4, 5, 9])
def test_with_those_of_streams_rows_fill_groups(beside: int) -> None:
    """Rows that fill none took as long as a group: beside one stream eight rows 56 ms, where seven were 39."""

    def seconds(rows: int, _: int) -> float:
        return 0.007 + 0.013 * -(-(rows + beside) // GROUP)

    grouped = beside_stream(known_stream(0.1, seconds(0, 0)), 4000, seconds, beside)
    assert {(rows + beside) % GROUP for rows, _ in grouped[20:-1]} == {0}
    assert max(took for _, took in grouped) <= 1.3 * 0.1, "once, where a larger step is tried"
    others = beside_stream(known_stream(0.1, seconds(0, 0)), 4000, seconds, 0)
    gained = sum(took for _, took in others) / sum(took for _, took in grouped)
    assert gained > (1.05 if beside % GROUP in (1, 2) else 0.98)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 40])
def test_a_first_step_that_is_late_is_soon_forgotten(rows: int) -> None:
    """It had to wait for memory: two rows took 0.57 s, and prompts beside streams were read row by row for seconds."""
    pace = known_stream()
    pace.times.add(Rows(rows, rows), 0.57)
    steps = beside_stream(pace, 8000)
    usual = beside_stream(known_stream(), 8000)
    assert next(number for number, (taken, _) in enumerate(steps) if taken >= FIRST) <= 4
    assert sum(seconds for _, seconds in steps) < 1.1 * sum(seconds for _, seconds in usual)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 7, 20])
def test_a_step_that_is_late_by_chance_makes_later_ones_short_for_a_while(at: int) -> None:
    """One step of two seconds more, whichever it is: some steps later all is as if it had not been."""
    numbers = itertools.count()

    def late(rows: int, _: int) -> float:
        return seconds_of(rows, 256) + 2.0 * (next(numbers) == at)

    usual = beside_stream(known_stream(), 60_000, lambda rows, _: seconds_of(rows, 256))
    steps = beside_stream(known_stream(), 60_000, late)
    assert sum(seconds for _, seconds in steps) < 1.2 * sum(seconds for _, seconds in usual) + 2.0
    assert {rows for rows, _ in steps[-30:-1]} == {rows for rows, _ in usual[-30:-1]}


@pytest.mark.parametrize("late", [range(3, 4000, 40), range(10, 15)], ids=["each fortieth", "five at once"])
def test_whole_chunks_are_found_again_after_late_ones(late: range) -> None:
    """128 rows are four fifths of the gap, and few would read half as fast: one late step changes nothing, and after
    several in a row the prompts that follow try again."""
    numbers = itertools.count()

    def seconds(rows: int, _: int) -> float:
        return (0.02 + rows * (0.003 if rows >= WHOLE else 0.0045)) * (2 if next(numbers) in late else 1)

    pace, taken = known_stream(0.5, 0.02), list[list[int]]()
    pace.times.add(Rows(512, 512), 512 * 0.003)
    for _ in range(12):
        taken.append([rows for rows, _ in beside_stream(pace, 4000, seconds)[:-1]])
    assert min(taken[-1]) >= WHOLE
    assert len(late) == 5 or min(map(min, taken)) >= WHOLE


def test_short_prompts_without_end_do_not_make_rows_cheap() -> None:
    pace = known_stream(0.5, 0.01)
    pace.times.add(Rows(1028, 1024), 0.01 + 1024 * 0.0004)
    known = pace.most_rows(8192)
    for _ in range(2_000):
        pace.times.add(Rows(44, 40), 0.01 + 40 * 0.0006)
    assert pace.most_rows(8192) == known


def test_rows_behind_far_keys_are_no_more_because_others_are_scored() -> None:
    """A long prompt got what those that are scored behind few keys left: 38 rows of 50 ms each."""
    scheduler, far = beside_streams(gap_s=0.1), sequence(unique(4000))
    scheduler.add(sequence(unique(3), 500))
    drive(scheduler)
    for _ in range(20):
        scheduler.learn(Rows(17, 16, 16, 0), *2 * [ORDINARY_S + 16 * 0.0005])
    scheduler.add(far)
    for _ in range(20):
        plan = drive(scheduler)
        rows = sum(one.num_new_tokens for one in plan if one.sequence is far)
        scheduler.learn(Rows(rows + 1, rows, 0, far.num_computed_tokens), *2 * [ORDINARY_S + rows * 0.05])
    for _ in range(3):
        scheduler.add(sequence(unique(20), prompt_logprobs=1))
        plan = drive(scheduler)
        assert sum(one.num_new_tokens for one in plan if one.sequence is far) <= rows


def test_scored_rows_are_few_beside_a_stream() -> None:
    """As many as go into two ordinary steps: behind 20,000 keys 64 rows took two thirds of a second."""
    for row_s, most in ((0.05, 1), (0.007, 2), (0.0042, 3), (0.0021, 7), (0.00084, 7), (0.00001, 7)):
        scheduler = beside_streams()
        scheduler.row_times.add(Rows(3, 3), 0.57)  # whose rows were not scored, and late by chance
        assert scheduler.pace.most_scored(64) == FIRST_SCORED, "nothing is known at first"
        scheduler.add(sequence(unique(3), 500))
        drive(scheduler)
        scored = sequence(unique(300), prompt_logprobs=1)
        scheduler.add(scored)
        assert [one.num_new_tokens for one in drive(scheduler) if one.sequence is scored] == [FIRST_SCORED - 1]
        times = scheduler.row_times
        times.add(Rows(FIRST_SCORED, FIRST_SCORED - 1, FIRST_SCORED - 1), ORDINARY_S + (FIRST_SCORED - 1) * row_s)
        times.add(Rows(513, 512), 0.5)
        assert [one.num_new_tokens for one in drive(scheduler) if one.sequence is scored] == [most]
    assert Pace(None, RowTimes()).most_scored(64) == 64


def test_scored_rows_become_more_one_group_after_another_and_stay_within_two_steps_and_chance() -> None:
    """After three that were quick 19 were taken, which took seven ordinary steps."""
    pace, taken, took = known_stream(), list[int](), list[float]()
    draw = np.random.default_rng(0)
    for _ in range(400):
        rows = pace.most_scored(64, 100, 1)
        taken.append(rows)
        took.append(ORDINARY_S * (1 + 0.65 * (-(-(rows + 1) // GROUP) - 1) + 0.1) * (1 + 0.1 * draw.random()))
        pace.times.add(Rows(rows + 1, rows, rows, 100), took[-1])
    assert set(taken[2:]) == {7}
    assert max(after / before for before, after in itertools.pairwise(taken)) <= 7 / 3
    assert max(took) <= 2.2 * ORDINARY_S


def test_a_group_that_takes_hardly_longer_than_its_first_row_is_filled() -> None:
    """One row at a time was scored at 40 a second, where three took as long and had been late once."""
    pace, taken = known_stream(), list[int]()
    draw = np.random.default_rng(0)
    for _ in range(400):
        rows = pace.most_scored(64, 100, 1)
        taken.append(rows)
        late = 1 + 0.02 * draw.random() + 0.5 * (draw.random() < 0.03)
        pace.times.add(Rows(rows + 1, rows, rows, 100), ORDINARY_S * (1 + -(-(rows + 1) // GROUP)) * late)
    assert np.mean(taken) > 2.8


@pytest.mark.parametrize("fixed", [0.5, 0.9, 1.05, 1.2])
def test_where_scoring_costs_much_whatever_the_number_many_are_scored(fixed: float) -> None:
    """Just above two ordinary steps four rows were scored in the time of a hundred and sixty."""
    pace, taken = known_stream(), list[int]()
    for rows in (1, 2, 4, 8, 16, 32, 128):
        pace.times.add(Rows(rows + 1, rows, rows, 100), ORDINARY_S * (1 + fixed + rows * 0.001))
    for _ in range(50):
        taken.append(pace.most_scored(512, 100, 1))
        pace.times.add(Rows(taken[-1] + 1, taken[-1], taken[-1], 100), ORDINARY_S * (1 + fixed + taken[-1] * 0.001))
    assert min(taken) >= 28


@pytest.mark.parametrize("late", ["the last dozen", "all, by other processes"])
def test_ordinary_steps_that_were_late_make_scored_rows_no_more(late: str) -> None:
    """A worker had read the prompt's body: with 71 ms for an ordinary step of 19, steps of 32 scored rows took 14."""
    pace, took = Pace(0.5, RowTimes()), list[float]()
    for i in range(32):
        slower = 4 if i >= 20 or late.startswith("all") else 1
        pace.times.add(Rows(1), slower * ORDINARY_S, ORDINARY_S * (slower if late.startswith("the last") else 1))
    for _ in range(100):
        rows = pace.most_scored(64, 100, 1)
        took.append(ORDINARY_S * (1 + 0.65 * (-(-(rows + 1) // GROUP) - 1) + 0.1))
        pace.times.add(Rows(rows + 1, rows, rows, 100), took[-1], took[-1])
    assert max(took) <= 3 * ORDINARY_S


def beside_streams(gap_s: float = 0.5) -> Scheduler:
    """One that knows what an ordinary step takes."""
    cache = KVCacheManager(2000, BLOCK, prefix_caching=False)
    scheduler = Scheduler(cache, max_num_seqs=4, max_batched_tokens=512, stream_gap_s=gap_s)
    scheduler.row_times.add(Rows(1), ORDINARY_S)
    return scheduler


def drive(scheduler: Scheduler) -> list[Scheduled]:
    """A step, whose tokens are all 7."""
    plan = scheduler.schedule()
    for one in plan:
        one.sequence.num_computed_tokens = one.stop
        if one.samples:
            one.sequence.append(7)
    return plan
