"""Start-up and memory of the server as a user starts it: a fresh process each round, by its own log lines.

    python -m bench.startup --rounds 5
    python -m bench.startup -- --model-id MODEL --kv-cache-memory 1GiB     (settings of the server)

Seconds from the start of the process until each milestone: a line of its log, the last of which says that /ready
answers, then the first token of a prompt of 128 tokens, streamed. The first start, which reads files that the page
cache does not hold, is left out. Memory is that of the whole process when it is ready and after that request.

RSS has pages that other processes share, such as torch's libraries and weights read through a mapping; USS has not, so
it depends on which other programs run. "Private" is what is backed by no file, whoever runs.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import random
import re
import secrets
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from bench import BenchError
from bench.shared import options
from bench.shared.machine import describe_machine
from bench.shared.report import Report, Table, counted
from bench.shared.servers import Server, http_client, own_server, tail

MILESTONES = {
    "imports": re.compile(r"Loading the tokenizer"),
    "tokenizer, kernels": re.compile(r"\bloading "),
    "weights": re.compile(r"\binspecting "),
    "inspection": re.compile(r"checking the model against"),
    "probe": re.compile(r"the check passed"),
    "cache, /ready": re.compile(r"^ready$"),
}
"""What has just ended → the event in the log that tells so, in order."""
FIRST_TOKEN = "first token"
CACHE_LINE = re.compile(r"cache of \d+ tokens, ([\d.]+) GiB")
PROMPT_TOKENS = 128
TOKEN_IDS = range(100, 1000)  # plain tokens of any vocabulary


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process. `private`: of `rss`, what no file backs."""

    rss: int
    uss: int
    private: int

    @classmethod
    def of(cls, process: psutil.Process) -> Memory:
        found = process.memory_full_info()
        return cls(found.rss, found.uss, found.rss - found.shared)

    def __str__(self) -> str:
        return f"{_mib(self.rss)} resident (private {_mib(self.private)}, USS {_mib(self.uss)})"


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


def milestones(lines: Iterable[str], began: float) -> tuple[dict[str, float], int]:
    """(seconds since `began` of each, bytes of the cache) by the server's log in JSON.

    Raises:
        BenchError: a milestone has no line.
    """
    found, cache = dict[str, float](), None
    for entry in map(json.loads, lines):
        cache = cache or CACHE_LINE.search(entry["event"])
        for name in (name for name, event in MILESTONES.items() if name not in found and event.search(entry["event"])):
            found[name] = datetime.datetime.fromisoformat(entry["timestamp"]).timestamp() - began
    if missing := [name for name in MILESTONES if name not in found] + ["the cache"] * (cache is None):
        raise BenchError(f"the server's log does not tell of {', '.join(missing)}")
    assert cache is not None
    return {name: found[name] for name in MILESTONES}, round(float(cache[1]) * 2**30)


async def run_once(settings: Sequence[str], timeout_s: float, log: Path) -> Start:
    """One start, measured."""
    async with (
        own_server([*settings, "--log-format", "json"], log, timeout_s) as (root, process),
        http_client(timeout=timeout_s) as client,
    ):
        memory = {"ready": Memory.of(process)}
        server = Server("the server", f"{root}/v1", client, dialect="vllm")
        first, second = [await server.stream(random_prompt(PROMPT_TOKENS), 2) for _ in range(2)]
        memory["after a request"] = Memory.of(process)
        at, cache_bytes = milestones(tail(log, 1000), process.create_time())
    return Start(at | {FIRST_TOKEN: at["cache, /ready"] + first.ttft}, second.ttft, memory, cache_bytes)


def random_prompt(num_tokens: int) -> list[int]:
    """No prefix is shared, so none is found in the cache."""
    return random.Random(secrets.randbits(64)).choices(TOKEN_IDS, k=num_tokens)


def weight_bytes(settings: Sequence[str]) -> tuple[str, int | None]:
    """(the model's name, bytes of its safetensors); None for those of a hub id."""
    from prerope.server.flags import load_settings
    from prerope.server.models.checkpoint import resolve_checkpoint

    found = load_settings(settings)
    checkpoint = resolve_checkpoint(found.model_id, found.revision, lambda _: None, cache_dir=found.cache_dir)
    files = list(Path(checkpoint.source).glob("*.safetensors")) if Path(checkpoint.source).is_dir() else []
    return checkpoint.name, sum(file.stat().st_size for file in files) or None


def report(starts: Sequence[Start], about: Mapping[str, Any]) -> Report:
    """Medians over the starts."""
    rows = []
    for name in starts[0].at:
        took, at = statistics.median(start.phases()[name] for start in starts), [start.at[name] for start in starts]
        rows.append([name, f"{took:.2f}", f"{statistics.median(at):.2f}", f"{min(at):.2f}–{max(at):.2f}"])
    seen = []
    for moment in starts[0].memory:
        found = [start.memory[moment] for start in starts]
        medians = (round(statistics.median(getattr(one, name) for one in found)) for name in Memory.__slots__)
        seen.append(f"{moment} {Memory(*medians)}")
    weights = f"weights {_mib(about['weight_bytes'])}, " if about["weight_bytes"] else ""
    again = statistics.median(start.second_ttft for start in starts)
    notes = [
        f"{about['model']}: medians of {counted(len(starts), 'start')}, seconds since the process began, "
        f"the prompt of {PROMPT_TOKENS} tokens sent once /ready answers; the next such prompt has its first token "
        f"after {again:.2f} s. {about['date']} on {about['cpu']}, {about['cores']} cores.",
        f"Memory: {weights}cache {_mib(starts[0].cache_bytes)}, which takes memory as it is written to. "
        + f"{'; '.join(seen)}.",
    ]
    data = {"about": dict(about), "starts": [asdict(start) for start in starts]}
    return Report("startup", [Table(["until", "took, s", "at, s", "range, s"], rows, notes)], data)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("startup", __doc__)
    add = parser.add_argument
    add("--rounds", type=options.count, default=5, help="starts that count, after one that does not")
    add("--timeout", type=float, default=300, help="seconds that a start may take, or a reply")
    add("settings", nargs="*", metavar="-- --FLAG VALUE", help="settings of the server")
    asked = parser.parse_args(arguments)
    about = describe_machine()
    about["model"], about["weight_bytes"] = weight_bytes(asked.settings)
    rounds, log = tqdm(range(1 + asked.rounds), unit=" starts"), asked.out / "startup.log"
    starts = [asyncio.run(run_once(asked.settings, asked.timeout, log)) for _ in rounds]
    report(starts[1:], about).publish(asked.out, options.console())
    return 0


if __name__ == "__main__":
    options.run("startup", main)
