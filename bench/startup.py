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

import contextlib
import random
import re
import secrets
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
from tqdm import tqdm

from bench import BenchError
from bench.shared import options
from bench.shared.machine import describe_machine
from bench.shared.report import Report, Table
from bench.shared.servers import free_port
from bench.shared.streams import read_completion

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


FIRST_TOKEN = "first token"


class StartFailed(BenchError):
    """The server did not get as far as its first token; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process. `private`: of `rss`, what no file backs."""

    rss: int
    uss: int
    private: int


@dataclass(frozen=True, slots=True)
class Start:
    """One start: milestone → second at which it was reached, in order; memory by the moment it was looked at.

    second_ttft: seconds to the first token of the next request, when everything has run once.
    """

    at: Mapping[str, float]
    second_ttft: float
    memory: Mapping[str, Memory]
    cache_bytes: int

    def phases(self) -> dict[str, float]:
        """Seconds that each milestone took after the one before it."""
        times = pairwise([0.0, *self.at.values()])
        return {name: until - since for name, (since, until) in zip(self.at, times, strict=True)}


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
    port = free_port()
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


def weight_bytes(settings: Sequence[str]) -> tuple[str, int | None]:
    """(the model's name, bytes of its safetensors); None for those of a hub id."""
    from prerope.server.flags import load_settings
    from prerope.server.models.checkpoint import resolve_checkpoint

    found = load_settings(settings)
    checkpoint = resolve_checkpoint(found.model_id, found.revision, lambda _: None, cache_dir=found.cache_dir)
    files = list(Path(checkpoint.source).glob("*.safetensors")) if Path(checkpoint.source).is_dir() else []
    return checkpoint.name, sum(file.stat().st_size for file in files) or None


@dataclass(frozen=True, slots=True)
class Startup:
    """Medians over the starts."""

    starts: Sequence[Start]
    about: Mapping[str, Any]

    def phase(self, name: str) -> float:
        return statistics.median(start.phases()[name] for start in self.starts)

    def reached(self, name: str) -> list[float]:
        """Seconds since the process began, of each start."""
        return [start.at[name] for start in self.starts]

    def memory(self, moment: str) -> Memory:
        """Medians; of the starts that have this moment."""
        found = [start.memory[moment] for start in self.starts if moment in start.memory]
        return Memory(*(round(statistics.median(getattr(m, name) for m in found)) for name in Memory.__slots__))

    def moments(self) -> list[str]:
        return list(dict.fromkeys(moment for start in self.starts for moment in start.memory))

    def row(self, name: str) -> list[str]:
        at = self.reached(name)
        return [name, f"{self.phase(name):.2f}", f"{statistics.median(at):.2f}", f"{min(at):.2f}–{max(at):.2f}"]

    def notes(self) -> list[str]:
        about, starts = self.about, self.starts
        again = statistics.median(start.second_ttft for start in starts)
        weights = about["weight_bytes"]
        held = f"weights {_mib(weights)}, " if weights else ""
        seen = "; ".join(f"{moment} {self._memory_note(moment)}" for moment in self.moments())
        return [
            f"{about['model']}: medians of {len(starts)} start{'s'[: len(starts) != 1]}, seconds since the process "
            f"began, the prompt of 128 tokens sent as soon as /ready answers; the next such prompt has its first token "
            f"after {again:.2f} s. {about['date']} on {about['cpu']}, {about['cores']} cores.",
            f"Memory: {held}cache {_mib(starts[0].cache_bytes)}, which takes memory as it is written to. {seen}.",
        ]

    def _memory_note(self, moment: str) -> str:
        found = self.memory(moment)
        return f"{_mib(found.rss)} resident (private {_mib(found.private)}, USS {_mib(found.uss)})"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def report(found: Startup) -> Report:
    rows = [found.row(name) for name in found.starts[0].at]
    table = Table(["until", "took, s", "at, s", "range, s"], rows, found.notes())
    return Report("startup", [table], asdict(found), lambda figure: draw(found, figure))


def draw(found: Startup, figure: Any) -> None:
    """A bar of the phases, by their medians."""
    figure.set_size_inches(9, 2)
    panel, left = figure.subplots(), 0.0
    for name in found.starts[0].at:
        took = found.phase(name)
        panel.barh(0, took, left=left, label=f"{name}, {took:.2f} s")
        left += took
    panel.set_yticks([])
    panel.set(
        xlabel="seconds since the process began", title=f"{found.about['model']}: from the start to the first token"
    )
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1.1), fontsize=8)


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("startup", __doc__)
    add = parser.add_argument
    add("--rounds", type=options.count, default=5, help="starts that count")
    add("--cold", action="store_true", help="count the first start too, whose files may not be in memory yet")
    add("--fill", action="store_true", help="write to the whole cache in the last round, and measure memory again")
    add("--timeout", type=float, default=300, help="seconds without a sign of life")
    add("settings", nargs="*", metavar="-- --FLAG VALUE", help="settings of the server")
    asked, console = parser.parse_args(arguments), options.console()
    about = describe_machine()
    about["model"], about["weight_bytes"] = weight_bytes(asked.settings)
    left_out = 0 if asked.cold else 1
    total = left_out + asked.rounds
    starts = []
    for number in tqdm(range(total), unit=" starts"):
        starts.append(run_once(asked.settings, asked.timeout, fill=asked.fill and number == total - 1))
    report(Startup(starts[left_out:], about)).publish(asked.out, console)
    return 0


if __name__ == "__main__":
    options.run("startup", main)
