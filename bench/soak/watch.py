"""Watches a server while it is soaked: its process through psutil, its cache and queue through /metrics.

Times are seconds since the watch began, memory is bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from bench.shared.servers import http_client

PERIOD_S = 1.0
STEADY_S, SETTLE_S = 4.0, 25.0
"""Counts that rest for STEADY_S have settled; SETTLE_S is how long we wait for that. A worker thread of anyio stays
ten seconds without work, a kept connection of uvicorn five."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a process holds. `sockets` are among the `files`."""

    threads: int
    files: int
    sockets: int

    def within(self, other: Resources) -> bool:
        return self.threads <= other.threads and self.files <= other.files and self.sockets <= other.sockets


@dataclass(frozen=True, slots=True)
class Gauges:
    """From one scrape: sequences, cache blocks, and totals.

    server_errors: HTTP replies of 500 and above; /ready says 503 while the model loads, and is not among them.
    """

    running: int
    waiting: int
    blocks: int
    free_blocks: int
    cached_blocks: int
    server_errors: int
    prompt_tokens: int
    generation_tokens: int
    preemptions: int

    @property
    def idle(self) -> bool:
        return self.running == self.waiting == 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One look; rss and resources are missing where the process is not ours to see."""

    at: float
    gauges: Gauges
    rss: int | None = None
    resources: Resources | None = None


@dataclass(slots=True)
class Watch:
    """Takes a sample every second within `running()`, and on demand."""

    root: str
    process: psutil.Process | None
    born: float = field(default_factory=time.perf_counter)
    samples: list[Sample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        async with self._client() as http:
            while True:
                try:
                    await self._look(http)
                except (httpx.HTTPError, psutil.Error, KeyError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(PERIOD_S)

    async def look(self) -> Sample:
        """A sample now. Raises httpx.HTTPError, psutil.Error."""
        async with self._client() as http:
            return await self._look(http)

    async def _look(self, http: httpx.AsyncClient) -> Sample:
        reply = await http.get("/metrics")
        gauges = read_gauges(reply.raise_for_status().text)
        rss = resources = None
        if self.process is not None:
            await asyncio.sleep(0.05)  # the server closes this very connection before it is counted
            with self.process.oneshot():
                rss = self.process.memory_info().rss
            resources = Resources(
                self.process.num_threads(), self.process.num_fds(), len(self.process.net_connections("all"))
            )
        sample = Sample(time.perf_counter() - self.born, gauges, rss, resources)
        self.samples.append(sample)
        return sample

    async def settle(self, target: Resources | None = None) -> Sample:
        """The sample once nothing runs and counts rest; with a target, once they are within it. Or the last tried."""
        deadline = time.monotonic() + SETTLE_S
        steady_since, last = time.monotonic(), await self.look()
        while time.monotonic() < deadline:
            await asyncio.sleep(0.5)
            sample = await self.look()
            if sample.resources != last.resources or not sample.gauges.idle:
                steady_since = time.monotonic()
            last = sample
            reached = target is None or last.resources is None or last.resources.within(target)
            if reached and time.monotonic() - steady_since >= STEADY_S:
                break
        return last

    def _client(self) -> httpx.AsyncClient:
        return http_client(self.root, timeout=30.0)


def read_gauges(exposition: str) -> Gauges:
    """The figures of a scrape. KeyError for one that is not there."""
    totals: dict[str, float] = {}
    server_errors = 0.0
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
            if sample.name == "prerope:http_requests_total" and sample.labels["handler"] != "/ready":
                server_errors += sample.value * (int(sample.labels["status"]) >= 500)
    return Gauges(
        running=int(totals["vllm:num_requests_running"]),
        waiting=int(totals["vllm:num_requests_waiting"]),
        blocks=int(totals["prerope:num_blocks"]),
        free_blocks=int(totals["prerope:num_blocks_free"]),
        cached_blocks=int(totals["prerope:num_blocks_cached"]),
        server_errors=int(server_errors),
        prompt_tokens=int(totals["vllm:prompt_tokens_total"]),
        generation_tokens=int(totals["vllm:generation_tokens_total"]),
        preemptions=int(totals["vllm:num_preemptions_total"]),
    )
