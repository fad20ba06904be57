"""One point of the measurement: prompts, some streams at once to one server, what they add up to. Times are seconds."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
import uuid
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import numpy as np

from bench import BenchError
from bench.shared.machine import DISTURBED_CORES, OthersMeter, listeners
from bench.shared.servers import Counter, Server
from bench.shared.streams import Completion, StreamFailed
from bench.shared.text import reference_words

Figures = dict[str, float]
"""By name: medians over the streams of `ttft` and `time_per_token`; `gap_p50` and `gap_p99` over all tokens;
`output_rate` and `total_rate`, generated and all tokens a second."""


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
    def disturbed(self) -> bool:
        return self.others_cores > DISTURBED_CORES


async def run_point(server: Server, prompts: Sequence[str], num_tokens: int) -> Run:
    """All prompts at once, one stream each. A stream that fails is reported, and the others still count."""
    processes = listeners(server.url)
    meter, started = OthersMeter(processes), time.perf_counter()
    results = await asyncio.gather(*(server.stream(prompt, num_tokens) for prompt in prompts), return_exceptions=True)
    wall_s = time.perf_counter() - started
    others = meter.cores() if processes else 0.0
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, (StreamFailed, httpx.HTTPError)):
            raise result
    failures = tuple(f"{type(r).__name__}: {r}" for r in results if isinstance(r, BaseException))
    return Run(tuple(r for r in results if isinstance(r, Completion)), wall_s, failures, others)


def run_figures(run: Run) -> Figures | None:
    """One round's; None where a stream failed, for then fewer streams shared the server."""
    if run.failures or not run.completions:
        return None
    gaps = [gap for completion in run.completions for gap in completion.gaps]
    per_token = [t for completion in run.completions if (t := completion.time_per_token) is not None]
    generated = sum(len(completion.token_times) for completion in run.completions)
    prompts = sum(completion.prompt_tokens for completion in run.completions)
    return {
        "ttft": statistics.median(completion.ttft for completion in run.completions),
        "time_per_token": statistics.median(per_token) if per_token else math.nan,
        "gap_p50": float(np.percentile(gaps, 50)) if gaps else math.nan,
        "gap_p99": float(np.percentile(gaps, 99)) if gaps else math.nan,
        "output_rate": generated / run.wall_s,
        "total_rate": (generated + prompts) / run.wall_s,
    }


def summarise(runs: Sequence[Run]) -> Figures | None:
    """Medians over the rounds in which every stream succeeded; None where there is no such round."""
    rounds = [figures for run in runs if (figures := run_figures(run)) is not None]
    return {name: statistics.median(f[name] for f in rounds) for name in rounds[0]} if rounds else None


def speedup(name: str, ours: Figures, peer: Figures) -> float:
    """How many times as fast as the peer, above 1 where ours is the better, whether `name` is a rate or a time."""
    above, below = (ours, peer) if name.endswith("rate") else (peer, ours)
    return above[name] / below[name] if below[name] else math.inf


FILLER = " a"  # one token in every common vocabulary: closes the gap that a word of several tokens leaves


class PromptWriter:
    """Writes English prompts of an exact number of tokens, no two of which share a beginning: prefix caches stay cold.

    Tokens are counted between measurements. The same seed starts at the same places in the text.
    """

    def __init__(self, count: Counter, seed: int = 0) -> None:
        self._count, self._words, self._random = count, reference_words(), random.Random(seed)

    def write(self, num_tokens: int) -> str:
        """A prompt of exactly `num_tokens` tokens that no other prompt begins like."""
        label = f"Note {uuid.uuid4().hex[:12]}."
        start = self._random.randrange(len(self._words))
        around = self._words[start:] + self._words * (1 + num_tokens // len(self._words))

        def text(num_words: int) -> str:
            return " ".join([label, *around[:num_words]])

        too_many = bisect_right(range(num_tokens), num_tokens, key=lambda num_words: self._count(text(num_words)))
        if not too_many:
            raise BenchError(f"a prompt of {num_tokens} tokens is too short: its label alone takes more")
        prompt = text(too_many - 1)
        prompt += FILLER * (num_tokens - self._count(prompt))
        if (found := self._count(prompt)) != num_tokens:
            raise BenchError(f"no prompt of {num_tokens} tokens found: the nearest has {found}")
        return prompt
