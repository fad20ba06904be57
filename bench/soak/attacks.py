"""Attacks on a server, and a bystander who measures what others feel of them. Each takes a URL and gives statuses.

    python -m bench.soak.attacks [NAME …]

starts the server, makes each attack in full, or those that are named, and prints the slowest answer of /health and the
longest gap of somebody's stream, beside the gap that is ordinary there. The attacker is a process of its own at nice
19: it stands for one on another machine, which would take no core of the server's at all; at the server's own priority
much of what is measured is its making of bodies. "nothing" is no attack: what is seen in it is the machine's doing.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import pairwise
from urllib.parse import urlsplit

import httpx

from bench.shared import options
from bench.shared.servers import own_server
from bench.soak.hostile import HOSTILE, encoded

ATTACK_TIMEOUT_S = 300
ORDINARY_S = 2.0
"""How long the bystander watches before the attack begins."""
ELSEWHERE = 19
"""How nice an attacker is that stands for one on another machine: making bodies is no work of the server's."""
MOST_S = 60
"""How long an attack may last that is measured; then its client is gone."""
NOTHING, NOTHING_S = "nothing", 5.0

Attack = Callable[[str, float], list[int]]


class Bystander:
    """A client with a stream of its own and a probe of /health, while the body of the `with` runs.

    Attributes:
        ordinary_gap_s: the median time between its tokens before the attack.
        worst_gap_s, worst_health_s: the worst during it.
    """

    def __init__(self, url: str, ordinary_s: float = 0.3) -> None:
        self._http = httpx.Client(base_url=url, timeout=ATTACK_TIMEOUT_S)
        self._ordinary_s = ordinary_s
        self._stop, self._first = threading.Event(), threading.Event()
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

    def __exit__(self, *_error: object) -> None:
        ended = time.monotonic()
        time.sleep(0.05)
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._http.close()
        gaps = [(after, after - before) for before, after in pairwise(self._times)]
        self.ordinary_gap_s = statistics.median_high([gap for at, gap in gaps if at < self._began] or [0.0])
        self.worst_gap_s = max((gap for at, gap in gaps if at - gap < ended and at > self._began), default=0.0)
        self.worst_health_s = max((took for at, took in self._latencies if at > self._began), default=0.0)

    def _stream(self) -> None:
        """One after another, so that there is always one; a token a step, so that a gap is a step."""
        body = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True, "speculation": "off"}
        while not self._stop.is_set():
            with self._http.stream("POST", "/generate", json=body) as response:
                for line in response.iter_lines():
                    if self._stop.is_set():
                        break
                    if line.startswith("data: {"):
                        self._times.append(time.monotonic())
                        self._first.set()

    def _probe(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            self._http.get("/health")
            self._latencies.append((time.monotonic(), time.monotonic() - began))
            time.sleep(0.02)


def sent(name: str) -> Attack:
    """The attack that sends bodies, all of it at once."""

    def attack(url: str, share: float) -> list[int]:
        def post(path: str, content: bytes) -> int:
            headers = {"Content-Type": "application/json"}
            return httpx.post(url + path, content=content, headers=headers, timeout=ATTACK_TIMEOUT_S).status_code

        posts = [(path, encoded(body)) for path, body in HOSTILE[name](share)]
        with ThreadPoolExecutor(len(posts)) as pool:
            return list(pool.map(post, *zip(*posts, strict=True)))

    return attack


def tiny_chunks(url: str, share: float) -> list[int]:
    """A million of one byte each, as chunked bodies have them."""
    text = b'{"prompt":"a","max_tokens":1' + b" " * int(share * 1_000_000) + b"}"
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


ATTACKS: dict[str, Attack] = {**{name: sent(name) for name in HOSTILE}, "tiny chunks": tiny_chunks}


@contextmanager
def attacker(nice: int = ELSEWHERE, most_s: int = 0) -> Iterator[Callable[[str, str, float], list[int]]]:
    """Makes attacks in a process of its own, which has begun: that, too, is not to be felt by the bystander.

    most_s: it ends by then, whatever it waits for; 0 for no such end.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (nice, most_s)) as pool:
        pool.submit(os.getpid).result()
        yield lambda name, url, share: pool.submit(_made, name, url, share).result()


def _begin(nice: int, most_s: int) -> None:
    os.nice(nice)
    signal.alarm(most_s)


def _made(name: str, url: str, share: float) -> list[int]:
    return ATTACKS[name](url, share)


def measured(url: str, name: str, nice: int) -> str:
    """A line for one attack."""
    began = time.monotonic()
    outcome: object = "-"
    with attacker(nice, MOST_S) as attack, Bystander(url, ORDINARY_S) as bystander:
        try:
            if name == NOTHING:
                time.sleep(NOTHING_S)
            else:
                outcome = sorted(set(attack(name, url, 1)))
        except BrokenProcessPool:
            outcome = f"not over in {MOST_S} s"
        except httpx.HTTPError as error:
            outcome = type(error).__name__
    gap_s, ordinary_s = bystander.worst_gap_s, bystander.ordinary_gap_s
    return (
        f"{name}: /health {bystander.worst_health_s * 1e3:.0f} ms, gap {gap_s * 1e3:.0f} ms of {ordinary_s * 1e3:.1f}, "
        f"{gap_s / ordinary_s:.1f} steps, {outcome}, {time.monotonic() - began - ORDINARY_S:.1f} s"
    )


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("soak.attacks", __doc__, "soak")
    parser.add_argument("names", nargs="*", metavar="NAME", help="attacks to make (all)")
    parser.add_argument("--nice", type=int, default=ELSEWHERE, help="the attacker's; 0 for a full share of the cores")
    asked = parser.parse_args(arguments)

    async def run() -> None:
        async with own_server(["--log-level", "warning"], asked.out / "attacked.log") as (root, _process):
            for name in asked.names or [NOTHING, *ATTACKS]:
                print(await asyncio.to_thread(measured, root, name, asked.nice), flush=True)

    asyncio.run(run())
    return 0


if __name__ == "__main__":
    options.run("soak.attacks", main)
