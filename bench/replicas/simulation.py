"""What many replicas would do, on paper: conversations that come and go, caches that fill, and a router before them.

    python -m bench.replicas.simulation --replicas 1000 --policy prefix --rate 2000

Each replica reads a prompt's tokens that its cache, or its tier, has not, then writes the reply, at the rates given:
measured ones. Prompts are read one after the other, replies written side by side. Nothing else is modelled: no network,
no batch whose steps get slower. `failures` of a replica in an hour take its cache with them.
"""

from __future__ import annotations

import heapq
import random
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.shared import options

POLICIES = ("random", "least", "prefix")


@dataclass(slots=True)
class Replica:
    """Tokens of conversations that cache and tier hold, the latest last, and until when it reads what has come."""

    cache: OrderedDict[int, int] = field(default_factory=OrderedDict)
    tier: OrderedDict[int, int] = field(default_factory=OrderedDict)
    free_at: float = 0.0

    def held(self, conversation: int) -> tuple[int, int]:
        """(tokens in the cache, tokens in the tier)."""
        return self.cache.get(conversation, 0), self.tier.get(conversation, 0)

    def keep(self, conversation: int, tokens: int, asked: Namespace) -> None:
        """The least recently used conversations go to the tier, and from there nowhere."""
        for level, limit in ((self.cache, asked.cache), (self.tier, asked.tier)):
            level.pop(conversation, None)
            if level is self.cache:
                level[conversation] = tokens
            while sum(level.values()) > limit:
                gone, count = level.popitem(last=False)
                if level is self.cache and asked.tier:
                    self.tier[gone] = count


def choose(policy: str, replicas: Sequence[Replica], holder: int | None, now: float, asked: Namespace) -> int:
    """prefix: whoever has the conversation, unless its queue is `slack` seconds longer than one of two others."""
    pair = [random.randrange(len(replicas)) for _ in range(1 if policy == "random" else 2)]
    least = min(pair, key=lambda number: replicas[number].free_at)
    if policy != "prefix" or holder is None:
        return least
    behind = max(now, replicas[holder].free_at) - max(now, replicas[least].free_at)
    return holder if behind <= asked.slack else least


def arrivals(asked: Namespace) -> list[tuple[float, int, int]]:
    """The first turns of all conversations, as a heap: when, number of the conversation, turn."""
    events, time = list[tuple[float, int, int]](), 0.0
    while (time := time + random.expovariate(asked.rate / asked.turns)) < asked.seconds:
        heapq.heappush(events, (time, len(events), 0))
    return events


def simulate(asked: Namespace) -> dict[str, float]:
    """Shares, and seconds until the first token."""
    random.seed(asked.seed)
    replicas = [Replica() for _ in range(asked.replicas)]
    events = arrivals(asked)
    failing = asked.failures * asked.replicas / 3600
    fails_at = random.expovariate(failing) if failing else float("inf")
    holders: dict[int, int] = {}
    waits, prompts, cached, from_tier, busy, ended = list[float](), 0, 0, 0, 0.0, 0.0
    while events:
        now, conversation, turn = heapq.heappop(events)
        while fails_at < now:
            gone = random.randrange(len(replicas))
            replicas[gone] = Replica(free_at=fails_at + asked.restart)
            fails_at += random.expovariate(failing)
        prompt = asked.first + turn * (asked.more + asked.reply)
        place = choose(asked.policy, replicas, holders.get(conversation), now, asked)
        replica = replicas[place]
        hit, kept = replica.held(conversation)
        hit, kept = min(hit, prompt), min(max(0, kept - hit), prompt - hit)
        seconds = (prompt - hit - kept) / asked.prefill + kept / asked.tier_rate
        replica.free_at = max(now, replica.free_at) + seconds
        replica.keep(conversation, prompt + asked.reply, asked)
        holders[conversation] = place
        waits.append(replica.free_at - now)
        prompts, cached, from_tier, busy = prompts + prompt, cached + hit, from_tier + kept, busy + seconds
        ended = max(ended, replica.free_at)
        if turn + 1 < asked.turns:
            done = replica.free_at + asked.reply / asked.decode
            heapq.heappush(events, (done + random.expovariate(1 / asked.pause), conversation, turn + 1))
    waits.sort()
    return {
        "found in the cache": cached / prompts,
        "found in the tier": from_tier / prompts,
        "busy reading": busy / (ended * len(replicas)),
        "first token, median s": waits[len(waits) // 2],
        "first token, 99th s": waits[int(len(waits) * 0.99)],
    }


def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = options.parser("replicas.simulation", __doc__, "replicas")
    add = parser.add_argument
    add("--policy", choices=POLICIES, default="prefix", help="of the router; least: the shorter queue of two")
    add("--replicas", type=options.count, default=8, help="of them")
    add("--rate", type=options.at_least(0.001), default=4.0, help="requests a second, all together")
    add("--seconds", type=options.at_least(1), default=600.0, help="in which conversations begin")
    add("--turns", type=options.count, default=5, help="of a conversation")
    add("--first", type=options.count, default=2000, help="tokens of its first prompt")
    add("--more", type=options.count, default=200, help="tokens that each turn adds")
    add("--reply", type=options.count, default=200, help="tokens of a reply")
    add("--pause", type=options.at_least(0.1), default=30.0, help="mean seconds between a reply and the next turn")
    add("--prefill", type=options.at_least(1), default=613.0, help="tokens a second that a replica reads")
    add("--decode", type=options.at_least(1), default=26.0, help="tokens a second of each reply")
    add("--cache", type=options.count, default=180_000, help="tokens that a replica's cache holds")
    add("--tier", type=options.at_least(0), default=0.0, help="tokens that its tier holds")
    add("--tier-rate", type=options.at_least(1), default=50_000.0, help="tokens a second that come from the tier")
    add("--slack", type=options.at_least(0), default=2.0, help="seconds of queue that a prefix is worth")
    add("--failures", type=options.at_least(0), default=0.0, help="of a replica in an hour")
    add("--restart", type=options.at_least(0), default=30.0, help="seconds until it is there again")
    add("--seed", type=int, default=0, help="of arrivals")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None) -> int:
    for name, value in simulate(parse(arguments)).items():
        print(f"{name}: {value:.3f}")
    return 0


if __name__ == "__main__":
    options.run("replicas.simulation", main)
