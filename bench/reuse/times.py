"""Time to the first token of prompts with ten documents of 1,500 tokens, over HTTP: cold, in another order, one edited,
after a restart; and in yet other orders with more and fewer tokens read again.

The server is started by its own command, with a folder for what outlives it, twice. Beside the seconds stand those of
CPU time that the server and its workers took: on a machine that others use, these are what compares.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from prerope.server.tokenizer import Tokenizer

from bench import BenchError
from bench.shared.machine import cpu_seconds
from bench.shared.servers import http_client, own_server
from bench.shared.text import default_texts

READY_TIMEOUT_S = 600.0
COLD, REORDERED, EDITED = "cold", "another order and question", "one edited"
REREAD = "another order, r = {}"
RESTARTED = "after a restart, another order"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `cpu`: seconds that the server's processes took for it, its few tokens after the first included."""

    seconds: float
    cpu: float
    cached_tokens: int
    token_ids: tuple[int, ...]


@contextlib.asynccontextmanager
async def served(model: str | None, tier: Path, log: Path) -> AsyncIterator[tuple[httpx.AsyncClient, psutil.Process]]:
    """A server with a folder for blocks, ready, and asked once: what is done once is done."""
    flags = ["--cache-tier-dir", str(tier), *([] if model is None else ["--model-id", model])]
    async with (
        own_server(flags, log, READY_TIMEOUT_S) as (root, process),
        http_client(root, timeout=3600) as client,
    ):
        await ask(client, process, ["One."], "Two.")
        yield client, process


async def ask(
    client: httpx.AsyncClient, process: psutil.Process, documents: Sequence[str], prompt: str, **more: Any
) -> Asked:
    """Stream eight greedy tokens."""
    body = {"documents": documents, "prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": True, **more}
    token_ids, seconds, cached, before, began = list[int](), 0.0, 0, cpu_seconds(process), time.perf_counter()
    async with client.stream("POST", "/generate", json=body) as reply:
        if reply.is_error:
            raise BenchError((await reply.aread()).decode()[:300])
        async for line in reply.aiter_lines():
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            seconds = seconds or (time.perf_counter() - began if event.get("token_ids") else 0.0)
            token_ids += event.get("token_ids", ())
            cached = event.get("usage", {}).get("cached_tokens", cached)
    return Asked(seconds, cpu_seconds(process) - before, cached, tuple(token_ids))


async def time_to_first_token(
    model: str | None, tokenizer: Tokenizer, num_documents: int, length: int, rereads: Sequence[int]
) -> dict[str, Asked]:
    """By kind of request. BenchError where, at the default r, a warm reply is not that of a cold run."""
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
        async with served(model, tier, log) as (client, process):
            times[COLD] = await ask(client, process, documents, first)
            times[REORDERED] = await ask(client, process, shuffled, second)
            times[EDITED] = await ask(client, process, edited, first)
            for reread in rereads:
                other = random.Random(f"r = {reread}").sample(documents, num_documents)
                found = await ask(client, process, other, second, document_reread=reread)
                times[REREAD.format(reread)] = found
            cold = await ask(client, process, shuffled, second, cache_salt="cold")
        async with served(model, tier, log) as (client, process):
            times[RESTARTED] = await ask(client, process, again, third)
            cold_again = await ask(client, process, again, third, cache_salt="cold again")
    for name, expected in ((REORDERED, cold), (RESTARTED, cold_again)):
        if times[name].token_ids != expected.token_ids:
            raise BenchError(f"{name}: {times[name].token_ids} is not the reply of a cold run, {expected.token_ids}")
    return times
