"""The traffic of `bench.fairness` on one server: endless long prompts, a running stream, short requests at times.

Times are seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench import BenchError
from bench.shared.streams import StreamFailed, decode_event, split_events
from bench.shared.text import Library

SHORT_OUTPUT = 4
STREAM_OUTPUT = 900
LEAST_PAUSE, MOST_PAUSE = 0.5, 1.5
"""Between short requests, of their mean: not at a fixed beat, for steps have one of their own."""


@dataclass(slots=True)
class Latencies:
    """What one policy gave; `at` is when, since the load began.

    Attributes:
        ttfts: (at, seconds) of short requests.
        unanswered: (at, seconds waited so far) of those without a token when the time was up.
        gaps: (at, seconds) between two tokens of the running stream.
        num_long: long prompts that were read to their end.
    """

    ttfts: list[tuple[float, float]] = field(default_factory=list)
    unanswered: list[tuple[float, float]] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    num_long: int = 0


@dataclass(slots=True)
class Load:
    """One server's load, from one random generator."""

    http: httpx.AsyncClient
    library: Library
    options: argparse.Namespace
    draw: random.Random
    latencies: Latencies = field(default_factory=Latencies)
    _streaming: asyncio.Event = field(default_factory=asyncio.Event)
    _began: float = field(default_factory=time.perf_counter)

    async def run(self) -> Latencies:
        """For the wanted time. What is under way then is given up; short requests among it are noted.

        Raises:
            StreamFailed, httpx.HTTPError: of any of the requests.
        """
        stream = await self.start_stream()
        self._began = time.perf_counter()
        self.latencies.gaps.clear()
        tasks = [stream, *(asyncio.create_task(self._long_prompts()) for _ in range(self.options.in_flight))]
        tasks.append(asyncio.create_task(self._shorts()))
        done, _ = await asyncio.wait(tasks, timeout=self.options.seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
        return self.latencies

    async def _long_prompts(self) -> None:
        while True:
            await self.ask(self.options.long_tokens, 1)
            self.latencies.num_long += 1

    async def start_stream(self) -> asyncio.Task[None]:
        """A task that streams for ever and notes the time between tokens; returns once there are some, or it failed."""
        task = asyncio.create_task(self._stream())
        begun = asyncio.create_task(self._streaming.wait())
        await asyncio.wait((task, begun), return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        return task

    async def _stream(self) -> None:
        while True:
            last: float | None = None
            async for at, event in self.events(self.options.short_tokens, STREAM_OUTPUT):
                if event.get("token_ids"):
                    if last is not None:
                        self.latencies.gaps.append((last - self._began, at - last))
                        self._streaming.set()
                    last = at

    async def _shorts(self) -> None:
        shorts: set[asyncio.Task[None]] = set()
        try:
            while True:
                await asyncio.sleep(self.draw.uniform(LEAST_PAUSE, MOST_PAUSE) * self.options.short_every)
                shorts.add(asyncio.create_task(self._short()))
                for ended in [task for task in shorts if task.done()]:
                    shorts.discard(ended)
                    ended.result()
        finally:
            for task in shorts:
                task.cancel()
            await asyncio.gather(*shorts, return_exceptions=True)

    async def _short(self) -> None:
        started, answered = time.perf_counter(), False
        try:
            async for at, event in self.events(self.options.short_tokens, SHORT_OUTPUT):
                if event.get("token_ids") and not answered:
                    answered = True
                    self.latencies.ttfts.append((started - self._began, at - started))
        except asyncio.CancelledError:
            if not answered:
                self.latencies.unanswered.append((started - self._began, time.perf_counter() - started))
            raise

    async def ask(self, num_tokens: int, max_tokens: int) -> None:
        """One request, read to its end."""
        async for _ in self.events(num_tokens, max_tokens):
            pass

    async def events(
        self, num_tokens: int, max_tokens: int, **more: Any
    ) -> AsyncIterator[tuple[float, dict[str, Any]]]:
        """(arrival, event) of a streamed /generate with a prompt that shares nothing, as they come.

        Raises:
            StreamFailed: a refusal, or an error event.
        """
        prompt = self.library.ids(self.draw, num_tokens)
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": True} | more
        rest = b""
        async with self.http.stream("POST", "/generate", json=body) as reply:
            if reply.is_error:
                raise StreamFailed(f"HTTP {reply.status_code}: {(await reply.aread())[:300].decode(errors='replace')}")
            async for chunk in reply.aiter_raw():
                whole, separator, rest = (rest + chunk).rpartition(b"\n\n")
                for at, payload in split_events([(time.perf_counter(), whole + separator)]):
                    if payload != b"[DONE]":
                        yield at, decode_event(payload)


async def slowest_chunk(load: Load) -> float:
    """Seconds of the slowest full chunk of one long prompt beside one running stream.

    Raises:
        BenchError: the prompt is too short to be read in several chunks.
    """
    stream = await load.start_stream()
    try:
        events = load.events(load.options.long_tokens, 1, return_progress=True)
        times = [at async for at, event in events if "progress" in event]
    finally:
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
    if len(times) < 2:
        raise BenchError(f"--long-tokens {load.options.long_tokens} is read in two steps: give more")
    return max(after - before for before, after in itertools.pairwise(times))
