"""Attacks on a server, and a bystander who measures what others feel of them. Each takes a URL and gives statuses."""

from __future__ import annotations

import json
import multiprocessing
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

ATTACK_TIMEOUT_S = 60
ORDINARY_S = 2.0
"""How long the bystander watches before the attack begins."""

Attack = Callable[[str], list[int]]


class Bystander:
    """A client with a stream of its own and a probe of /health, while the body of the `with` runs.

    Attributes:
        ordinary_gap_s: the median time between its tokens before the attack.
        worst_gap_s, worst_health_s: the worst during it.
    """

    def __init__(self, url: str, ordinary_s: float = 0.3) -> None:
        self._url = url
        self._ordinary_s = ordinary_s
        self._stop = threading.Event()
        self._first = threading.Event()
        self._times: list[float] = []
        self._latencies: list[tuple[float, float]] = []
        self._threads = [threading.Thread(target=self._stream), threading.Thread(target=self._probe)]

    def __enter__(self) -> Bystander:
        for thread in self._threads:
            thread.start()
        assert self._first.wait(60), "no stream began"
        time.sleep(self._ordinary_s)
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = time.monotonic()
        time.sleep(0.05)
        self._stop.set()
        for thread in self._threads:
            thread.join()
        gaps = [(after, after - before) for before, after in zip(self._times, self._times[1:], strict=False)]
        before = sorted(gap for at, gap in gaps if at < self._began)
        self.ordinary_gap_s = before[len(before) // 2] if before else 0.0
        self.worst_gap_s = max((gap for at, gap in gaps if at - gap < ended and at > self._began), default=0.0)
        self.worst_health_s = max((took for at, took in self._latencies if at > self._began), default=0.0)

    def _stream(self) -> None:
        """One after another, so that there is always one."""
        body = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=self._url, timeout=ATTACK_TIMEOUT_S) as http:
            while not self._stop.is_set():
                with http.stream("POST", "/generate", json=body) as response:
                    for line in response.iter_lines():
                        if line.startswith("data: {") and not self._stop.is_set():
                            self._times.append(time.monotonic())
                            self._first.set()
                        if self._stop.is_set():
                            break

    def _probe(self) -> None:
        with httpx.Client(base_url=self._url, timeout=ATTACK_TIMEOUT_S) as http:
            while not self._stop.is_set():
                began = time.monotonic()
                http.get("/health")
                ended = time.monotonic()
                self._latencies.append((ended, ended - began))
                time.sleep(0.02)


def post(url: str, path: str, body: Any, timeout: float = ATTACK_TIMEOUT_S) -> int:
    """The status of a reply to JSON; a text is sent as it is."""
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    response = httpx.post(url + path, content=content, headers={"Content-Type": "application/json"}, timeout=timeout)
    return response.status_code


def at_once(calls: list[Callable[[], int]]) -> list[int]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


HUGE_SCHEMA = {"prompt": "Hi", "json_schema": {"type": "integer", "multipleOf": 99999989}}
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)


def doubling(letter: str) -> str:
    """A grammar whose reply is a million letters, in 250 characters."""
    rules = "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(20))
    return f'start: T0\n{rules}T20: "{letter}"\n'


def explosive_grammars(url: str) -> list[int]:
    lark = "start: A\nA: " + " & ".join(f"/({'a' * prime})*b/" for prime in PRIMES)
    bodies = [
        HUGE_SCHEMA,
        {"prompt": "Hi", "regex": ".?" * 32_000},
        {"prompt": "Hi", "grammar": lark},
        *({"prompt": "Hi", "grammar": doubling(letter)} for letter in "abc"),
    ]
    return at_once([lambda body=body: post(url, "/generate", body) for body in bodies])  # type: ignore[misc]


def slow_masks(url: str) -> list[int]:
    body = {"prompt": "Hi", "regex": "a" * 60_000, "max_tokens": 4, "temperature": 0}
    return at_once([lambda: post(url, "/generate", body) for _ in range(32)])


BODY_BYTES = 16 * 2**20
CHAT = "/v1/chat/completions"


def filled(head: str, item: str, tail: str, num_bytes: int = BODY_BYTES - 64) -> str:
    """As many items as go into a body."""
    return head + ",".join([item] * ((num_bytes - len(head) - len(tail)) // (len(item) + 1))) + tail


def empty_messages(url: str) -> list[int]:
    return [post(url, CHAT, filled('{"messages":[', "{}", "]}"))]


def many_messages(url: str) -> list[int]:
    message = {"role": "user", "content": ""}
    return [post(url, CHAT, {"messages": [message] * count, "max_tokens": 1}) for count in (100_000, 9_000)]


def empty_parts(url: str) -> list[int]:
    part = {"type": "text", "text": ""}
    return [post(url, CHAT, {"messages": [{"role": "user", "content": [part] * 400_000}]})]


def nested_prompts(url: str) -> list[int]:
    return [post(url, path, filled('{"prompt":[', "[]", "]}")) for path in ("/generate", "/v1/completions")]


def emoji(url: str) -> list[int]:
    return [post(url, "/tokenize", {"prompt": "😀" * 250_000})]


def digits(url: str) -> list[int]:
    return [post(url, CHAT, {"messages": [{"role": "user", "content": "1234567890" * 260_000}], "max_tokens": 1})]


def many_ids(url: str) -> list[int]:
    return [post(url, "/detokenize", filled('{"tokens":[', "33", "]}"))]


def ordinary_prompt(url: str) -> list[int]:
    text = "The quick brown fox jumps over the lazy dog, and then it rests. " * 1_720
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
    return [post(url, "/tokenize", {"prompt": text}), post(url, CHAT, chat)]


def echoed_logprobs(url: str) -> list[int]:
    body = {"prompt": [1000 + i % 40_000 for i in range(20_000)], "echo": True, "logprobs": 20, "max_tokens": 1}
    return [post(url, "/v1/completions", body, timeout=300)]


def tiny_chunks(url: str) -> list[int]:
    """A million of one byte each, as chunked bodies have them."""
    text = b'{"prompt":"a","max_tokens":1' + b" " * 1_000_000 + b"}"
    parts = urlsplit(url)
    assert parts.hostname is not None
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=ATTACK_TIMEOUT_S) as connection:
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        )
        try:
            for start in range(0, len(text), 5_000):
                connection.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in text[start : start + 5_000]))
            connection.sendall(b"0\r\n\r\n")
        except OSError:
            pass  # it was refused before it was whole
        return [int(connection.recv(64).split()[1])]


ATTACKS: dict[str, Attack] = {
    "explosive grammars": explosive_grammars,
    "slow masks": slow_masks,
    "empty messages": empty_messages,
    "many messages": many_messages,
    "empty parts": empty_parts,
    "nested prompts": nested_prompts,
    "emoji": emoji,
    "digits": digits,
    "many ids": many_ids,
    "an ordinary long prompt": ordinary_prompt,
    "echoed logprobs": echoed_logprobs,
    "tiny chunks": tiny_chunks,
}


def attack(name: str, url: str) -> list[int]:
    """In a process of its own: what it does to make its bodies is not to be felt by the bystander."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(ATTACKS[name], url).result()


def main(url: str, *names: str) -> None:
    """Print a line for each attack."""
    for name in names or ATTACKS:
        began = time.monotonic()
        with Bystander(url, ORDINARY_S) as bystander:
            try:
                outcome: object = sorted(set(attack(name, url)))
            except httpx.HTTPError as error:
                outcome = type(error).__name__
        print(
            f"{name}: /health {bystander.worst_health_s * 1e3:.0f} ms, gap {bystander.worst_gap_s * 1e3:.0f} ms of "
            f"{bystander.ordinary_gap_s * 1e3:.0f} ms, {outcome}, {time.monotonic() - began - ORDINARY_S:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
