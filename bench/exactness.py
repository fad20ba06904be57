"""Does a reply depend on what else is served? Greedy replies of any OpenAI-compatible server, alone and in company.

    python -m bench.exactness --url http://127.0.0.1:8000 --requests 50

Each prompt is asked for alone; then again, when its beginning is in the cache; beside seven neighbours; and beside the
chunks of a long prompt. What is told of each company is the share of replies that are the same token by token as the
first, and by how much a log-probability of the same token differs at most.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench import BenchError
from bench.shared import options
from bench.shared.machine import describe_machine
from bench.shared.report import Report, Table

WORDS = ("river", "stone", "light", "city", "winter", "garden", "paper", "road", "music", "quiet", "green", "door")
NEIGHBOURS = 7
Reply = tuple[list[str], list[float]]


@dataclass(slots=True)
class Agreement:
    """Of one company: replies, those that were the same, and the largest difference of a log-probability."""

    replies: int = 0
    same: int = 0
    difference: float = 0.0
    examples: list[int] = field(default_factory=list)  # numbers of prompts that differed

    def add(self, number: int, alone: Reply, reply: Reply) -> None:
        self.replies += 1
        self.same += reply[0] == alone[0]
        if reply[0] != alone[0]:
            self.examples.append(number)
        for token, other, one, two in zip(*alone[:1], *reply[:1], alone[1], reply[1], strict=False):
            if token != other:
                break  # from here on they continue different texts
            self.difference = max(self.difference, abs(one - two))


class Asked:
    """One server's completions."""

    def __init__(self, client: httpx.AsyncClient, model: str, tokens: int) -> None:
        self._client, self._model, self._tokens = client, model, tokens

    async def reply(self, prompt: str) -> Reply:
        body = {"model": self._model, "prompt": prompt, "max_tokens": self._tokens, "temperature": 0, "logprobs": 1}
        response = await self._client.post("/v1/completions", json=body)
        if response.status_code != 200:
            raise BenchError(f"{response.request.url}: {response.status_code} {response.text[:200]}")
        found = response.json()["choices"][0]["logprobs"]
        if "content" in found:  # llama.cpp's completions answer as chats do
            return [one["token"] for one in found["content"]], [one["logprob"] for one in found["content"]]
        return found["tokens"], found["token_logprobs"]


def words(count: int, seed: int) -> str:
    """Random words, the same for a seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def prompts(count: int, seed: int) -> list[str]:
    """Of 5 to 400 words, no two with the same beginning."""
    return [f"{seed + number} " + words(5 + 37 * number % 396, seed + number) for number in range(count)]


async def beside(asked: Asked, prompt: str, others: Sequence[str], head_start: float) -> Reply:
    """The reply to a prompt while others run."""
    running = [asyncio.create_task(asked.reply(other)) for other in others]
    await asyncio.sleep(head_start)
    reply = await asked.reply(prompt)
    await asyncio.gather(*running)
    return reply


async def measure(asked: Asked, given: Sequence[str], long_words: int, seed: int) -> dict[str, Agreement]:
    async def near(number: int) -> Reply:
        return await beside(asked, given[number], prompts(NEIGHBOURS, seed + 1000 * (number + 1)), 0.05)

    async def long(number: int) -> Reply:
        return await beside(asked, given[number], [words(long_words, seed - number - 1)], 0.05)

    companies: dict[str, Callable[[int], Awaitable[Reply]]] = {
        "after a prefix hit": lambda number: asked.reply(given[number]),
        f"beside {NEIGHBOURS} neighbours": near,
        "beside a long prompt": long,
    }
    alone = [await asked.reply(prompt) for prompt in given]
    found = {name: Agreement() for name in companies}
    for name, company in companies.items():
        for number in range(len(given)):
            found[name].add(number, alone[number], await company(number))
    return found


async def ask(asked: Any) -> dict[str, Agreement]:
    async with httpx.AsyncClient(base_url=asked.url, timeout=300) as client:
        try:
            model = asked.model or (await client.get("/v1/models")).json()["data"][0]["id"]
        except httpx.HTTPError as error:
            raise BenchError(f"{asked.url}: {error}") from error
        given = prompts(asked.requests, asked.seed)
        return await measure(Asked(client, model, asked.tokens), given, asked.long, asked.seed)


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("exactness", __doc__)
    add = parser.add_argument
    add("--url", required=True, help="of the server, without /v1")
    add("--model", help="its name there; the first that the server lists when left out")
    add("--requests", type=options.count, default=50, help="prompts; each is asked for four times")
    add("--tokens", type=options.count, default=32, help="new tokens of a reply")
    add("--long", type=options.count, default=3000, help="words of the long prompt")
    add("--seed", type=options.count, default=int(time.time()), help="of the prompts: another one finds no cache")
    asked = parser.parse_args(arguments)
    found = asyncio.run(ask(asked))
    rows = [
        [name, str(one.replies), f"{one.same / one.replies:.1%}", f"{one.difference:.3g}"]
        for name, one in found.items()
    ]
    table = Table(["company", "replies", "same tokens", "largest difference of log-probabilities"], rows)
    data = {"machine": describe_machine(), "url": asked.url, "same": {name: one.same for name, one in found.items()}}
    Report("exactness", [table], data).publish(asked.out, options.console())
    return 0


if __name__ == "__main__":
    options.run("exactness", main)
