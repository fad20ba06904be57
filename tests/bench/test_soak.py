"""A soak of a minute against a real server process, and the rules of a soak against servers that break them."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.progress import Progress

from bench import BenchError
from bench.shared.streams import StreamFailed
from bench.shared.text import Library
from bench.soak.__main__ import Soak, main
from bench.soak.client import Outcome, SoakClient, check
from bench.soak.hostile import GENERATE
from bench.soak.plan import DECK, Task, TaskMaker, bad_tasks, long_tasks
from bench.soak.verdicts import (
    Trend,
    judge_blocks,
    judge_log,
    judge_memory,
    judge_replies,
    judge_resources,
    judge_streams,
    students_t,
    trend,
)
from bench.soak.watch import Gauges, Resources, Sample, read_caches

MEBIBYTE = 2**20
LIBRARY = Library(lambda text: range(2 * len(text.split())), num_words=3000)


# --- the whole thing --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_minute_of_mixed_traffic_leaves_nothing_behind(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The real server as a process of its own, prompts of 8k and 16k tokens included; the model is tiny."""
    flags = ["--model-id", str(tiny_checkpoint), "--kv-cache-memory", "14MiB", "--long-pause", "2", "--clients", "4"]
    code = main(["--minutes", "1", "--cycles", "6", *flags, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "soak.json").read_text())
    failed = [verdict for verdict in report["verdicts"] if not verdict["held"]]
    assert (code, failed) == (0, [])
    kinds = {outcome["kind"] for outcome in report["outcomes"]}
    assert {"short", "shared", "slow", "abort", "bad", "crowd", "8k", "16k"} <= kinds
    statuses = {outcome["status"] for outcome in report["warm_up"] + report["outcomes"]}
    assert {200, 400, 401, 404, 405, 413, 429} <= statuses
    assert any(outcome["aborted"] for outcome in report["outcomes"])
    cached = [sample["gauges"]["cached_blocks"] / sample["gauges"]["blocks"] for sample in report["samples"]]
    assert {"conversations", "grammars", "angles"} <= report["samples"][-1]["caches"].keys()
    assert max(cached) > 0.95, "the warm-up wrote to the whole cache"
    assert "memory at rest is flat" in (tmp_path / "soak.md").read_text()
    assert (tmp_path / "soak.png").stat().st_size > 10_000
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tiny_checkpoint) in (p.info["cmdline"] or [])]
    assert not left, "the server was stopped"


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan(seed: int = 0, client: int = 0) -> Iterator[Task]:
    return TaskMaker(LIBRARY, bad_tasks(1000), seed, client).mixed()


def test_a_plan_has_every_kind_in_every_round_and_is_the_same_for_a_seed() -> None:
    size = sum(DECK.values())
    tasks, again, other = ([*itertools.islice(plan(client=client), 8 * size)] for client in (0, 0, 1))
    assert tasks == again != other
    for begin in range(0, len(tasks), size):
        assert Counter(task.kind for task in tasks[begin : begin + size]) == DECK
    assert {task.streams for task in tasks if task.kind == "short"} == {True, False}
    assert len({task.path for task in tasks if task.kind == "short"}) == 3
    sent = {(task.detail, task.key) for task in tasks if task.kind == "bad"}
    assert len(sent) == len(bad_tasks(1000))


def test_shared_prompts_share_their_beginning_among_clients_and_others_share_none() -> None:
    shared = [TaskMaker(LIBRARY, [], 0, client).task("shared").body for client in range(12)]
    beginnings = {tuple(body["prompt"][:600]) for body in shared if isinstance(body, dict)}
    assert 1 < len(beginnings) <= 4
    draw = random.Random(0)
    assert len({tuple(LIBRARY.ids(draw, 16)[:16]) for _ in range(200)}) == 200


def test_long_prompts_are_exact_and_the_longest_is_rare() -> None:
    tasks = [*itertools.islice(long_tasks(LIBRARY, [8192, 16384], seed=0), 9)]
    assert Counter(task.kind for task in tasks) == {"16k": 3, "8k": 6}
    for task in tasks:
        assert isinstance(task.body, dict)
        assert len(task.body["prompt"]) == (8192 if task.kind == "8k" else 16384)


# --- what a client checks ---------------------------------------------------------------------------------------------

STREAMED = Task("short", GENERATE, {"prompt": "Hello", "stream": True})
TOKEN = b'data: {"index": 0, "text": " a", "token_ids": [7]}\n\n'
USAGE = b'data: {"finish_reason": "length", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}\n\n'
DONE = b"data: [DONE]\n\n"


Reply = tuple[int, dict[str, str], list[tuple[float, bytes]]]


def reply(body: bytes, status: int = 200, **headers: str) -> Reply:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, [(3.0, body)]


def test_a_whole_stream_gives_its_times() -> None:
    stream = check(STREAMED, *reply(TOKEN + USAGE + DONE), 1.0)
    assert stream is not None
    assert stream.ttft == 2.0


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        (STREAMED, reply(TOKEN + USAGE), r"without \[DONE\]"),
        (STREAMED, reply(TOKEN + DONE), "without a usage"),
        (STREAMED, reply(USAGE + DONE), "no token"),
        (STREAMED, reply(TOKEN + b'event: error\ndata: {"error": {"message": "gone"}}\n\n' + DONE), "gone"),
        (STREAMED, reply(b'{"error": {"message": "no", "type": "x"}}', 500), "expected 200 or 429"),
        (STREAMED, reply(b'{"error": {"message": "no", "type": "x"}}', 429, retry_after="0"), "Retry-After"),
        (STREAMED, reply(b"<html>", 429, retry_after="2"), "Expecting value"),
        (Task("short", GENERATE, {}), reply(b'{"usage": {"completion_tokens": 0}}'), "no token"),
        (Task("bad", GENERATE, b"", frozenset({400})), reply(b"{}", 200), "expected 400"),
        (Task("bad", GENERATE, b"", frozenset({400})), reply(b'{"error": {"message": "", "type": "x"}}', 400), "says"),
    ],
)
def test_what_must_not_be_is_told(task: Task, given: Reply, message: str) -> None:
    with pytest.raises((StreamFailed, ValueError, KeyError), match=message):
        check(task, *given, 0.0)


def test_a_refusal_as_declared_is_fine() -> None:
    assert check(STREAMED, *reply(b'{"error": {"message": "full", "type": "x"}}', 429, retry_after="2"), 0.0) is None


# --- the rules --------------------------------------------------------------------------------------------------------

IDLE = Gauges(0, 0, 100, 100, 60, 0, 0, 0)
HELD = Resources(9, 20, 5)


def memory(
    growth: float, *, noise: float = 4.0, alike: float = 0.0, cycles: int = 12, minutes: int = 60, seed: int = 0
) -> list[Sample]:
    """The server at rest after each cycle: around 1600 MiB, growing by `growth` MiB a minute; neighbours `alike`."""
    drawn = np.random.default_rng(seed).standard_normal(cycles)
    for at in range(1, cycles):
        drawn[at] = alike * drawn[at - 1] + np.sqrt(1 - alike**2) * drawn[at]
    times = np.linspace(0, 60 * minutes, cycles)
    values = 1600 + growth * times / 60 + noise * drawn
    return [Sample(float(at), IDLE, int(value * MEBIBYTE), HELD) for at, value in zip(times, values, strict=True)]


def line_of(samples: list[Sample]) -> Trend:
    return trend([sample.at for sample in samples], [sample.rss / MEBIBYTE for sample in samples])


@pytest.mark.parametrize(("alike", "least"), [(0.0, 185), (0.3, 175), (0.6, 160)])
def test_a_trend_is_least_squares_and_its_interval_holds_the_truth(alike: float, least: int) -> None:
    """As often as it says, where neighbours have nothing in common: 95 of 100, and of twelve values nearly so where
    they have. (An interval that knows nothing of that held it in 140 of 200 at 0.6.)"""
    lines = [line_of(memory(0.1, alike=alike, seed=seed)) for seed in range(200)]
    assert least <= sum(line.low <= 0.1 / 60 <= line.high for line in lines) <= 199
    samples = memory(0.1, alike=alike)
    fitted = np.polyfit([sample.at for sample in samples], [sample.rss / MEBIBYTE for sample in samples], 1)
    assert line_of(samples).slope == pytest.approx(fitted[0])


def test_students_distribution() -> None:
    known = {4: 2.7764, 10: 2.2281, 18: 2.1009, 30: 2.0423}
    assert {n: students_t(n) for n in known} == pytest.approx(known, rel=0.01)


@pytest.mark.parametrize(
    ("growth", "alike", "found"),
    [(1.0, 0.0, (40, 40)), (1.0, 0.5, (40, 40)), (0.5, 0.0, (36, 40)), (0.0, 0.0, (0, 4)), (0.0, 0.5, (0, 6))],
)
def test_a_leak_is_found_and_what_is_none_is_not(growth: float, alike: float, found: tuple[int, int]) -> None:
    """Of an hour, in MiB a minute, beside what an allocator keeps of one cycle and not of another; in 40 soaks."""
    soaks = (memory(growth, alike=alike, seed=seed) for seed in range(40))
    judged = [judge_memory(floors, floors[0])[0] for floors in soaks]
    assert found[0] <= sum(not (flat.held and sure.held) for flat, sure in judged) <= found[1]


@pytest.mark.parametrize(
    ("growth", "noise", "held"),
    [
        (-3, 0.5, (True, True)),
        (0.01, 0.0, (True, True)),
        (0.02, 0.0, (False, True)),
        (0.1, 0.5, (False, True)),
        (2, 0.5, (False, False)),
        (0, 400, (True, False)),
    ],
)
def test_memory_is_flat_and_a_rise_ruled_out(growth: float, noise: float, held: tuple[bool, bool]) -> None:
    """0.01 MiB a minute are less than one an hour, 0.02 more. With noise of 400 MiB a slope may be anything, zero too,
    so the second rule does not hold."""
    floors = memory(growth, noise=noise)
    verdicts, line = judge_memory(floors, floors[0])
    assert tuple(verdict.held for verdict in verdicts) == held, verdicts
    assert ("soak for longer" in verdicts[1].finding) == (held == (True, False))
    assert line is not None


def test_what_caches_count_is_taken_off_the_slope() -> None:
    """Two MiB a minute in all, which are in a cache that fills."""
    floors = [replace(one, caches={"grammars": int((one.at / 60) * 2 * MEBIBYTE)}) for one in memory(2, noise=0.0)]
    assert "slope +2.00" in (found := judge_memory(floors, floors[0])[0][0].finding)
    assert "less what caches count +0.00" in found.replace("-0.00", "+0.00")


def test_bytes_of_caches_are_read_by_name() -> None:
    lines = (
        "# TYPE prerope:cache_bytes gauge",
        *(f'prerope:cache_bytes{{model_name="m",cache="{name}"}} {size}.0' for name, size in (("a", 3), ("b", 4))),
        "# TYPE prerope:cache_max_bytes gauge",
        'prerope:cache_max_bytes{model_name="m",cache="a"} 64.0',
        "# TYPE prerope:angle_bytes gauge",
        'prerope:angle_bytes{model_name="m"} 5.0',
    )
    caches = read_caches("\n".join(lines) + "\n")
    assert caches == {"a": 3, "b": 4, "angles": 5}
    assert Sample(0.0, IDLE, 20, HELD, caches).uncounted == 8


def test_an_hour_at_two_levels_is_flat_and_asks_for_more() -> None:
    """Floors of a soak of 2026-11-28, in MiB, twelve in 57 minutes."""
    floors = [1593, 1593, 1610, 1610, 1610, 1594, 1594, 1594, 1594, 1610, 1610, 1610]
    times = np.linspace(0, 56.8 * 60, len(floors))
    soaked = [Sample(float(at), IDLE, floor * MEBIBYTE, HELD) for at, floor in zip(times, floors, strict=True)]
    (flat, sure), _ = judge_memory(soaked, soaked[0])
    assert (flat.held, sure.held) == (True, False)


def test_too_few_cycles_say_so() -> None:
    floors = memory(0)[:5]
    verdicts, line = judge_memory(floors, floors[0])
    assert ([verdict.held for verdict in verdicts], line) == ([False, False], None)
    assert "soak for longer" in verdicts[0].finding


class Server:
    """What a soak knows of one, whose requests have 40 MiB each while they are under way."""

    root, key, num_open, most_open = "", "", 0, 0

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.samples: list[Sample] = []

    async def perform(self, task: Task) -> None:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        await asyncio.sleep(0.12 if task.kind.endswith("k") else 0.02)
        self.num_open -= 1
        self.outcomes.append(Outcome(task.kind, 0.0, 0.02, 200))

    async def settle(self) -> Sample:
        self.samples.append(Sample(time.monotonic(), IDLE, (1600 + 40 * self.num_open) * MEBIBYTE, HELD))
        return self.samples[-1]


def test_memory_is_looked_at_when_nothing_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long tasks take all of some cycles and none of others, as they did of an hour on a slow machine."""
    monkeypatch.setattr("bench.soak.__main__.CLIENT_PAUSE_S", 0.01)
    monkeypatch.setattr("bench.soak.plan.DECK", {"short": 2, "shared": 1})
    monkeypatch.setattr(
        Soak, "_tokenize", lambda _, text: {"max_model_len": 9, "tokens": [*range(2 * len(text.split()))]}
    )
    asked = Namespace(seed=0, clients=3, seconds=2.0, cycles=8, long_tokens=[64, 128], long_pause=0.02)
    server: Any = Server()
    with Progress(disable=True) as progress:
        progress.add_task("")
        floors = asyncio.run(Soak(asked, server, server, progress).traffic())
    assert len(floors) == 8
    assert {sample.rss for sample in floors} == {1600 * MEBIBYTE}
    assert server.most_open >= 3
    assert {"short", "shared", "0.0625k", "0.125k"} <= {outcome.kind for outcome in server.outcomes}


def test_a_stream_that_waits_is_named() -> None:
    calm = Outcome("short", 0.0, 1.0, 200, gaps=(0.1, 0.2))
    assert judge_streams([calm]).held
    assert judge_streams([calm, Outcome("crowd", 0.0, 1.0, 200, gaps=(60.0,))]).held, "no ordinary one"
    held_up = judge_streams([calm, Outcome("shared", 0.0, 1.0, 200, gaps=(0.1, 5.5))])
    assert not held_up.held
    assert "longest 5.50 s" in held_up.finding
    assert not judge_streams([]).held


def test_leaks_are_named() -> None:
    before, after = Sample(0.0, IDLE, 1, HELD), Sample(1.0, IDLE, 1, Resources(9, 21, 6))
    assert [v.rule for v in judge_resources(before, after) if not v.held] == [
        "no leaked socket",
        "no leaked file descriptor",
    ]
    assert all(verdict.held for verdict in judge_resources(after, before))
    assert judge_blocks(after).held
    assert not judge_blocks(Sample(1.0, Gauges(0, 0, 100, 99, 60, 0, 0, 0), 1, HELD)).held
    assert not judge_blocks(Sample(1.0, Gauges(1, 0, 100, 100, 60, 0, 0, 0), 1, HELD)).held


def test_an_unanswered_request_a_problem_and_a_500_do_not_hold() -> None:
    good = [Outcome("short", 0.0, 1.0, 200), Outcome("bad", 0.0, 1.0, 400), Outcome("abort", 0.0, 1.0, 0, aborted=True)]
    fine = Sample(0.0, IDLE, 1, HELD)
    assert all(verdict.held for verdict in judge_replies(good, fine, 3))
    assert not judge_replies(good, fine, 4)[0].held
    wrong = [*good, Outcome("short", 0.0, 1.0, 500, problem="short at /generate: HTTP 500")]
    (replies, _) = judge_replies(wrong, fine, 4)
    assert not replies.held
    assert "HTTP 500" in replies.finding
    assert not judge_replies(good, Sample(0.0, Gauges(0, 0, 9, 9, 0, 0, 0, 0, 2), 1, HELD), 3)[1].held


def test_errors_and_tracebacks_are_found_in_a_log(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text('{"level": "warning", "event": "w"}\n')
    assert judge_log(log).held
    log.write_text('{"level": "warning", "event": "w"}\n{"level": "error", "event": "boom"}\nTraceback (most recent\n')
    assert not judge_log(log).held
    assert judge_log(log).finding.startswith("2 errors: boom ; Traceback (most recent")


@pytest.mark.slow
def test_a_refused_connection_is_a_problem_of_the_run_and_no_exception_in_it(tmp_path: Path) -> None:
    client = SoakClient("http://127.0.0.1:9", "key")
    asyncio.run(client.perform(Task("short", GENERATE, {"prompt": "Hello"})))
    (outcome,) = client.outcomes
    assert outcome.status == 0
    assert "ConnectError" in outcome.problem
    with pytest.raises(BenchError, match="ended with status 1"):
        main(["--model-id", "/nowhere", "--out", str(tmp_path)])
