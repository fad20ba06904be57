"""Servers under measurement: started from a command line, found ready, asked for streams and token counts, and stopped.

OpenAI-compatible servers differ in how they are asked for an exact number of tokens and for a usage at the end.
`Server.connect` tries the dialects once; from then on every request is written in the one that was understood.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench import BenchError
from bench.shared.machine import free_port
from bench.shared.streams import Completion, StreamFailed, read_completion

# Tried in this order; the first that a server takes, and ends with a usage, is its dialect.
DIALECTS: Mapping[str, Mapping[str, Any]] = {
    "vllm": {"ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "ignore_eos": {"ignore_eos": True, "stream_options": {"include_usage": True}},
    # transformers serve refuses unknown fields, takes a generation config as JSON, and always sends a usage.
    "transformers": {"generation_config": json.dumps({"eos_token_id": -1})},
    "openai": {"stream_options": {"include_usage": True}},
    "plain": {},
}
STOP_TIMEOUT_S, POLL_S, READY_TIMEOUT_S = 20.0, 0.5, 300.0


Counter = Callable[[str], int]
"""How many tokens a text has, those included that the server puts before any text."""


def http_client(
    root: str = "", timeout: float | None = None, headers: Mapping[str, str] | None = None, socket_options: Any = None
) -> httpx.AsyncClient:
    """A fresh connection for every request: what stays open on the server is the server's doing."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    transport = httpx.AsyncHTTPTransport(limits=limits, socket_options=socket_options, trust_env=False)
    return httpx.AsyncClient(base_url=root, timeout=timeout, headers=headers, transport=transport, trust_env=False)


@dataclass(slots=True)
class Server:
    """`name` is what tables call it; `url` goes up to and including /v1."""

    name: str
    url: str
    client: httpx.AsyncClient
    model: str | None = None
    api_key: str | None = None
    dialect: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    async def connect(self) -> None:
        """Find the model's name and the dialect.

        Raises:
            BenchError: nothing worked; the message has the last answer.
        """
        if self.api_key:
            self.headers["Authorization"] = f"Bearer {self.api_key}"
        failure = "no answer"
        for model in [self.model] if self.model else [*(one["id"] for one in await self.models()), None]:
            for dialect in DIALECTS:
                self.model, self.dialect = model, dialect
                try:
                    await self.stream("The first words of the book were", 4)
                    return
                except (StreamFailed, httpx.HTTPError) as error:
                    failure = f"{type(error).__name__}: {error}"
        raise BenchError(f"{self.name} at {self.url}: {failure}")

    async def models(self) -> list[dict[str, Any]]:
        """What /v1/models says; nothing of a server that has no such route, or answers 500 without a hub cache."""
        try:
            reply = await self.client.get(f"{self.url}/models", headers=self.headers)
            return list(reply.json()["data"]) if reply.is_success else []
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return []

    async def stream(self, prompt: str | Sequence[int], num_tokens: int) -> Completion:
        """Stream `num_tokens` greedy tokens after `prompt`.

        Raises:
            StreamFailed: a refusal, an error event or an empty stream.
            httpx.HTTPError: no connection, or a time-out.
        """
        body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "stream": True}
        body |= ({"model": self.model} if self.model else {}) | dict(DIALECTS[self.dialect])
        chunks: list[tuple[float, bytes]] = []
        started = time.perf_counter()
        async with self.client.stream("POST", f"{self.url}/completions", json=body, headers=self.headers) as reply:
            if reply.is_error:
                raise StreamFailed(f"HTTP {reply.status_code}: {(await reply.aread())[:300].decode(errors='replace')}")
            async for chunk in reply.aiter_raw():
                chunks.append((time.perf_counter(), chunk))
        return read_completion(started, chunks)

    async def choice(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The first choice of a completion that is not streamed. Raises BenchError with what the server says."""
        body = {**body, "model": self.model} if self.model else body
        try:
            answer = await self.client.post(f"{self.url}/completions", json=body, headers=self.headers)
        except httpx.HTTPError as error:
            raise BenchError(f"{self.name} at {self.url}: {type(error).__name__}: {error}") from None
        if answer.is_error:
            raise BenchError(f"{self.name}: HTTP {answer.status_code}: {answer.text[:300]}")
        return dict(answer.json()["choices"][0])

    async def is_ready(self) -> bool:
        """Whether the server is up and its model loaded: by the first of its health routes that exists."""
        for path in ("/ready", "/health", "/v1/models"):
            try:
                reply = await self.client.get(f"{self.root}{path}", headers=self.headers)
            except httpx.HTTPError:
                return False
            if reply.status_code != httpx.codes.NOT_FOUND:
                return reply.is_success
        return False

    async def ready(self, timeout_s: float, process: subprocess.Popen[bytes] | None = None) -> None:
        await until(self.is_ready, f"{self.name} at {self.url}", timeout_s, process)


async def until(
    met: Callable[[], Awaitable[bool]], what: str, timeout_s: float, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Wait until it is so. Raises BenchError where the process ends before, or time is up."""
    deadline = time.monotonic() + timeout_s
    while not await met():
        if process is not None and process.poll() is not None:
            raise BenchError(f"{what} ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not ready after {timeout_s:g} s")
        await asyncio.sleep(POLL_S)


def start(command: Sequence[str], log: Path, mode: str = "ab", **variables: str) -> subprocess.Popen[bytes]:
    """In a process group of its own; its output goes to `log`, behind what is there unless `mode` says otherwise."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open(mode) as output:
        return subprocess.Popen(
            command, env=os.environ | variables, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip


def end(process: subprocess.Popen[bytes], kindly: signal.Signals = signal.SIGTERM) -> None:
    """A process and all that it has started, in other groups, too: kindly, then at once."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for number in (kindly, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    for one in psutil.wait_procs(family, timeout=10)[1]:
        one.kill()


@contextlib.asynccontextmanager
async def launched(
    server: Server, command: str, log: Path, timeout_s: float = READY_TIMEOUT_S
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Run `command` until the block ends, once the server is ready; its output goes to `log`.

    Raises:
        BenchError: it ended, or was not ready in time; the message has the end of its output. Also where something
            answers already: that would be measured in its place.
    """
    if await server.is_ready():
        raise BenchError(f"{server.name}: something answers at {server.url} already: stop it, or drop --launch")
    process = start(shlex.split(command), log, mode="wb")
    try:
        try:
            await server.ready(timeout_s, process)
        except BenchError as error:
            raise BenchError("\n".join([str(error), *tail(log)])) from None
        yield process
    finally:
        await asyncio.to_thread(end, process)


def tail(log: Path, lines: int = 15) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:]


@contextlib.asynccontextmanager
async def own_server(
    flags: Sequence[str], log: Path, timeout_s: float = READY_TIMEOUT_S
) -> AsyncIterator[tuple[str, psutil.Process]]:
    """(its root, its process) of this project's server with these flags, on a free port."""
    port = free_port()
    command = shlex.join([sys.executable, "-m", "prerope.server", *flags, "--port", str(port)])
    async with http_client() as http:
        server = Server("the server", f"http://127.0.0.1:{port}/v1", http)
        async with launched(server, command, log, timeout_s) as process:
            yield server.root, psutil.Process(process.pid)


def local_counter(folder: str) -> Counter:
    """Counts with the tokenizer of a local model folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return lambda text: len(tokenizer(text).input_ids)


def server_counter(server: Server) -> Counter:
    """Counts with a server's /tokenize, by vLLM's and this server's name of the field, or llama.cpp's."""
    for names in (("prompt", "add_special_tokens"), ("content", "add_special")):

        def count(text: str, names: tuple[str, str] = names) -> int:
            body = dict(zip(names, (text, True), strict=True))
            reply = httpx.post(f"{server.root}/tokenize", json=body, headers=server.headers, timeout=60.0)
            return len(reply.raise_for_status().json()["tokens"])

        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, TypeError):
            if count("One two three"):
                return count
    raise BenchError(f"{server.name} has no /tokenize: put a server first that has, or give --tokenizer FOLDER")
