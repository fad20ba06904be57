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
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.shared import options
from bench.shared.machine import describe_machine
from bench.shared.report import Report, Table
from bench.shared.servers import Server, http_client

WORDS = ("river", "stone", "light", "city", "winter", "garden", "paper", "road", "music", "quiet", "green", "door")
NEIGHBOURS, HEAD_START_S = 7, 0.05
Reply = tuple[list[str], list[float]]
Ask = Callable[[str], Coroutine[Any, Any, Reply]]


@dataclass(slots=True)
class Agreement:
    """Of one company: replies, those that were the same, and the largest difference of a log-probability."""

    replies: int = 0
    same: int = 0
    difference: float = 0.0

    def add(self, alone: Reply, reply: Reply) -> None:
        self.replies += 1
        self.same += reply[0] == alone[0]
        for token, other, one, two in zip(*alone[:1], *reply[:1], alone[1], reply[1], strict=False):
            if token != other:
                break  # from here on they continue different texts
            self.difference = max(self.difference, abs(one - two))


async def reply(server: Server, prompt: str, tokens: int) -> Reply:
    found = (await server.choice({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1}))["logprobs"]
    if "content" in found:  # llama.cpp's completions answer as chats do
        return [one["token"] for one in found["content"]], [one["logprob"] for one in found["content"]]
    return found["tokens"], found["token_logprobs"]


def words(count: int, seed: int) -> str:
    """Random words, the same for a seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def prompts(count: int, seed: int) -> list[str]:
    """Of 5 to 400 words, no two with the same beginning."""
    return [f"{seed + number} " + words(5 + 37 * number % 396, seed + number) for number in range(count)]


async def beside(ask: Ask, prompt: str, others: Sequence[str]) -> Reply:
    """The reply to a prompt while others run, which have a head start."""
    running = [asyncio.create_task(ask(other)) for other in others]
    await asyncio.sleep(HEAD_START_S)
    found = await ask(prompt)
    await asyncio.gather(*running)
    return found


async def measure(ask: Ask, given: Sequence[str], long_words: int, seed: int) -> dict[str, Agreement]:
    companies: dict[str, Callable[[int], Awaitable[Reply]]] = {
        "after a prefix hit": lambda n: ask(given[n]),
        f"beside {NEIGHBOURS} neighbours": lambda n: beside(ask, given[n], prompts(NEIGHBOURS, seed + 1000 * (n + 1))),
        "beside a long prompt": lambda n: beside(ask, given[n], [words(long_words, seed - n - 1)]),
    }
    alone = [await ask(prompt) for prompt in given]
    found = {name: Agreement() for name in companies}
    for name, company in companies.items():
        for number in range(len(given)):
            found[name].add(alone[number], await company(number))
    return found


async def run(asked: Any) -> dict[str, Agreement]:
    async with http_client(timeout=300) as client:
        server = Server("the server", f"{asked.url}/v1", client, asked.model)
        server.model = server.model or next((one["id"] for one in await server.models()), None)
        given = prompts(asked.requests, asked.seed)
        return await measure(partial(reply, server, tokens=asked.tokens), given, asked.long, asked.seed)


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
    found = asyncio.run(run(asked))
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
