"""What a fleet is asked: how much it gives, what it finds in caches, and who fails when a replica goes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.replicas.fleet import Fleet

MODEL, MOST_S = "any", 90.0
FILLER = "the quick brown fox jumps over the lazy dog and runs on through the dark wood to the river "


@dataclass(slots=True)
class Asked:
    """One streamed completion, and how it ended."""

    status: int = 0
    seconds: float = 0
    error: str = ""

    @property
    def whole(self) -> bool:
        return self.status == 200 and not self.error


def client() -> httpx.AsyncClient:
    """For a whole trial: to make one takes as long as a short request."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=120, limits=limits, trust_env=False)


async def ask(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Asked:
    """Ask once, and try nothing again."""
    asked, began = Asked(), time.monotonic()
    body = {"model": MODEL, "temperature": 0, "ignore_eos": True} | body
    try:
        async with http.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as reply:
            asked.status, ended = reply.status_code, False
            async for line in reply.aiter_lines():
                asked.error = line if '"error":' in line else asked.error
                ended |= line == "data: [DONE]"
        if asked.status == 200 and not ended and not asked.error:
            asked.error = "cut without a word"
    except httpx.HTTPError as error:
        asked.error = type(error).__name__
    asked.seconds = time.monotonic() - began
    return asked


async def throughput(fleet: Fleet, streams: int, num_tokens: int) -> str:
    """Of prompts that nobody has seen."""
    prompts = [f"{number} of {time.time_ns()}: {FILLER * 6}" for number in range(streams)]
    async with client() as http:
        began = time.monotonic()
        found = await asyncio.gather(*(ask(http, fleet.url, {"prompt": p, "max_tokens": num_tokens}) for p in prompts))
    seconds = time.monotonic() - began
    whole = sum(one.whole for one in found)
    return f"{whole} of {streams} streams whole, {whole * num_tokens / seconds:.1f} tokens/s"


async def affinity(fleet: Fleet, conversations: int, turns: int) -> str:
    """Share of prompt tokens that caches had, over all turns of conversations that go on side by side."""

    async def talk(http: httpx.AsyncClient, number: int) -> tuple[int, int]:
        chat = [{"role": "user", "content": f"Story {number}, {time.time_ns()}. {number} {FILLER * 2}"}]
        cached = total = 0
        headers = {"x-session-id": f"conversation-{number}"}  # which nginx goes by; the others go by prefixes
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

    async with client() as http:
        found = await asyncio.gather(*(talk(http, number) for number in range(conversations)))
    return f"{sum(c for c, _ in found) / sum(t for _, t in found):.3f} of prompt tokens found cached"


@dataclass(slots=True)
class Load:
    """Short requests, one after the other in each of some lanes, until it is stopped."""

    url: str
    lanes: int = 4
    asked: list[tuple[float, Asked]] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _http: httpx.AsyncClient = field(default_factory=client)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._lane(lane)) for lane in range(self.lanes)]

    async def _lane(self, lane: int) -> None:
        while True:
            began = time.monotonic()
            prompt = f"{lane} {len(self.asked)} {FILLER}"
            self.asked.append((began, await ask(self._http, self.url, {"prompt": prompt, "max_tokens": 8})))
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()


async def kill(fleet: Fleet, streams: int, num_tokens: int) -> str:
    """One replica, with -9, under streams; then new requests until all replicas finish some again."""
    http, body = client(), {"max_tokens": num_tokens}
    bodies = [body | {"prompt": f"{number} {time.time_ns()} {FILLER}"} for number in range(streams)]
    under_way = [asyncio.create_task(ask(http, fleet.url, one)) for one in bodies]
    await asyncio.sleep(2)
    await fleet.kill_one()
    killed = time.monotonic()
    load = Load(fleet.url)
    load.start()
    ended = await asyncio.gather(*under_way)
    await http.aclose()
    again = await _used_again(fleet, killed)
    await load.stop()
    lost = [one for one in ended if not one.whole]
    served = [began + one.seconds for began, one in load.asked if one.whole]
    refused = [one for _, one in load.asked if not one.whole]
    ways = sorted({f"{one.status} {one.error[:60]}" for one in [*lost, *refused]})
    return (
        f"{len(lost)} of {streams} streams ended ({', '.join(ways)}); first new request served after "
        f"{min(served) - killed:.1f} s, the last failed one began {_last_failure(load, killed)}; "
        f"{len(refused)} of {len(load.asked)} new ones failed; all replicas in use again after {again:.1f} s"
    )


def _last_failure(load: Load, killed: float) -> str:
    times = [began - killed for began, one in load.asked if not one.whole]
    return f"after {max(times):.1f} s" if times else "never"


async def _used_again(fleet: Fleet, killed: float) -> float:
    """Seconds until every replica finishes requests that come."""
    while time.monotonic() - killed < MOST_S:
        await asyncio.sleep(1)
        try:
            first = await fleet.finished()
            await asyncio.sleep(1)
            second = await fleet.finished()
        except httpx.HTTPError:
            continue
        if sum(second.get(name, 0) > count for name, count in first.items()) >= fleet.size:
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
    failed = [f"{one.status} {one.error[:80]}" for _, one in load.asked if not one.whole]
    return f"{len(load.asked) - len(failed)} of {len(load.asked)} requests answered {sorted(set(failed)) or ''}"
