"""Mixed traffic for a given time on loopback, and then: did anything leak, grow or go unanswered?

    python -m bench.soak --minutes 20

starts the server and sends it short prompts, shared prefixes, aborts at random times, slow readers, bad input and,
one after another, prompts of 8k and 16k tokens; streaming and not, to /generate and to OpenAI's routes, by several
clients that each follow a seeded random plan (`bench.soak_plan`). The rules are in `bench.soak_verdicts`; the exit
code is 1 where one did not hold, and its name is printed. The time counts from the end of the warm-up, which writes
to the whole cache once, fills the pool of threads and sends every kind of request.

`--url` soaks a server that runs already, and must be idle otherwise: without the checks of its process and its log.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import shlex
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import WIDTH
from bench.client import Server, ServerUnusable
from bench.launch import launched, wait_until_ready
from bench.machine import describe_machine
from bench.neighbours import listeners
from bench.serving import until_terminated
from bench.soak_bad import bad_tasks
from bench.soak_client import SoakClient
from bench.soak_options import parse_arguments
from bench.soak_plan import GENERATE, LongPlan, MixedPlan, Task, length_name, read_library
from bench.soak_report import SoakReport, print_report, save
from bench.soak_verdicts import (
    Trend,
    Verdict,
    judge_blocks,
    judge_log,
    judge_memory,
    judge_replies,
    judge_resources,
    judge_watch,
)
from bench.soak_watch import Sample, Watch

SPARE_TOKENS = 256  # of MAX_MODEL_LEN beside the longest prompt
MAX_NUM_SEQS, MAX_QUEUED_REQUESTS = 16, 64
POOL_REQUESTS, POOL_CHARS = 48, 200_000
FILL_TOKENS = 1000


@dataclass(slots=True)
class Soak:
    """One soak of one server: warm-up, traffic, judgement."""

    options: argparse.Namespace
    client: SoakClient
    watch: Watch
    progress: Progress
    max_model_len: int
    started: int = 0
    _mixed: list[MixedPlan] = field(default_factory=list)
    _long: LongPlan | None = None

    def plan(self) -> None:
        """Write the clients' plans. Needs the server, whose tokenizer cuts the prompts."""
        options = self.options
        library = read_library(lambda text: _tokenize(self.client, text)["tokens"])
        bad = bad_tasks(self.max_model_len, keyed=self.client.key is not None)
        self._mixed = [MixedPlan(library, bad, options.seed, number) for number in range(options.clients)]
        self._long = LongPlan(library, options.long_tokens, options.seed, options.long_pause)

    async def warm_up(self) -> Sample:
        """Everything once, the whole cache written to; the server idle after that."""
        assert self._long is not None
        mixed, long = self._mixed[0], self._long
        for num_tokens in sorted(self.options.long_tokens, reverse=True):
            self._say(f"warm-up: {length_name(num_tokens)} tokens")
            await self._perform(long.task(num_tokens))
        self._say("warm-up: every kind of request")
        for task in (*mixed.bad, *(mixed.task(kind) for kind in ("short", "shared", "abort", "slow", "crowd"))):
            await self._perform(task)
        await self._fill_thread_pool()
        await self._fill_cache(random.Random(f"{self.options.seed}, filling"))
        return await self.watch.settle()

    async def _fill_thread_pool(self) -> None:
        """Long texts are tokenised on threads that start as they are needed, up to a limit, and then stay."""
        body = {"prompt": "word " * (min(POOL_CHARS, 4 * self.max_model_len) // 5)}
        headers = {"Authorization": f"Bearer {self.client.key}"} if self.client.key else {}
        posts = (self.client.http.post("/tokenize", json=body, headers=headers) for _ in range(POOL_REQUESTS))
        for reply in await asyncio.gather(*posts):
            reply.raise_for_status()

    async def _fill_cache(self, draw: random.Random) -> None:
        """Prompts that share nothing until every block has been used, at most twice as many as it takes."""
        assert self._long is not None
        gauges = (await self.watch.look()).gauges
        for _ in range(2 * gauges.blocks * self.options.block_size // FILL_TOKENS + 1):
            gauges = (await self.watch.look()).gauges
            if self.options.url is not None or gauges.cached_blocks >= 0.99 * gauges.blocks:
                return
            self._say(f"warm-up: cache {gauges.cached_blocks / gauges.blocks:.0%} written to")
            prompt = self._long.library.ids(draw, FILL_TOKENS)
            await self._perform(Task("fill", GENERATE, {"prompt": prompt, "max_tokens": 1}))

    async def traffic(self) -> None:
        """All clients until the time is up, and until what they began has ended."""
        assert self._long is not None
        self._say("traffic")
        end = time.monotonic() + self.options.seconds
        plans: list[MixedPlan | LongPlan] = [*self._mixed, *([self._long] if self.options.long_tokens else [])]
        await asyncio.gather(self._show(end), *(self._follow(plan.pause, plan.next, end) for plan in plans))

    async def _follow(self, pause: Callable[[], float], following: Callable[[], Task], end: float) -> None:
        while True:
            await asyncio.sleep(min(pause(), max(0.0, end - time.monotonic())))
            if time.monotonic() >= end:
                return
            await self._perform(following())

    async def _perform(self, task: Task) -> None:
        self.started += task.num_clients
        await asyncio.gather(*(self.client.perform(task) for _ in range(task.num_clients)))

    async def _show(self, end: float) -> None:
        began = time.monotonic()
        while (now := time.monotonic()) < end:
            rss = self.watch.samples[-1].rss if self.watch.samples else None
            memory = f", {rss / 2**20:,.0f} MiB" if rss is not None else ""
            problems = sum(bool(outcome.problem) for outcome in self.client.outcomes)
            self._say(
                f"{len(self.client.outcomes)} requests, {problems} problems, {self.client.num_open} open{memory}",
                completed=now - began,
            )
            await asyncio.sleep(1.0)
        self._say("waiting for what was begun", completed=self.options.seconds)

    def _say(self, text: str, completed: float | None = None) -> None:
        task = self.progress.task_ids[0]
        if not self.progress.console.is_terminal and not text[:1].isdigit():
            self.progress.console.print(f"[dim]{text}[/]", highlight=False)
        self.progress.update(task, description=text, completed=completed)


def _tokenize(client: SoakClient, text: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {client.key}"} if client.key else {}
    body = {"prompt": text, "add_special_tokens": False}
    reply = httpx.post(f"{client.root}/tokenize", json=body, headers=headers, timeout=60.0)
    answer: dict[str, Any] = reply.raise_for_status().json()
    return answer


@contextlib.asynccontextmanager
async def serving(options: argparse.Namespace, log: Path) -> AsyncIterator[tuple[str, str | None]]:
    """(root, key) of the server to soak, ready; started and stopped here unless there is a --url."""
    if options.url is not None:
        async with httpx.AsyncClient(trust_env=False) as http:
            await wait_until_ready(Server("server", f"{options.url}/v1", http), options.ready_timeout)
        yield options.url, options.api_key
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    root, key = f"http://127.0.0.1:{port}", secrets.token_hex(8)
    command = [
        *(sys.executable, "-m", "prerope.server", "--port", str(port), "--api-key", key),
        *(
            "--max-model-len",
            str(max(options.long_tokens) + SPARE_TOKENS),
            "--kv-cache-memory",
            options.kv_cache_memory,
        ),
        *("--kv-block-size", str(options.block_size)),
        *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-queued-requests", str(MAX_QUEUED_REQUESTS)),
        *("--log-level", "warning", "--log-format", "json"),
        *(("--model-id", options.model_id) if options.model_id else ()),
    ]
    async with httpx.AsyncClient(trust_env=False) as http:
        server = Server("server", f"{root}/v1", http)
        async with launched(server, shlex.join(command), log, options.ready_timeout):
            yield root, key


def errors_in(log: Path) -> list[str]:
    """Lines of a JSON log that are errors, and lines that are no JSON, as a traceback's are."""
    found = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            found.append(line[:200])
            continue
        if entry.get("level") in ("error", "critical"):
            found.append(f"{entry.get('event')} {entry.get('exception', '')}"[:200])
    return found


async def run(options: argparse.Namespace, console: Console) -> SoakReport:
    """The whole soak. Raises ServerUnusable."""
    about = describe_machine() | {"seconds": options.seconds, "clients": options.clients, "seed": options.seed}
    log = options.out / "prerope.server.log"
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task("starting the server", total=options.seconds)
        async with serving(options, log) as (root, key):
            found = listeners(root) if options.url is None else []
            client = SoakClient(root, key, options.patience)
            watch = Watch(root, found[0] if found else None)
            try:
                soak = Soak(options, client, watch, progress, _tokenize(client, "Hello")["max_model_len"])
                soak.plan()
                before = await soak.warm_up()
                num_before, begin = len(client.outcomes), watch.samples[-1].at
                async with watch.running():
                    await soak.traffic()
                end = watch.samples[-1].at
                after = await watch.settle(before.resources)
            finally:
                await client.http.aclose()
    warm_up, outcomes = client.outcomes[:num_before], client.outcomes[num_before:]
    under_traffic = [sample for sample in watch.samples if begin < sample.at <= min(end, begin + options.seconds)]
    verdicts, line = judge(soak, before, after, under_traffic, None if options.url is not None else log)
    return SoakReport(about, warm_up, outcomes, watch.samples, begin, end, verdicts, line)


def judge(
    soak: Soak, before: Sample, after: Sample, under_traffic: Sequence[Sample], log: Path | None
) -> tuple[list[Verdict], Trend | None]:
    """Every rule; those of the process and its log where there is a log, that is, where the server was started here."""
    verdicts = [
        judge_blocks(after),
        *judge_resources(before, after),
        *judge_replies(soak.client.outcomes, after, soak.started),
        judge_watch(soak.watch.failures, len(under_traffic)),
    ]
    if log is None:
        return verdicts, None
    memory, line = judge_memory(under_traffic, before, after)
    return [*verdicts, memory, judge_log(errors_in(log))], line


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(__doc__, arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        report = asyncio.run(until_terminated(run(options, console)))
    except ServerUnusable as error:
        print(f"bench.soak: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("bench.soak: interrupted, nothing written", file=sys.stderr)
        return 130
    print_report(report, console)
    for path in save(report, options.out):
        console.print(f"wrote {os.path.relpath(path)}", highlight=False)
    return 0 if report.held else 1


if __name__ == "__main__":
    sys.exit(main())
