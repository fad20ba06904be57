"""Start-up and memory of the server as a user starts it: a fresh process each round, by its own log lines.

    python -m bench.startup --rounds 5
    python -m bench.startup -- --model-id MODEL --kv-cache-memory 1GiB     (settings of the server)

Seconds from the start of the process until each milestone: a line of its log, then /ready, polled once the probe has
passed, then the first token of a prompt of 128 tokens, streamed. The first start, which reads files that the page cache
does not hold, is left out unless --cold. Memory is that of the whole process when it is ready and after that request;
`--fill` then writes to the whole cache, with prompts that share nothing, which on a CPU is for small caches only.

RSS has pages that other processes share, such as torch's libraries and weights read through a mapping; USS has not, so
it depends on which other programs run. "Private" is what is backed by no file, whoever runs.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from tqdm import tqdm

from bench import OUTPUT_FOLDER, WIDTH
from bench.machine import describe_machine
from bench.report import publish
from bench.startup_report import FIRST_TOKEN, Memory, Start, StartupReport, save
from bench.streams import read_completion

MILESTONES = {
    "imports": re.compile(r"Loading the tokenizer"),
    "tokenizer, kernels": re.compile(r"\bloading "),
    "weights": re.compile(r"\binspecting "),
    "inspection": re.compile(r"checking the model against"),
    "probe": re.compile(r"the check passed"),
}
"""What has just ended → the line that tells so, in order."""
READY = "cache, /ready"
CACHE_LINE = re.compile(r"cache of (\d+) tokens, ([\d.]+) GiB")
PROMPT_TOKENS, FILL_TOKENS = 128, 1000
POLL_S, STOP_S = 0.005, 30.0
TOKEN_IDS = range(100, 1000)  # plain tokens of any vocabulary


class StartFailed(Exception):
    """The server did not get as far as its first token; the message has the end of its log."""


@dataclass(slots=True)
class Log:
    """Lines of a process with the second they came at, since `began`."""

    began: float
    lines: list[tuple[float, str]] = field(default_factory=list)
    ended: bool = False
    _news: threading.Condition = field(default_factory=threading.Condition)

    def read(self, lines: Iterator[str]) -> None:
        """Until there are no more; on a thread of its own, so that a line's time is when it came."""
        for line in lines:
            with self._news:
                self.lines.append((time.perf_counter() - self.began, line.rstrip()))
                self._news.notify_all()
        with self._news:
            self.ended = True
            self._news.notify_all()

    def wait_for(self, pattern: re.Pattern[str], timeout_s: float) -> float:
        """When the first line with `pattern` came. StartFailed where none does."""
        with self._news:
            self._news.wait_for(lambda: self.ended or self.find(pattern) is not None, timeout_s)
            found = self.find(pattern)
        if found is None:
            how = "ended" if self.ended else f"was silent for {timeout_s:g} s"
            raise StartFailed("\n".join([f"the server {how} before {pattern.pattern!r}:", *self.tail()]))
        return found[0]

    def find(self, pattern: re.Pattern[str]) -> tuple[float, re.Match[str]] | None:
        matches = ((at, match) for at, line in self.lines if (match := pattern.search(line)))
        return next(matches, None)

    def tail(self) -> list[str]:
        return [line for _, line in self.lines[-15:]]


@contextlib.contextmanager
def started(port: int, settings: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], Log]]:
    """A server in a process of its own until the block ends."""
    command = [sys.executable, "-m", "prerope.server", *settings, "--port", str(port), "--log-format", "text"]
    log = Log(time.perf_counter())
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=log.read, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            yield process, log
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
            reader.join()


def run_once(settings: Sequence[str], timeout_s: float, *, fill: bool = False) -> Start:
    """One start, measured."""
    port = _free_port()
    with started(port, settings) as (process, log), httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        client.timeout = httpx.Timeout(timeout_s)
        at = {name: log.wait_for(pattern, timeout_s) for name, pattern in MILESTONES.items()}
        while not client.get("/ready").is_success:
            if process.poll() is not None:
                raise StartFailed("\n".join(["the server ended before /ready:", *log.tail()]))
            time.sleep(POLL_S)
        at[READY] = time.perf_counter() - log.began
        cache = log.find(CACHE_LINE)
        assert cache is not None, "the server tells the size of its cache before it is ready"
        watched = psutil.Process(process.pid)
        memory = {"ready": _memory(watched)}
        at[FIRST_TOKEN] = first_token(client, PROMPT_TOKENS) - log.began
        memory["after a request"] = _memory(watched)
        again = time.perf_counter()
        second = first_token(client, PROMPT_TOKENS) - again
        if fill:
            for _ in range(-(-int(cache[1][1]) // FILL_TOKENS)):
                first_token(client, FILL_TOKENS)
            memory["cache written to"] = _memory(watched)
        return Start(at, second, memory, round(float(cache[1][2]) * 2**30))


def first_token(client: httpx.Client, prompt_tokens: int) -> float:
    """When the first token of a prompt of random tokens arrived, on perf_counter's clock."""
    draw = random.Random(secrets.randbits(64))  # no prefix is shared, so none is found in the cache
    prompt = draw.choices(TOKEN_IDS, k=prompt_tokens)
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    chunks: list[tuple[float, bytes]] = []
    began = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as reply:
        if reply.is_error:
            raise StartFailed(f"HTTP {reply.status_code}: {reply.read()[:300].decode(errors='replace')}")
        chunks.extend((time.perf_counter(), chunk) for chunk in reply.iter_raw())
    return read_completion(began, chunks).token_times[0]


def _memory(process: psutil.Process) -> Memory:
    found = process.memory_full_info()
    return Memory(found.rss, found.uss, found.rss - found.shared)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def weight_bytes(settings: Sequence[str]) -> tuple[str, int | None]:
    """(the model's name, bytes of its safetensors); None for those of a hub id."""
    from prerope.server.flags import load_settings
    from prerope.server.models.checkpoint import resolve_checkpoint

    found = load_settings(settings)
    checkpoint = resolve_checkpoint(found.model_id, found.revision, lambda _: None, cache_dir=found.cache_dir)
    files = list(Path(checkpoint.source).glob("*.safetensors")) if Path(checkpoint.source).is_dir() else []
    return checkpoint.name, sum(file.stat().st_size for file in files) or None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="starts that count; default: 5")
    add("--cold", action="store_true", help="count the first start too, whose files may not be in memory yet")
    add("--fill", action="store_true", help="write to the whole cache in the last round, and measure memory again")
    add("--timeout", type=float, default=300, help="seconds without a sign of life; default: 300")
    add("--out", type=Path, default=OUTPUT_FOLDER, help="folder for JSON, markdown and plot; default: bench/out")
    add("settings", nargs="*", metavar="-- --FLAG VALUE", help="settings of the server")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    about = describe_machine()
    about["model"], about["weight_bytes"] = weight_bytes(options.settings)
    left_out = 0 if options.cold else 1
    total = left_out + options.rounds
    starts = []
    try:
        for number in tqdm(range(total), unit=" starts"):
            fill = options.fill and number == total - 1
            starts.append(run_once(options.settings, options.timeout, fill=fill))
    except StartFailed as error:
        print(f"bench.startup: {error}", file=sys.stderr)
        return 1
    report = StartupReport(starts[left_out:], about)
    publish(report, save, options.out, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
