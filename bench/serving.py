"""TTFT, time per token and throughput of OpenAI-compatible servers, side by side in one run.

    python -m bench.serving --url ours=http://127.0.0.1:8000/v1 --url peer=http://127.0.0.1:8001/v1

Every round measures every point (prompt length × streams at once) at one server after the other, with the same
prompts, so that a machine that slows down slows them all. By default all servers are alive throughout and only one
has requests at a time: fair as long as an idle server takes no CPU. What others use of the machine during a run, an
idle server among them, is measured and told; `--patience` waits for quiet and repeats disturbed runs. `--launch
NAME=COMMAND` starts a server from here; with `--alone` each is started for its turn and stopped after it, so that
nothing else holds memory or cores: the fairest on a small machine, and the slowest.

Prompts are English, of exactly the wanted number of tokens, and each begins differently: prefix caches stay cold.
Every request asks for the same number of tokens and to ignore the end of sequence, in the server's own dialect.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import WIDTH
from bench.client import Server, ServerUnusable
from bench.counting import TokenCounter, local_counter, server_counter
from bench.launch import launched, wait_until_ready
from bench.machine import describe_machine
from bench.measure import Point, Run, run_point, undisturbed_run
from bench.prompts import PromptWriter
from bench.serving_options import parse_arguments
from bench.serving_report import Report, one_line, print_table, save

Result = TypeVar("Result")


@dataclass(slots=True)
class Measurement:
    """Takes rounds and keeps every run. Prompts of a round are written once and sent to every server."""

    servers: Sequence[Server]
    points: Sequence[Point]
    options: argparse.Namespace
    progress: Progress
    runs: dict[tuple[str, Point], list[Run]] = field(default_factory=lambda: defaultdict(list))
    _writer: PromptWriter | None = None
    _counter: TokenCounter | None = None
    _prompts: dict[tuple[int, int, Point], list[str]] = field(default_factory=dict)

    async def interleaved(self) -> None:
        """All servers alive; each round goes through the points, and through the servers at each."""
        async with AsyncExitStack() as stack:
            for server in self.servers:
                await stack.enter_async_context(self._alive(server))
            for number in range(self.options.rounds):
                for point in self.points:
                    # Whoever goes first meets the machine as the pause left it: take turns.
                    turn = number % len(self.servers)
                    for server in [*self.servers[turn:], *self.servers[:turn]]:
                        await self._measure(server, number, point)

    async def alone(self) -> None:
        """One server alive at a time; each round starts each server once and takes all points."""
        for number in range(self.options.rounds):
            for server in self.servers:
                async with self._alive(server):
                    for point in self.points:
                        await self._measure(server, number, point)

    def _alive(self, server: Server) -> AsyncExitStack:
        return _Alive(self, server)

    async def warm_up(self, server: Server) -> None:
        """Requests that do not count, until every shape of work has been seen: both extremes of every setting."""
        await server.connect()
        if self._counter is None:
            self._counter = local_counter(self.options.tokenizer) if self.options.tokenizer else server_counter(server)
        streams = {min(point.num_streams for point in self.points), max(point.num_streams for point in self.points)}
        for num_streams in sorted(streams):
            point = Point(min(point.prompt_tokens for point in self.points), num_streams)
            await run_point(server, self._write(point), min(8, self.options.output_tokens))

    async def _measure(self, server: Server, number: int, point: Point) -> None:
        self.progress.update(self.progress.task_ids[0], description=f"{server.name}, {point.label}")
        run = await undisturbed_run(
            server,
            lambda attempt: self._prompts_of(number, attempt, point),
            self.options.output_tokens,
            self.options.patience,
        )
        self.runs[server.name, point].append(run)
        self.progress.console.print(one_line(server.name, point, run), highlight=False)
        self.progress.advance(self.progress.task_ids[0])

    def _prompts_of(self, number: int, attempt: int, point: Point) -> list[str]:
        """The same for every server that gets to this round's n-th attempt at the point; written when first asked."""
        key = (number, attempt, point)
        if key not in self._prompts:
            self._prompts[key] = self._write(point)
        return self._prompts[key]

    def _write(self, point: Point) -> list[str]:
        assert self._counter is not None, "warm_up comes first"
        if self._writer is None:
            self._writer = PromptWriter(self._counter.count, self.options.seed)
        tolerance = int(self._counter.tolerance * point.prompt_tokens)
        return [self._writer.write(point.prompt_tokens, tolerance) for _ in range(point.num_streams)]

    @property
    def counted_by(self) -> str:
        return self._counter.source if self._counter else "nobody"


class _Alive(AsyncExitStack):
    """A server within a block: launched if there is a command for it, ready, connected and warm."""

    def __init__(self, measurement: Measurement, server: Server) -> None:
        super().__init__()
        self._measurement, self._server = measurement, server

    async def __aenter__(self) -> _Alive:
        await super().__aenter__()
        options, server = self._measurement.options, self._server
        self._measurement.progress.update(self._measurement.progress.task_ids[0], description=f"starting {server.name}")
        command = dict(options.launch).get(server.name)
        log = options.out / f"{server.name}.log"
        try:
            if command is None:
                await wait_until_ready(server, options.ready_timeout)
            else:
                await self.enter_async_context(launched(server, command, log, options.ready_timeout))
            await self._measurement.warm_up(server)
        except BaseException:
            await self.aclose()
            raise
        return self


async def until_terminated(work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work`; SIGTERM cancels it, as Ctrl-C does, so that no launched server is left behind."""
    task = asyncio.ensure_future(work)
    with contextlib.suppress(NotImplementedError):  # no signal handlers on this system's event loop
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


async def measure(options: argparse.Namespace, console: Console) -> Report:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    timeout = httpx.Timeout(options.timeout, connect=10.0)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # a fresh connection for every request
    async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as client:
        models, keys = dict(options.model), dict(options.api_key)
        servers = [Server(name, url.rstrip("/"), client, models.get(name), keys.get(name)) for name, url in options.url]
        about = describe_machine() | {
            "rounds": options.rounds,
            "alone": options.alone,
            "output_tokens": options.output_tokens,
            "seed": options.seed,
        }
        with Progress(*columns, console=console) as progress:
            progress.add_task("starting", total=options.rounds * len(options.points) * len(servers))
            measurement = Measurement(servers, options.points, options, progress)
            await (measurement.alone() if options.alone else measurement.interleaved())
        about["dialects"] = {server.name: server.dialect for server in servers}
        about["prompts_counted_by"] = measurement.counted_by
        return Report([server.name for server in servers], options.points, dict(measurement.runs), about)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(__doc__, arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        report = asyncio.run(until_terminated(measure(options, console)))
    except ServerUnusable as error:
        print(f"bench.serving: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("bench.serving: interrupted, nothing written", file=sys.stderr)
        return 130
    print_table(report, console)
    for path in save(report, options.out):
        console.print(f"wrote {os.path.relpath(path)}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
