"""Mixed traffic for a given time on loopback, and then: did anything leak, grow or go unanswered?

    python -m bench.soak --minutes 20

starts the server and sends it short prompts, shared prefixes, aborts at random times, slow readers, bad input and,
one after another, prompts of 8k and 16k tokens; streaming and not, to /generate and to OpenAI's routes, by several
clients that each follow a seeded random plan (`bench.soak.plan`); among it, bodies by which one client would hold up
the others (`bench.soak.hostile`). The rules are in `bench.soak.verdicts`; the exit code is 1 where one did not hold.
The time counts from the end of the warm-up, which writes to the whole cache once, fills the pool of threads and sends
every kind of request.

`--url` soaks a server that runs already, and must be idle otherwise: without the checks of its process and its log.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import secrets
import shlex
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.shared import options
from bench.shared.machine import describe_machine
from bench.shared.servers import Server, free_port, http_client, launched
from bench.shared.text import Library
from bench.soak import verdicts
from bench.soak.client import SoakClient
from bench.soak.plan import (
    ABORTED_TOKENS,
    GENERATE,
    MANY_TOKENS,
    Task,
    TaskMaker,
    bad_tasks,
    hostile_tasks,
    long_task,
    long_tasks,
    mixed_tasks,
)
from bench.soak.report import Soaked, report
from bench.soak.watch import Sample, Watch

LEAST_SECONDS = 25.0  # a sample a second into the windows of `verdicts.trend`
LEAST_LONGEST = max(ABORTED_TOKENS) + MANY_TOKENS
SPARE_TOKENS = 256  # of MAX_MODEL_LEN beside the longest prompt
POOL_REQUESTS, POOL_CHARS, FILL_TOKENS = 48, 200_000, 1000
CLIENT_PAUSE_S = 1.0  # mean, between two tasks of a client


@dataclass(slots=True)
class Soak:
    """One soak of one server: warm-up and traffic."""

    asked: argparse.Namespace
    client: SoakClient
    watch: Watch
    progress: Progress
    started: int = 0
    max_model_len: int = field(init=False)
    _library: Library = field(init=False)

    def __post_init__(self) -> None:
        self.max_model_len = self._tokenize("Hello")["max_model_len"]
        self._library = Library(lambda text: self._tokenize(text)["tokens"])

    @property
    def _bad(self) -> list[Task]:
        return bad_tasks(self.max_model_len, keyed=self.client.key is not None)

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.client.key}"} if self.client.key else {}

    def _tokenize(self, text: str) -> dict[str, Any]:
        body = {"prompt": text, "add_special_tokens": False}
        reply = httpx.post(f"{self.client.root}/tokenize", json=body, headers=self._headers, timeout=60.0)
        answer: dict[str, Any] = reply.raise_for_status().json()
        return answer

    async def warm_up(self) -> Sample:
        """Everything once, the whole cache written to; the server idle after that."""
        self._say("warm-up")
        draw = random.Random(f"{self.asked.seed}, warm-up")
        maker = TaskMaker(self._library, self._bad, self.asked.seed, 0)
        long = [long_task(self._library, draw, n) for n in sorted(self.asked.long_tokens, reverse=True)]
        for task in (
            *long,
            *self._bad,
            *hostile_tasks(),
            *map(maker.task, ("short", "shared", "abort", "slow", "crowd")),
        ):
            await self._perform(task)
        await self._fill_thread_pool()
        await self._fill_cache(draw)
        return await self.watch.settle()

    async def _fill_thread_pool(self) -> None:
        """Long texts are tokenised on threads that start as they are needed, up to a limit, and then stay."""
        body = {"prompt": "word " * (min(POOL_CHARS, 4 * self.max_model_len) // 5)}
        async with http_client(self.client.root) as http:
            posts = (http.post("/tokenize", json=body, headers=self._headers) for _ in range(POOL_REQUESTS))
            for reply in await asyncio.gather(*posts):
                reply.raise_for_status()

    async def _fill_cache(self, draw: random.Random) -> None:
        """Prompts that share nothing until every block has been used, at most twice as many as it takes."""
        gauges = (await self.watch.look()).gauges
        for _ in range(2 * gauges.blocks * self.asked.block_size // FILL_TOKENS + 1):
            gauges = (await self.watch.look()).gauges
            if self.asked.url is not None or gauges.cached_blocks >= 0.99 * gauges.blocks:
                return
            self._say(f"warm-up: cache {gauges.cached_blocks / gauges.blocks:.0%} written to")
            prompt = self._library.ids(draw, FILL_TOKENS)
            await self._perform(Task("fill", GENERATE, {"prompt": prompt, "max_tokens": 1}))

    async def traffic(self) -> None:
        """All clients until the time is up, and until what they began has ended."""
        asked, end = self.asked, time.monotonic() + self.asked.seconds
        plans = [(mixed_tasks(self._library, self._bad, asked.seed, n), CLIENT_PAUSE_S) for n in range(asked.clients)]
        plans.append((long_tasks(self._library, asked.long_tokens, asked.seed), asked.long_pause))
        await asyncio.gather(self._show(end), *(self._follow(*plan, number, end) for number, plan in enumerate(plans)))

    async def _follow(self, tasks: Iterator[Task], pause: float, number: int, end: float) -> None:
        draw = random.Random(f"{self.asked.seed}, pauses {number}")
        while True:
            await asyncio.sleep(min(draw.expovariate(1 / pause), max(0.0, end - time.monotonic())))
            if time.monotonic() >= end:
                return
            await self._perform(next(tasks))

    async def _perform(self, task: Task) -> None:
        self.started += task.num_clients
        await asyncio.gather(*(self.client.perform(task) for _ in range(task.num_clients)))

    async def _show(self, end: float) -> None:
        while (left := end - time.monotonic()) > 0:
            problems = sum(bool(outcome.problem) for outcome in self.client.outcomes)
            told = f"{len(self.client.outcomes)} requests, {problems} problems, {self.client.num_open} open"
            self._say(told, completed=self.asked.seconds - left)
            await asyncio.sleep(1.0)
        self._say("waiting for what was begun", completed=self.asked.seconds)

    def _say(self, text: str, completed: float | None = None) -> None:
        self.progress.update(self.progress.task_ids[0], description=text, completed=completed)


@contextlib.asynccontextmanager
async def serving(asked: argparse.Namespace, log: Path) -> AsyncIterator[tuple[str, str | None, psutil.Process | None]]:
    """(root, key, process) of the server to soak, ready; started and stopped here unless there is a --url."""
    async with http_client() as http:
        if asked.url is not None:
            await Server("server", f"{asked.url}/v1", http).ready(asked.ready_timeout)
            yield asked.url, asked.api_key, None
            return
        port, key = free_port(), secrets.token_hex(8)
        settings = {"port": port, "api-key": key, "max-model-len": max(asked.long_tokens) + SPARE_TOKENS}
        settings |= {"kv-cache-memory": asked.kv_cache_memory, "kv-block-size": asked.block_size, "max-num-seqs": 16}
        settings |= {"max-queued-requests": 64, "log-level": "warning", "log-format": "json"}
        settings |= {"model-id": asked.model_id} if asked.model_id else {}
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        root = f"http://127.0.0.1:{port}"
        command = shlex.join([sys.executable, "-m", "prerope.server", *flags])
        async with launched(Server("server", f"{root}/v1", http), command, log, asked.ready_timeout) as process:
            yield root, key, psutil.Process(process.pid)


async def soak(asked: argparse.Namespace, progress: Progress) -> Soaked:
    about = describe_machine() | {name: getattr(asked, name) for name in ("seconds", "clients", "seed")}
    log = asked.out / "server.log"
    async with serving(asked, log) as (root, key, process):
        client, watch = SoakClient(root, key, asked.patience), Watch(root, process)
        soaked = Soak(asked, client, watch, progress)
        before = await soaked.warm_up()
        num_before, begin = len(client.outcomes), watch.samples[-1].at
        async with watch.running():
            await soaked.traffic()
        end = watch.samples[-1].at
        after = await watch.settle(before.resources)
    under_traffic = [sample for sample in watch.samples if begin < sample.at <= min(end, begin + asked.seconds)]
    judged = [
        verdicts.judge_blocks(after),
        *verdicts.judge_resources(before, after),
        *verdicts.judge_replies(client.outcomes, after, soaked.started),
        verdicts.judge_watch(watch.failures, len(under_traffic)),
    ]
    line = None
    if process is not None:
        memory, line = verdicts.judge_memory(under_traffic, before, after)
        judged += [memory, verdicts.judge_log(log)]
    warm_up, outcomes = client.outcomes[:num_before], client.outcomes[num_before:]
    return Soaked(about, warm_up, outcomes, watch.samples, begin, end, judged, line)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("soak", __doc__, "soak")
    add = parser.add_argument
    add("--minutes", type=float, default=20.0, help="of traffic after the warm-up")
    add("--seconds", type=float, help="the same in seconds")
    add("--url", help="root of a running server of this project; without it one is started")
    add("--api-key", metavar="KEY", help="of the server at --url")
    add("--model-id", metavar="MODEL", help="for the server that is started; without it the embedded model")
    add("--clients", type=options.count, default=5, help="beside the one that sends long prompts")
    add("--long-tokens", type=options.counts, default="8192,16384", metavar="N,N")
    add("--long-pause", type=float, default=20.0, metavar="S", help="mean pause between long prompts")
    add("--kv-cache-memory", default="640MiB", help="small, so that the warm-up writes to all of it")
    add("--block-size", type=options.count, default=16, help="of the cache of the server that is started")
    add("--seed", type=int, default=0, help="of the clients' plans")
    add("--patience", type=float, default=900.0, metavar="S", help="a request may take this long")
    add("--ready-timeout", type=float, default=300.0, help="seconds the server may take to start")
    asked = parser.parse_args(arguments)
    asked.seconds = asked.seconds or 60 * asked.minutes
    if asked.seconds < LEAST_SECONDS:
        parser.error(f"--seconds {asked.seconds:g}: at least {LEAST_SECONDS:g} are needed to fit a slope to")
    if max(asked.long_tokens) < LEAST_LONGEST:
        parser.error(f"--long-tokens: the longest must have at least {LEAST_LONGEST} tokens, as aborted requests may")
    if asked.url is not None:
        asked.url = asked.url.rstrip("/").removesuffix("/v1")
    return asked


def main(arguments: Sequence[str] | None) -> int:
    asked, console = parse_arguments(arguments), options.console()
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task("starting the server", total=asked.seconds)
        soaked = asyncio.run(soak(asked, progress))
    report(soaked).publish(asked.out, console)
    return 0 if soaked.held else 1


if __name__ == "__main__":
    options.run("soak", main)
