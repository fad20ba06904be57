"""Mixed traffic for a given time on loopback, and then: did anything leak, grow or go unanswered?

    python -m bench.soak --minutes 20

starts the server and sends it short prompts, shared prefixes, aborts at random times, slow readers, bad input and,
one after another, prompts of 8k and 16k tokens; streaming and not, to /generate and to OpenAI's routes, by several
clients that each follow a seeded random plan (`bench.soak.plan`); among it, bodies by which one client would hold up
the others (`bench.soak.hostile`). The rules are in `bench.soak.verdicts`; the exit code is 1 where one did not hold.
The time counts from the end of the warm-up, which writes to the whole cache once, starts all workers and sends every
kind of request. It is divided into cycles: at the end of each nothing more is begun until all has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.shared import options
from bench.shared.machine import describe_machine
from bench.shared.servers import http_client, own_server
from bench.shared.text import Library
from bench.soak import verdicts
from bench.soak.client import SoakClient
from bench.soak.hostile import GENERATE
from bench.soak.plan import (
    ABORTED_TOKENS,
    MANY_TOKENS,
    Task,
    TaskMaker,
    bad_tasks,
    hostile_tasks,
    long_task,
    long_tasks,
)
from bench.soak.report import Soaked, report
from bench.soak.watch import Sample, Watch

LEAST_SECONDS = 25.0
LEAST_LONGEST = max(ABORTED_TOKENS) + MANY_TOKENS
SPARE_TOKENS, BLOCK_SIZE = 256, 16  # of MAX_MODEL_LEN beside the longest prompt; of the cache
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
    _bad: list[Task] = field(init=False)

    def __post_init__(self) -> None:
        self.max_model_len = self._tokenize("Hello")["max_model_len"]
        self._library = Library(lambda text: self._tokenize(text)["tokens"])
        self._bad = bad_tasks(self.max_model_len)

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.client.key}"}

    def _tokenize(self, text: str) -> dict[str, Any]:
        body = {"prompt": text, "add_special_tokens": False}
        reply = httpx.post(f"{self.client.root}/tokenize", json=body, headers=self._headers, timeout=60.0)
        answer: dict[str, Any] = reply.raise_for_status().json()
        return answer

    async def warm_up(self) -> Sample:
        """Everything once, the whole cache written to; the server idle after that."""
        draw = random.Random(f"{self.asked.seed}, warm-up")
        maker = TaskMaker(self._library, self._bad, self.asked.seed, 0)
        long = [long_task(self._library, draw, n) for n in sorted(self.asked.long_tokens, reverse=True)]
        kinds = map(maker.task, ("short", "shared", "abort", "slow", "crowd"))
        for task in (*long, *self._bad, *hostile_tasks(), *kinds):
            await self._perform(task)
        await self._fill_workers()
        await self._fill_cache(draw)
        return await self.watch.settle()

    async def _fill_workers(self) -> None:
        """Long texts are tokenised by workers that start as they are needed, up to a limit, and then stay."""
        body = {"prompt": "word " * (min(POOL_CHARS, 4 * self.max_model_len) // 5)}
        async with http_client(self.client.root) as http:
            posts = (http.post("/tokenize", json=body, headers=self._headers) for _ in range(POOL_REQUESTS))
            for reply in await asyncio.gather(*posts):
                reply.raise_for_status()

    async def _fill_cache(self, draw: random.Random) -> None:
        """Prompts that share nothing until every block has been used, at most twice as many as it takes."""
        blocks = (await self.watch.look()).gauges.blocks
        for _ in range(2 * blocks * BLOCK_SIZE // FILL_TOKENS + 1):
            if (await self.watch.look()).gauges.cached_blocks >= 0.99 * blocks:
                return
            prompt = self._library.ids(draw, FILL_TOKENS)
            await self._perform(Task("fill", GENERATE, {"prompt": prompt, "max_tokens": 1}))

    async def traffic(self) -> list[Sample]:
        """All clients until the time is up, in cycles; the server at rest after each of them."""
        asked, began = self.asked, time.monotonic()
        makers = [TaskMaker(self._library, self._bad, asked.seed, number) for number in range(asked.clients)]
        plans = [(maker.mixed(), CLIENT_PAUSE_S) for maker in makers]
        plans.append((long_tasks(self._library, asked.long_tokens, asked.seed), asked.long_pause))
        pauses = [random.Random(f"{asked.seed}, pauses {number}") for number in range(len(plans))]
        floors = []
        for cycle in range(1, asked.cycles + 1):
            end = began + asked.seconds * cycle / asked.cycles
            clients = (self._follow(*plan, draw, end) for plan, draw in zip(plans, pauses, strict=True))
            await asyncio.gather(*clients)
            floors.append(await self.watch.settle())
            self.progress.update(self.progress.task_ids[0], completed=time.monotonic() - began)
        return floors

    async def _follow(self, tasks: Iterator[Task], pause: float, draw: random.Random, end: float) -> None:
        """One client until a cycle's end, and until what it began has ended."""
        while True:
            await asyncio.sleep(min(draw.expovariate(1 / pause), max(0.0, end - time.monotonic())))
            if time.monotonic() >= end:
                return
            await self._perform(next(tasks))

    async def _perform(self, task: Task) -> None:
        self.started += task.num_clients
        await asyncio.gather(*(self.client.perform(task) for _ in range(task.num_clients)))
        problems = sum(bool(outcome.problem) for outcome in self.client.outcomes)
        told = f"{len(self.client.outcomes)} requests, {problems} problems, {self.client.num_open} open"
        self.progress.update(self.progress.task_ids[0], description=told)


def flags(asked: argparse.Namespace, key: str) -> list[str]:
    """Of the server: a short queue and a small cache, so that both are full now and then."""
    settings = {"api-key": key, "max-model-len": max(asked.long_tokens) + SPARE_TOKENS, "max-num-seqs": 16}
    settings |= {"kv-cache-memory": asked.kv_cache_memory, "kv-block-size": BLOCK_SIZE, "max-queued-requests": 64}
    settings |= {"log-level": "warning", "log-format": "json"}
    settings |= {"model-id": asked.model_id} if asked.model_id else {}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


async def soak(asked: argparse.Namespace, progress: Progress) -> Soaked:
    about = describe_machine() | {name: getattr(asked, name) for name in ("seconds", "clients", "seed")}
    log, key = asked.out / "server.log", secrets.token_hex(8)
    async with own_server(flags(asked, key), log) as (root, process):
        client, watch = SoakClient(root, key), Watch(root, process)
        soaked = Soak(asked, client, watch, progress)
        before = await soaked.warm_up()
        num_before, begin = len(client.outcomes), watch.samples[-1].at
        async with watch.running():
            floors = await soaked.traffic()
        end = watch.samples[-1].at
        after = await watch.settle(before.resources)
    warm_up, outcomes = client.outcomes[:num_before], client.outcomes[num_before:]
    memory, line = verdicts.judge_memory(floors, before)
    judged = [
        verdicts.judge_blocks(after),
        *verdicts.judge_resources(before, after),
        *verdicts.judge_replies(client.outcomes, after, soaked.started),
        verdicts.judge_streams(outcomes),
        verdicts.judge_watch(watch.failures, sum(sample.at > begin for sample in watch.samples)),
        *memory,
        verdicts.judge_log(log),
    ]
    return Soaked(about, warm_up, outcomes, watch.samples, begin, end, judged, floors, line)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("soak", __doc__, "soak")
    add = parser.add_argument
    add("--minutes", type=float, default=20.0, help="of traffic after the warm-up")
    add("--cycles", type=options.count, default=12, help="of traffic, at whose ends memory is looked at")
    add("--model-id", metavar="MODEL", help="for the server that is started; without it the embedded model")
    add("--clients", type=options.count, default=5, help="beside the one that sends long prompts")
    add("--long-tokens", type=options.counts, default="8192,16384", metavar="N,N")
    add("--long-pause", type=float, default=20.0, metavar="S", help="mean pause between long prompts")
    add("--kv-cache-memory", default="640MiB", help="small, so that the warm-up writes to all of it")
    add("--seed", type=int, default=0, help="of the clients' plans")
    asked = parser.parse_args(arguments)
    asked.seconds = 60 * asked.minutes
    if asked.seconds < LEAST_SECONDS:
        parser.error(f"--minutes {asked.minutes:g}: at least {LEAST_SECONDS:g} s are needed to have every kind in them")
    if asked.cycles < verdicts.LEAST_FLOORS:
        parser.error(f"--cycles {asked.cycles}: at least {verdicts.LEAST_FLOORS} are needed to fit a slope to")
    if max(asked.long_tokens) < LEAST_LONGEST:
        parser.error(f"--long-tokens: the longest must have at least {LEAST_LONGEST} tokens, as aborted requests may")
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
