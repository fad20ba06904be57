"""TTFT, time per token and throughput of OpenAI-compatible servers, side by side in one run.

    python -m bench.serving --url ours=http://127.0.0.1:8000/v1 --url peer=http://127.0.0.1:8001/v1

Every round measures every point (prompt length × streams at once) at one server after the other, with the same
prompts, so that a machine that slows down slows them all. Only one has requests at a time: fair as long as an idle
server takes no CPU. What others use of the machine during a run, an idle server among them, is measured and told.
`--launch NAME=COMMAND` starts a server from here; with `--alone` each is started for its turn and stopped after it, so
that nothing else holds memory or cores: the fairest on a small machine, and the slowest.

Prompts are English, of exactly the wanted number of tokens, and each begins differently: prefix caches stay cold.
Every request asks for the same number of tokens and to ignore the end of sequence, in the server's own dialect.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.serving.measure import Point, PromptWriter, Run, run_point
from bench.serving.report import Served, one_line, report
from bench.shared import options
from bench.shared.machine import describe_machine
from bench.shared.servers import Server, http_client, launched, local_counter, server_counter

WARM_UP = -1
"""In place of a round's number."""


@dataclass(slots=True)
class Measurement:
    """Takes rounds and keeps every run. Prompts of a round are written once and sent to every server."""

    servers: Sequence[Server]
    asked: argparse.Namespace
    progress: Progress
    runs: dict[tuple[str, Point], list[Run]] = field(default_factory=lambda: defaultdict(list))
    _writer: PromptWriter | None = None
    _prompts: dict[tuple[int, Point], list[str]] = field(default_factory=dict)

    async def take(self) -> None:
        """Each round goes through the servers, and through the points at each."""
        async with AsyncExitStack() as throughout:
            for number in range(self.asked.rounds):
                for server in self.servers:
                    async with AsyncExitStack() as turn:
                        if self.asked.alone or number == 0:
                            stack = turn if self.asked.alone else throughout
                            await stack.enter_async_context(self._alive(server))
                        for point in self.asked.points:
                            await self._measure(server, number, point)

    @contextlib.asynccontextmanager
    async def _alive(self, server: Server) -> AsyncIterator[None]:
        """A server within a block: launched if there is a command for it, ready, connected and warm."""
        asked, command = self.asked, dict(self.asked.launch).get(server.name)
        self.progress.update(self.progress.task_ids[0], description=f"starting {server.name}")
        async with AsyncExitStack() as stack:
            if command is None:
                await server.ready(asked.ready_timeout)
            else:
                log = asked.out / f"{server.name}.log"
                await stack.enter_async_context(launched(server, command, log, asked.ready_timeout))
            await server.connect()
            if self._writer is None:
                count = local_counter(asked.tokenizer) if asked.tokenizer else server_counter(server)
                self._writer = PromptWriter(count, asked.seed)
            # Requests that do not count, until every shape of work has been seen.
            for num_streams in sorted({point.num_streams for point in asked.points}):
                point = Point(min(point.prompt_tokens for point in asked.points), num_streams)
                await run_point(server, self._prompts_of(WARM_UP, point), min(8, asked.output_tokens))
            yield

    async def _measure(self, server: Server, number: int, point: Point) -> None:
        self.progress.update(self.progress.task_ids[0], description=f"{server.name}, {point.label}")
        run = await run_point(server, self._prompts_of(number, point), self.asked.output_tokens)
        self.runs[server.name, point].append(run)
        self.progress.console.print(one_line(server.name, point, run))
        self.progress.advance(self.progress.task_ids[0])

    def _prompts_of(self, number: int, point: Point) -> list[str]:
        """Those of a round, written when the first server asks for them: later the one that counts may not be alive."""
        if (number, point) not in self._prompts:
            assert self._writer is not None, "a server comes alive first"
            self._prompts[number, point] = [self._writer.write(point.prompt_tokens) for _ in range(point.num_streams)]
        return self._prompts[number, point]


async def measure(asked: argparse.Namespace, progress: Progress) -> Served:
    async with http_client(timeout=asked.timeout) as client:
        servers = [Server(name, url.rstrip("/"), client) for name, url in asked.url]
        told = ("rounds", "alone", "output_tokens", "seed")
        about = describe_machine() | {name: getattr(asked, name) for name in told}
        progress.add_task("starting", total=asked.rounds * len(asked.points) * len(servers))
        measurement = Measurement(servers, asked, progress)
        await measurement.take()
        about["dialects"] = {server.name: server.dialect for server in servers}
        return Served([server.name for server in servers], asked.points, dict(measurement.runs), about)


def points(text: str) -> list[Point]:
    """TOKENSxSTREAMS, separated by commas."""
    try:
        return [Point(*map(options.count, part.split("x"))) for part in text.split(",")]
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 128x8,7000x1") from None


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("serving", __doc__)
    add = parser.add_argument
    add("--url", type=options.named, action="append", required=True, metavar="NAME=URL",
        help="a server, up to and including /v1; the first is compared with every other")  # fmt: skip
    add("--launch", type=options.named, action="append", default=[], metavar="NAME=COMMAND", help="start it from here")
    add("--alone", action="store_true", help="one server alive at a time (every server needs --launch)")
    add("--points", type=points, metavar="NxM,NxM", default="128x1,128x8,2048x1,2048x8,7000x1,7000x8",
        help="tokens of a prompt x streams at once")  # fmt: skip
    add("--output-tokens", type=options.count, default=64, help="tokens generated a request")
    add("--rounds", type=options.count, default=3, help="figures are medians of these")
    add("--tokenizer", metavar="FOLDER", help="a model folder to count with; without it the first server's /tokenize")
    add("--seed", type=int, default=0, help="where in the text prompts begin")
    add("--timeout", type=float, default=900.0, help="seconds a stream may be silent")
    add("--ready-timeout", type=float, default=300.0, help="seconds a server may take to start")
    asked = parser.parse_args(arguments)
    names, launched_here = [name for name, _ in asked.url], dict(asked.launch)
    if len(set(names)) < len(names):
        parser.error(f"--url: the names must differ, not {', '.join(names)}")
    if unknown := launched_here.keys() - set(names):
        parser.error(f"--launch {', '.join(unknown)}: no --url has that name; only {', '.join(names)}")
    if asked.alone and (missing := [name for name in names if name not in launched_here]):
        parser.error(f"--alone needs a --launch for every server; there is none for {', '.join(missing)}")
    return asked


def main(arguments: Sequence[str] | None) -> int:
    asked, console = parse_arguments(arguments), options.console()
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=console) as progress:
        served = asyncio.run(measure(asked, progress))
    report(served).publish(asked.out, console)
    return 0


if __name__ == "__main__":
    options.run("serving", main)
