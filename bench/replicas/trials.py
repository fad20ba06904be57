"""What a fleet is asked: how much it gives, what it finds in caches, and who fails when a replica goes."""

from __future__ import annotations

import asyncio
import re
import secrets
import statistics
import time
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass, field

import httpx

from bench.replicas.fleet import KEY, Fleet
from bench.shared.servers import http_client

MODEL, MOST_S = "prerope", 90.0
TEXT = re.compile(r'"content": ?"[^"]')
SESSIONS = 16
"""Of short requests."""
ROUNDS = 3
"""Of throughput, after one that is not counted."""
FILLER = "the quick brown fox jumps over the lazy dog and runs on through the dark wood to the river "


def prompt(fillers: int) -> str:
    """One that shares no beginning with any other."""
    return f"{secrets.token_hex(32)} {FILLER * fillers}"


@dataclass(slots=True)
class Asked:
    """One streamed chat, asked once and not again, and how it ended. `begun`: a token has come, or never will."""

    prompt: str
    num_tokens: int
    session: str  # which nginx and LiteLLM go by
    status: int = 0
    asked_at: float = 0  # by the monotonic clock, as the two that follow
    began_at: float = 0
    ended_at: float = 0
    error: str = ""
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def whole(self) -> bool:
        return self.status == 200 and not self.error

    async def run(self, http: httpx.AsyncClient, url: str) -> Asked:
        body = {"model": MODEL, "messages": [{"role": "user", "content": self.prompt}], "max_tokens": self.num_tokens}
        body |= {"temperature": 0, "ignore_eos": True, "stream": True}
        address, headers = f"{url}/v1/chat/completions", {"x-session-id": self.session}
        self.asked_at = time.monotonic()
        try:
            async with http.stream("POST", address, json=body, headers=headers) as reply:
                self.status, ended = reply.status_code, False
                async for line in reply.aiter_lines():
                    if TEXT.search(line) and not self.begun.is_set():
                        self.began_at = time.monotonic()
                        self.begun.set()
                    self.error = line if '"error":' in line else self.error
                    ended |= line == "data: [DONE]"
            if self.status == 200 and not ended and not self.error:
                self.error = "cut without a word"
        except httpx.HTTPError as error:
            self.error = type(error).__name__
        self.begun.set()
        self.ended_at = time.monotonic()
        return self


def client() -> httpx.AsyncClient:
    """For a whole trial: to make one takes as long as a short request."""
    return http_client(timeout=120, headers={"authorization": f"Bearer {KEY}"})


async def throughput(fleet: Fleet, streams: int, num_tokens: int) -> str:
    """Of prompts that nobody has seen."""

    async def one_round(http: httpx.AsyncClient) -> tuple[int, float]:
        began = time.monotonic()
        asked = [Asked(prompt(6), num_tokens, f"stream-{number}") for number in range(streams)]
        found = await asyncio.gather(*(one.run(http, fleet.url) for one in asked))
        return sum(one.whole for one in found), num_tokens * streams / (time.monotonic() - began)

    async with client() as http:
        rounds = [await one_round(http) for _ in range(1 + ROUNDS)]
    whole, rates = sum(count for count, _ in rounds), sorted(rate for _, rate in rounds[1:])
    return (
        f"{whole} of {streams * len(rounds)} streams whole, {statistics.median(rates):.1f} tokens/s of replies "
        f"({rates[0]:.1f} to {rates[-1]:.1f} in {ROUNDS} rounds)"
    )


async def affinity(fleet: Fleet, conversations: int, turns: int) -> str:
    """Share of prompt tokens that caches had, over all turns of conversations that go on side by side."""

    async def talk(http: httpx.AsyncClient, number: int) -> tuple[int, int]:
        chat = [{"role": "user", "content": prompt(2)}]
        cached = total = 0
        headers = {"x-session-id": f"conversation-{number}"}
        for turn in range(turns):
            body = {"model": MODEL, "messages": chat, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            reply = (await http.post(f"{fleet.url}/v1/chat/completions", json=body, headers=headers)).json()
            total += reply["usage"]["prompt_tokens"]
            cached += reply["usage"]["prompt_tokens_details"]["cached_tokens"]
            chat += [
                {"role": "assistant", "content": reply["choices"][0]["message"]["content"] or "Yes."},
                {"role": "user", "content": f"And then? {turn} {FILLER}"},
            ]
        return cached, total

    before = await fleet.finished()
    async with client() as http:
        found = await asyncio.gather(*(talk(http, number) for number in range(conversations)))
    turns_of = [str(round(count - before[name])) for name, count in (await fleet.finished()).items()]
    share = sum(c for c, _ in found) / sum(t for _, t in found)
    return f"{share:.3f} of prompt tokens found cached; turns of replicas: {' and '.join(turns_of)}"


@dataclass(slots=True)
class Load:
    """Short requests, one after the other in each of some lanes, until it is stopped."""

    url: str
    lanes: int = 4
    fillers: int = 1  # of a prompt
    asked: list[Asked] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _http: httpx.AsyncClient = field(default_factory=client)

    @property
    def failed(self) -> list[Asked]:
        return [one for one in self.asked if not one.whole]

    @property
    def told(self) -> str:
        ways = _ways(self.failed)
        return f"{len(self.asked) - len(self.failed)} of {len(self.asked)} requests answered {ways}"

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._lane()) for _ in range(self.lanes)]

    async def _lane(self) -> None:
        while True:
            count = len(self.asked)
            asked = Asked(prompt(self.fillers), 8, f"session-{count % SESSIONS}")
            self.asked.append(await asked.run(self._http, self.url))
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()


async def kill(fleet: Fleet, streams: int, num_tokens: int) -> str:
    """One replica, with -9, once all streams have begun; then new requests until all replicas finish some again."""
    http = client()
    started = [Asked(prompt(1), num_tokens, f"stream-{number}") for number in range(streams)]
    under_way = [asyncio.create_task(one.run(http, fleet.url)) for one in started]
    await asyncio.wait_for(asyncio.gather(*(one.begun.wait() for one in started)), MOST_S)
    held = await fleet.held()
    gone = await fleet.kill_one()
    killed, open_then = time.monotonic(), sum(not task.done() for task in under_way)
    load = Load(fleet.url)
    load.start()
    lost = [one for one in await asyncio.gather(*under_way) if not one.whole]
    await http.aclose()
    again = await _used_again(fleet, held.keys() - {gone}, killed)
    await load.stop()
    had, ways = " and ".join(f"{count:.0f}" for count in held.values()), _ways([*lost, *load.failed])
    first = min((one for one in load.asked if one.whole), key=lambda one: one.ended_at)
    last = max((f"{one.asked_at - killed:.1f}" for one in load.failed), default="–")
    return (
        f"{len(lost)} of {open_then} open streams ended ({ways}), replicas had {had}; first new request "
        f"served after {first.ended_at - killed:.1f} s, its first token after {first.began_at - killed:.1f} s; "
        f"{len(load.failed)} of {len(load.asked)} new ones failed, the last asked after {last} s; "
        f"the one that came instead had finished one after {again:.1f} s"
    )


def _ways(failed: list[Asked]) -> str:
    return ", ".join(sorted({f"{one.status} {one.error[:60]}" for one in failed}))


async def _used_again(fleet: Fleet, others: Set[str], killed: float) -> float:
    """Seconds until a replica that is none of `others` has finished a request."""
    while time.monotonic() - killed < MOST_S:
        await asyncio.sleep(0.5)
        with suppress(httpx.HTTPError):
            if any(count for name, count in (await fleet.finished()).items() if name not in others):
                return time.monotonic() - killed
    return float("inf")


async def rolling(fleet: Fleet) -> str:
    """All replicas in turn, under load."""
    load = Load(fleet.url)
    load.start()
    await asyncio.sleep(2)
    await fleet.restart_each()
    await asyncio.sleep(2)
    await load.stop()
    return load.told


async def grow(fleet: Fleet) -> str:
    """From one replica to all, while more prompt tokens wait than one is to have before it, and back when none come."""
    load = Load(fleet.url, lanes=12, fillers=40)
    load.start()
    up = await _size(fleet, lambda count: count >= fleet.size)
    await asyncio.sleep(10)
    shares = " and ".join(f"{count:.0f}" for count in (await fleet.finished()).values())
    await load.stop()
    down = await _size(fleet, lambda count: count == 1)
    return (
        f"{fleet.size} replicas after {up:.0f} s, which had finished {shares} when the load ended; one again after "
        f"{down:.0f} s more; {load.told}"
    )


async def _size(fleet: Fleet, met: Callable[[int], bool]) -> float:
    began = time.monotonic()
    while not met(len(await fleet.finished())):
        if time.monotonic() - began > MOST_S:
            return float("inf")
        await asyncio.sleep(0.5)
    return time.monotonic() - began
