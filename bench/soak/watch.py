"""Watches a server while it is soaked: its process through psutil, its cache and queue through /metrics.

Times are seconds since the watch began, memory is bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
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
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    server_errors: int = 0

    @property
    def idle(self) -> bool:
        return self.running == self.waiting == 0


METRICS = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting"),
    *("prerope:num_blocks", "prerope:num_blocks_free", "prerope:num_blocks_cached"),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:num_preemptions_total"),
)
"""What the fields of `Gauges` are called, but for the last."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. caches: bytes that the server counts in each, by name."""

    at: float
    gauges: Gauges
    rss: int
    resources: Resources
    caches: Mapping[str, int] = field(default_factory=dict)

    @property
    def uncounted(self) -> int:
        """Bytes of memory that are in none of the caches."""
        return self.rss - sum(self.caches.values())


@dataclass(slots=True)
class Watch:
    """Takes a sample every second within `running()`, and on demand."""

    root: str
    process: psutil.Process
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
        while True:
            try:
                await self.look()
            except (httpx.HTTPError, psutil.Error, KeyError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(PERIOD_S)

    async def look(self) -> Sample:
        """A sample now. Raises httpx.HTTPError, psutil.Error."""
        async with http_client(self.root, timeout=30.0) as http:
            exposition = (await http.get("/metrics")).raise_for_status().text
        gauges, caches = read_gauges(exposition), read_caches(exposition)
        await asyncio.sleep(0.05)  # the server closes this very connection before it is counted
        process = self.process
        resources = Resources(process.num_threads(), process.num_fds(), len(process.net_connections("all")))
        sample = Sample(time.perf_counter() - self.born, gauges, process.memory_info().rss, resources, caches)
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
            if time.monotonic() - steady_since >= STEADY_S and (target is None or last.resources.within(target)):
                break
        return last


def read_gauges(exposition: str) -> Gauges:
    """The figures of a scrape. KeyError for one that is not there."""
    totals: dict[str, float] = {}
    server_errors = 0.0
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
            if sample.name == "prerope:http_requests_total" and sample.labels["handler"] != "/ready":
                server_errors += sample.value * (int(sample.labels["status"]) >= 500)
    return Gauges(*map(int, (*(totals[name] for name in METRICS), server_errors)))


def read_caches(exposition: str) -> dict[str, int]:
    """Bytes of each cache that the server counts, by name: those that clients fill, and angles."""
    samples = (one for family in text_string_to_metric_families(exposition) for one in family.samples)
    return {
        one.labels.get("cache", "angles"): int(one.value)
        for one in samples
        if one.name in ("prerope:cache_bytes", "prerope:angle_bytes")
    }
