"""Statistics of a serving measurement, its dialects against a small real HTTP server, and its tables."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from rich.progress import Progress

from bench import BenchError
from bench.serving import __main__ as serving
from bench.serving.__main__ import Measurement, parse_arguments
from bench.serving.measure import FILLER, Point, PromptWriter, Run, run_figures, run_point, speedup, summarise
from bench.serving.report import Served, report
from bench.shared.machine import OthersMeter, listeners
from bench.shared.servers import Server, server_counter
from bench.shared.streams import Completion

POINT = Point(100, 2)


def completion(*times: float, started: float = 0.0) -> Completion:
    return Completion(started, times, 100)


def run_of(scale: float) -> Run:
    """Two streams of three tokens each."""
    first, second = (1.0, 2.0, 3.0), (2.0, 4.0, 6.0)
    return Run((completion(*(scale * t for t in first)), completion(*(scale * t for t in second))), 6.0 * scale)


def test_figures_of_a_round() -> None:
    figures = run_figures(run_of(1.0))
    assert figures is not None
    assert figures["ttft"] == 1.5
    assert figures["time_per_token"] == 1.5
    assert figures["gap_p50"] == 1.5
    assert figures["output_rate"] == 1.0
    assert figures["total_rate"] == pytest.approx(206 / 6)


def test_medians_leave_out_a_slow_round_and_a_failed_one() -> None:
    failed = Run((completion(0.1),), 1.0, ("StreamFailed: gone",))
    figures = summarise([run_of(1.0), run_of(50.0), run_of(1.2), failed])
    assert figures is not None
    assert figures["ttft"] == pytest.approx(1.8)
    assert summarise([failed]) is None


def test_one_token_has_no_time_per_token() -> None:
    figures = run_figures(Run((completion(1.0),), 1.0))
    assert figures is not None
    assert math.isnan(figures["time_per_token"])
    assert math.isnan(figures["gap_p99"])


def test_a_speedup_above_one_is_always_the_better() -> None:
    fast, slow = summarise([run_of(1.0)]), summarise([run_of(2.0)])
    assert fast is not None
    assert slow is not None
    assert speedup("ttft", fast, slow) == pytest.approx(2.0)
    assert speedup("output_rate", fast, slow) == pytest.approx(2.0)
    assert speedup("time_per_token", slow, fast) == pytest.approx(0.5)


def test_a_failed_point_is_shown_and_ratios_are_at_the_peers(tmp_path: Path) -> None:
    about = {"date": "2020-01-01", "cpu": "a cpu", "cores": 2, "output_tokens": 3, "rounds": 1, "alone": False}
    failed = Run((), 1.0, ("StreamFailed: HTTP 400: too long",))
    runs = {"ours": run_of(1.0), "peer": run_of(3.0), "absent": failed}
    served = Served(list(runs), [POINT], {(name, POINT): [run] for name, run in runs.items()}, about)
    assert served.row(POINT, "peer")[-3:] == ["3.00×"] * 3
    assert all(path.stat().st_size > 0 for path in report(served).save(tmp_path))
    text = (tmp_path / "serving.md").read_text()
    assert "The least: 3.00× peer" in text
    assert "Failed: absent at 100 × 2: StreamFailed: HTTP 400: too long" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://127.0.0.1"], "not NAME=VALUE"),
        (["--url", "a=http://x/v1", "--url", "a=http://y/v1"], "must differ"),
        (["--url", "a=http://x/v1", "--alone"], "needs a --launch for every server"),
        (["--url", "a=http://x/v1", "--launch", "b=true"], "no --url has that name"),
        (["--url", "a=http://x/v1", "--points", "128x0"], "not a list"),
        (["--url", "a=http://x/v1", "--rounds", "0"], "at least 1"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err


class StrictServer(BaseHTTPRequestHandler):
    """Answers like transformers serve: unknown fields are refused, a usage comes always, there is no /tokenize."""

    protocol_version = "HTTP/1.1"
    known = frozenset({"prompt", "max_tokens", "temperature", "stream", "generation_config", "model"})
    seen: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._answer(404, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            return self._answer(404, b"{}")
        if unknown := set(body) - self.known:
            return self._answer(422, json.dumps({"detail": f"Unexpected fields: {unknown}"}).encode())
        self.seen.append(body)
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": body["max_tokens"]}
        if not body["stream"]:
            return self._answer(200, json.dumps({"choices": [{"text": "a"}], "usage": usage}).encode())
        events = [{"choices": [{"text": "a"}]}] * body["max_tokens"] + [{"choices": [], "usage": usage}]
        return self._answer(200, b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def strict_url() -> Iterator[str]:
    handler = type("Handler", (StrictServer,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()
        thread.join()


def test_the_dialect_is_found_and_streams_are_timed(strict_url: str) -> None:
    async def scenario() -> tuple[str, Run]:
        async with httpx.AsyncClient(trust_env=False) as client:
            server = Server("strict", strict_url, client)
            await server.connect()
            with pytest.raises(BenchError, match="has no /tokenize"):
                server_counter(server)
            return server.dialect, await run_point(server, ["one two", "three"], 6)

    dialect, run = asyncio.run(scenario())
    assert dialect == "transformers"
    assert run.failures == ()
    assert [len(completion.token_times) for completion in run.completions] == [6, 6]
    assert [completion.prompt_tokens for completion in run.completions] == [2, 1]
    assert 0 < run.completions[0].ttft <= run.wall_s


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"

        async def scenario() -> None:
            async with httpx.AsyncClient(trust_env=False) as client:
                await Server("absent", url, client).connect()

        with pytest.raises(BenchError, match="absent at http"):
            asyncio.run(scenario())
        assert listeners(url) == []


def test_a_servers_own_work_is_not_a_neighbours(strict_url: str) -> None:
    processes = listeners(strict_url)
    assert [process.pid for process in processes] == [os.getpid()]
    before = psutil.cpu_times()
    meter = OthersMeter(processes)
    began, used = time.perf_counter(), time.process_time()
    while time.process_time() < used + 0.3:
        sum(range(100_000))
    after, elapsed = psutil.cpu_times(), time.perf_counter() - began
    busy = sum(after) - sum(before) - (after.idle - before.idle) - (after.iowait - before.iowait)
    assert meter.cores() <= (busy - 0.2) / elapsed


@pytest.mark.parametrize("num_tokens", [40, 700])
def test_a_prompt_has_exactly_the_wanted_tokens_and_a_beginning_of_its_own(num_tokens: int) -> None:
    def count(text: str) -> int:
        """A word of n characters takes ⌈n ÷ 4⌉ tokens."""
        return sum(-(-len(word) // 4) for word in text.split())

    writer = PromptWriter(count)
    prompts = [writer.write(num_tokens) for _ in range(5)]
    assert {count(prompt) for prompt in prompts} == {num_tokens}
    assert len({prompt[:12] for prompt in prompts}) == 5
    with pytest.raises(BenchError, match="too short"):
        writer.write(2)


@pytest.mark.parametrize("plain_words", [100, 500, 900])
def test_a_prompt_of_uneven_words_is_found_in_few_counts(plain_words: int) -> None:
    """From some word on each takes thirty tokens, so that tokens a word say little of what is missing."""
    num_counts = 0

    def count(text: str) -> int:
        nonlocal num_counts
        num_counts += 1
        words = text.replace(FILLER, "").split()
        return text.count(FILLER) + len(words) + 29 * max(0, len(words) - plain_words)

    assert count(PromptWriter(count).write(1024)) == 1024
    assert num_counts <= 24


def test_one_server_alive_at_a_time_only_the_first_counts_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --tokenizer the first server counts, and every server is sent what was written then."""
    alive: list[str] = []
    sent: dict[str, list[list[str]]] = defaultdict(list)

    @asynccontextmanager
    async def launched(server: Server, *_rest: object) -> AsyncIterator[None]:
        alive.append(server.name)
        yield
        alive.remove(server.name)

    def counter(server: Server) -> Any:
        def count(text: str) -> int:
            assert alive == [server.name]
            return len(text.split())

        return count

    async def run(server: Server, prompts: list[str], _tokens: int) -> Run:
        sent[server.name].append(prompts)
        return run_of(1.0)

    async def connect(_self: Server) -> None:
        return None

    for name, stub in (("launched", launched), ("server_counter", counter), ("run_point", run)):
        monkeypatch.setattr(serving, name, stub)
    monkeypatch.setattr(Server, "connect", connect)
    urls = [f"--url={name}=http://127.0.0.1:1/v1" for name in "ab"] + [f"--launch={name}=true" for name in "ab"]
    asked = parse_arguments([*urls, "--alone", "--points", "20x1,20x2", "--rounds", "2"])
    client = httpx.AsyncClient()
    servers = [Server(name, url, client, None, None) for name, url in asked.url]
    with Progress(disable=True) as progress:
        progress.add_task("starting")
        asyncio.run(Measurement(servers, asked, progress).take())
    assert sent["a"] == sent["b"]
    assert [len(prompts) for prompts in sent["a"]] == [1, 2, 1, 2] * 2
