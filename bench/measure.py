"""One point of the measurement: some streams at once to one server, and what they add up to.

A point is a prompt length and a number of streams. `Run` is one round of one point at one server, raw; `Figures`
sums up the runs of all rounds by medians. Times are seconds.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import httpx

from bench.client import Server
from bench.neighbours import DISTURBED_CORES, CpuMeter, listeners, quiet
from bench.streams import Completion, StreamFailed

PromptSource = Callable[[int], Sequence[str]]


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """`prompt_tokens` in every prompt, `num_streams` requests at once."""

    prompt_tokens: int
    num_streams: int

    @property
    def label(self) -> str:
        return f"{self.prompt_tokens:,} × {self.num_streams}"


@dataclass(frozen=True, slots=True)
class Run:
    """One round of one point at one server. `others_cores`: what programs that are no part of it used meanwhile."""

    completions: tuple[Completion, ...]
    wall_s: float
    failures: tuple[str, ...] = ()
    others_cores: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(len(completion.token_times) for completion in self.completions)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a table shows of one point at one server: medians over the rounds.

    `ttft` and `time_per_token` are a round's medians over its streams; `gap_p50` and `gap_p99` are over all its
    tokens. `output_rate` and `total_rate` are generated and all tokens a second of the whole point.
    """

    ttft: float
    time_per_token: float
    gap_p50: float
    gap_p99: float
    output_rate: float
    total_rate: float
    prompt_tokens: float
    output_tokens: float
    num_rounds: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


TIMES = ("ttft", "time_per_token", "gap_p50", "gap_p99")  # smaller is better
RATES = ("output_rate", "total_rate")  # larger is better


async def run_point(server: Server, prompts: Sequence[str], num_tokens: int) -> Run:
    """All prompts at once, one stream each. A stream that fails is reported, and the others still count."""
    processes = listeners(server.url)
    before = CpuMeter.read(processes)
    started = time.perf_counter()
    results = await asyncio.gather(*(server.complete(prompt, num_tokens) for prompt in prompts), return_exceptions=True)
    wall_s = time.perf_counter() - started
    others = CpuMeter.read(processes).others_since(before) if processes else 0.0
    failures = []
    for result in results:
        if isinstance(result, (StreamFailed, httpx.HTTPError)):
            failures.append(f"{type(result).__name__}: {result}")
        elif isinstance(result, BaseException):
            raise result
    completed = tuple(result for result in results if isinstance(result, Completion))
    return Run(completed, wall_s, tuple(failures), others)


async def undisturbed_run(server: Server, write: PromptSource, num_tokens: int, patience_s: float) -> Run:
    """A run while no other program works; within `patience_s` it waits for quiet and takes disturbed runs again.

    `write` gives the prompts of the n-th try: fresh ones every time, for the server has seen those of the last.
    The least disturbed run where none was clean.
    """
    deadline = time.monotonic() + patience_s
    runs: list[Run] = []
    while not runs or (runs[-1].others_cores > DISTURBED_CORES and time.monotonic() < deadline):
        if patience_s > 0:
            await quiet(deadline)
        runs.append(await run_point(server, write(len(runs)), num_tokens))
    return min(runs, key=lambda run: run.others_cores)


def run_figures(run: Run) -> dict[str, float] | None:
    """One round's figures; None where a stream failed, for then fewer streams shared the server."""
    if run.failures or not run.completions:
        return None
    gaps = [gap for completion in run.completions for gap in completion.gaps]
    per_token = [t for completion in run.completions if (t := completion.time_per_token) is not None]
    prompt_tokens = sum(completion.prompt_tokens for completion in run.completions)
    return {
        "ttft": statistics.median(completion.ttft for completion in run.completions),
        "time_per_token": statistics.median(per_token) if per_token else math.nan,
        "gap_p50": percentile(gaps, 50),
        "gap_p99": percentile(gaps, 99),
        "output_rate": run.num_tokens / run.wall_s,
        "total_rate": (run.num_tokens + prompt_tokens) / run.wall_s,
        "prompt_tokens": prompt_tokens / len(run.completions),
        "output_tokens": run.num_tokens / len(run.completions),
    }


def summarise(runs: Sequence[Run]) -> Figures | None:
    """Medians over the rounds in which every stream succeeded; None where there is no such round."""
    rounds = [figures for run in runs if (figures := run_figures(run)) is not None]
    if not rounds:
        return None
    medians = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    return Figures(**medians, num_rounds=len(rounds))


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the nearest ranks, as numpy's default; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def speedup(name: str, ours: Figures, peer: Figures) -> float:
    """How many times as fast as the peer, above 1 where ours is the better, whether `name` is a time or a rate."""
    mine, other = getattr(ours, name), getattr(peer, name)
    numerator, denominator = (other, mine) if name in TIMES else (mine, other)
    return float(numerator / denominator) if denominator else math.inf
