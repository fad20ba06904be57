"""Performs the tasks of a soak against a server and says how each went.

What is checked of every reply: its status is one that the task allows; a refusal carries an error object, and a
Retry-After where it is a 429; a stream ends with [DONE], without an error event, and has a usage; a plain reply has
generated tokens. Connections are never reused, so that a socket that stays open on the server is a leak.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from bench.soak_plan import GENERATE, Task
from bench.streams import Completion, StreamFailed, read_completion, split_events

RECEIVE_BUFFER, READ_BYTES = 4096, 256


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one task went. Times are seconds; `started` counts from when the client was made.

    Attributes:
        status: of the reply; 0 where none came.
        problem: what must not be; empty where all is well.
        aborted: the client went away before the end, as planned.
        ttft, gaps: of streams that ended, else None and empty.
    """

    kind: str
    started: float
    seconds: float
    status: int
    problem: str = ""
    aborted: bool = False
    ttft: float | None = None
    gaps: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """status, headers with lower-case names, and the body in pieces with their arrival times."""

    status: int
    headers: Mapping[str, str]
    chunks: list[tuple[float, bytes]]

    @property
    def body(self) -> bytes:
        return b"".join(chunk for _, chunk in self.chunks)


@dataclass(slots=True)
class SoakClient:
    """One server's client; `num_open` requests are under way."""

    root: str
    key: str | None
    patience_s: float
    num_open: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    born: float = field(default_factory=time.perf_counter)
    http: httpx.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.AsyncClient(base_url=self.root, timeout=None, limits=limits, trust_env=False)

    @property
    def now(self) -> float:
        """Seconds since this client was made."""
        return time.perf_counter() - self.born

    async def perform(self, task: Task) -> Outcome:
        """Do it and keep how it went. Never raises for what a server can do."""
        self.num_open += 1
        began = time.perf_counter()
        try:
            outcome = await self._perform(task, began)
        finally:
            self.num_open -= 1
        self.outcomes.append(outcome)
        return outcome

    async def _perform(self, task: Task, began: float) -> Outcome:
        def ended(status: int, problem: str = "", aborted: bool = False, stream: Completion | None = None) -> Outcome:
            named = f"{task.detail or task.kind} at {task.path}: {problem}" if problem else ""
            seconds = time.perf_counter() - began
            ttft, gaps = (stream.ttft, tuple(stream.gaps)) if stream else (None, ())
            return Outcome(task.kind, began - self.born, seconds, status, named, aborted, ttft, gaps)

        raw = task.read_pause_s is not None or task.declared_bytes is not None
        try:
            async with asyncio.timeout(self.patience_s if task.abort_after_s is None else task.abort_after_s):
                reply = await (self._ask_raw(task) if raw else self._ask(task))
        except TimeoutError:
            if task.abort_after_s is not None:
                return ended(0, aborted=True)
            return ended(0, f"no end within {self.patience_s:g} s")
        except (httpx.HTTPError, OSError) as error:
            return ended(0, f"{type(error).__name__}: {error}")
        try:
            return ended(reply.status, stream=check(task, reply, began))
        except (StreamFailed, ValueError, KeyError) as error:
            return ended(reply.status, f"HTTP {reply.status}, {error}")

    async def _ask(self, task: Task) -> Reply:
        content, headers = _content(task), self._headers(task)
        chunks: list[tuple[float, bytes]] = []
        async with self.http.stream(task.method, task.path, content=content, headers=headers) as reply:
            async for chunk in reply.aiter_raw():
                chunks.append((time.perf_counter(), chunk))
            return Reply(reply.status_code, reply.headers, chunks)

    async def _ask_raw(self, task: Task) -> Reply:
        """Over a socket of our own with a small buffer, in HTTP/1.0: the reply ends when the server closes."""
        content, loop = _content(task), asyncio.get_running_loop()
        address = urlsplit(self.root)
        headers = self._headers(task) | {
            "Host": address.netloc,
            "Content-Length": str(len(content) if task.declared_bytes is None else task.declared_bytes),
        }
        lines = [f"{task.method} {task.path} HTTP/1.0", *(f"{name}: {value}" for name, value in headers.items())]
        chunks: list[tuple[float, bytes]] = []
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            connection.setblocking(False)
            await loop.sock_connect(connection, (address.hostname, address.port or 80))
            await loop.sock_sendall(connection, "\r\n".join([*lines, "", ""]).encode() + content)
            while piece := await loop.sock_recv(connection, READ_BYTES):
                chunks.append((time.perf_counter(), piece))
                await asyncio.sleep(task.read_pause_s or 0)
        return _split_head(chunks)

    def _headers(self, task: Task) -> dict[str, str]:
        key = self.key if task.key is True else task.key
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def check(task: Task, reply: Reply, began: float) -> Completion | None:
    """What a stream brought and when; None for other replies.

    Raises:
        StreamFailed, ValueError, KeyError: the reply is not as it must be; messages repeat no prompt.
    """
    if reply.status not in task.statuses:
        allowed = " or ".join(map(str, sorted(task.statuses)))
        raise ValueError(f"expected {allowed}: {reply.body[:300].decode(errors='replace')}")
    if reply.status != httpx.codes.OK:
        error = json.loads(reply.body)["error"]
        if not error["message"] or not error["type"]:
            raise ValueError("the error says nothing")
        if reply.status == httpx.codes.TOO_MANY_REQUESTS and int(reply.headers["retry-after"]) < 1:
            raise ValueError("Retry-After is not a positive number of seconds")
        return None
    if not task.streams:
        usage = json.loads(reply.body)["usage"]
        if usage["completion_tokens"] < 1:
            raise ValueError("no token was generated")
        return None
    if not reply.body.endswith(b"data: [DONE]\n\n"):
        raise StreamFailed("the stream ended without [DONE]")
    return (read_generate if task.path == GENERATE else read_completion)(began, reply.chunks)


def read_generate(began: float, chunks: list[tuple[float, bytes]]) -> Completion:
    """Decode a /generate stream, as `bench.streams.read_completion` does OpenAI's.

    Raises:
        StreamFailed: it has an error event, or no end with a usage, or another number of tokens than that says.
    """
    times: list[float] = []
    usage, finish_reason = None, None
    for at, payload in split_events(chunks):
        if payload == b"[DONE]":
            continue
        event = json.loads(payload)
        if "error" in event:
            raise StreamFailed(str(event["error"]))
        times += [at] * len(event.get("token_ids", ()))
        usage, finish_reason = event.get("usage", usage), event.get("finish_reason", finish_reason)
    if usage is None or finish_reason is None:
        raise StreamFailed("the stream ended without a usage and a finish reason")
    if not times:
        raise StreamFailed("the stream carried no token")
    return Completion(began, tuple(times), usage["prompt_tokens"], finish_reason)


def _content(task: Task) -> bytes:
    return task.body if isinstance(task.body, bytes) else json.dumps(task.body).encode()


def _split_head(chunks: list[tuple[float, bytes]]) -> Reply:
    """Status line and headers off the front of a raw reply."""
    whole = b"".join(chunk for _, chunk in chunks)
    head, separator, _ = whole.partition(b"\r\n\r\n")
    if not separator:
        raise httpx.RemoteProtocolError("the connection was closed before a reply")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    skip, body = len(head) + len(separator), []
    for at, chunk in chunks:
        if skip < len(chunk):
            body.append((at, chunk[skip:]))
        skip = max(0, skip - len(chunk))
    return Reply(int(first.split()[1]), headers, body)
