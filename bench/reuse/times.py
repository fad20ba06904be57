"""Time to the first token of prompts with ten documents of 1,500 tokens, over HTTP: cold, in another order, one edited,
after a restart.

The server is started by its own command, with a folder for what outlives it, twice. Beside the seconds stand those of
CPU time that the server and its workers took: on a machine that others use, these are what compares.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from prerope.server.tokenizer import Tokenizer

from bench import BenchError
from bench.shared.servers import free_port
from bench.shared.text import default_texts

READY_TIMEOUT_S, STOP_TIMEOUT_S = 600.0, 60.0
COLD, REORDERED, EDITED, RESTARTED = (
    "cold",
    "another order and question",
    "one edited",
    "after a restart, another order",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `cpu`: seconds that the server's processes took for it, its few tokens after the first included."""

    seconds: float
    cpu: float
    cached_tokens: int
    token_ids: tuple[int, ...]


@contextlib.contextmanager
def served(model: str | None, tier: Path, log: Path) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """A server with a folder for blocks, ready."""
    port = free_port()
    command = [sys.executable, "-m", "prerope.server", "--port", str(port), "--cache-tier-dir", str(tier)]
    command += [] if model is None else ["--model-id", model]
    with (
        log.open("ab") as output,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=3600, trust_env=False) as client,
    ):
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            _wait_until_ready(client, process, log)
            yield client, psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if client.get("/ready").is_success:
                return
        time.sleep(0.2)
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
    raise BenchError(f"the server did not become ready within {READY_TIMEOUT_S:g} s:\n" + "\n".join(said))


def cpu_seconds(process: psutil.Process) -> float:
    """Of a process, its children, and those that have ended."""
    times = [process.cpu_times(), *(one.cpu_times() for one in process.children(recursive=True))]
    return float(sum(one.user + one.system + one.children_user + one.children_system for one in times))


def ask(client: httpx.Client, process: psutil.Process, documents: Sequence[str], prompt: str, **more: Any) -> Asked:
    """Stream eight greedy tokens."""
    body = {"documents": documents, "prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": True, **more}
    token_ids, seconds, cached, before, began = list[int](), 0.0, 0, cpu_seconds(process), time.perf_counter()
    with client.stream("POST", "/generate", json=body) as reply:
        if reply.is_error:
            raise BenchError(reply.read().decode()[:300])
        for line in reply.iter_lines():
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            seconds = seconds or (time.perf_counter() - began if event.get("token_ids") else 0.0)
            token_ids += event.get("token_ids", ())
            cached = event.get("usage", {}).get("cached_tokens", cached)
    return Asked(seconds, cpu_seconds(process) - before, cached, tuple(token_ids))


def time_to_first_token(model: str | None, tokenizer: Tokenizer, num_documents: int, length: int) -> dict[str, Asked]:
    """By kind of request. BenchError where a warm reply is not that of a cold run."""
    ids = tokenizer.encode(next(default_texts())[1])
    texts = [tokenizer.decode(ids[start : start + length]) for start in range(0, (num_documents + 1) * length, length)]
    new, documents = texts[-1], texts[:-1]
    shuffled, again = (random.Random(seed).sample(documents, num_documents) for seed in (1, 2))
    middle = num_documents // 2
    edited = [*documents[:middle], new, *documents[middle + 1 :]]
    first, second, third = (f"\n\nQuestion: What is {what}?\nAnswer:" for what in ("a class", "a tuple", "a set"))
    times: dict[str, Asked] = {}
    with tempfile.TemporaryDirectory(prefix="prerope-tier-") as folder:
        tier, log = Path(folder) / "tier", Path(folder) / "log"
        with served(model, tier, log) as (client, process):
            ask(client, process, ["One."], "Two.")  # what is done once is done
            times[COLD] = ask(client, process, documents, first)
            times[REORDERED] = ask(client, process, shuffled, second)
            times[EDITED] = ask(client, process, edited, first)
            cold = ask(client, process, shuffled, second, cache_salt="cold")
        with served(model, tier, log) as (client, process):
            ask(client, process, ["One."], "Two.")
            times[RESTARTED] = ask(client, process, again, third)
            cold_again = ask(client, process, again, third, cache_salt="cold again")
    for name, expected in ((REORDERED, cold), (RESTARTED, cold_again)):
        if times[name].token_ids != expected.token_ids:
            raise BenchError(f"{name}: {times[name].token_ids} is not the reply of a cold run, {expected.token_ids}")
    return times
