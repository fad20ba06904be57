"""What replicas behind a router give, and what they withstand. The model and all settings come from the environment.

    MODEL_ID=… python -m bench.replicas --behind vllm-router --program .venv/bin/vllm-router --size 2
    MODEL_ID=… python -m bench.replicas --behind ray --program .venv/bin/serve --size 2 --ask throughput affinity

Questions: `throughput` of streams with prompts of some hundred tokens; `affinity`, what conversations of five turns
find in caches; `kill`, a replica with -9 under streams; `rolling`, all replicas restarted in turn under load; `grow`,
of Ray Serve alone, from one replica to `--size` by the tokens that wait, and back.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence

from bench.replicas.fleet import Behind, Fleet, OnRay
from bench.replicas.trials import affinity, grow, kill, rolling, throughput
from bench.shared import options

QUESTIONS: dict[str, Callable[[Fleet, Namespace], Awaitable[str]]] = {
    "throughput": lambda fleet, asked: throughput(fleet, asked.streams, asked.tokens),
    "affinity": lambda fleet, _: affinity(fleet, 20, 5),
    "kill": lambda fleet, asked: kill(fleet, 32, asked.tokens * 8),
    "rolling": lambda fleet, _: rolling(fleet),
    "grow": lambda fleet, _: grow(fleet),
}


async def measure(asked: Namespace) -> None:
    fleet: Fleet
    if asked.behind == "ray":
        fleet = OnRay(asked.size, asked.threads, asked.program, asked.out, grows="grow" in asked.ask)
    else:
        fleet = Behind(asked.size, asked.threads, asked.program, asked.out, kind=asked.behind, policy=asked.policy)
    try:
        await fleet.start()
        for question in asked.ask:
            found = await QUESTIONS[question](fleet, asked)
            print(f"{asked.size} × {asked.threads} threads, {asked.behind}: {question}: {found}", flush=True)
    finally:
        fleet.stop()


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("replicas", __doc__, "replicas")
    add = parser.add_argument
    routers = ("none", "nginx", "vllm-router", "litellm", "ray")
    add("--behind", choices=routers, default="none", help="what stands before them")
    add("--policy", default="cache_aware", help="of vllm-router")
    add("--program", default="", help="its executable; of ray, that of `serve`")
    add("--size", type=options.count, default=1, help="replicas")
    add("--threads", type=options.count, default=1, help="of each")
    add("--streams", type=options.count, default=16, help="at once, of throughput")
    add("--tokens", type=options.count, default=32, help="of each of these; 8 × as many where a replica is killed")
    add("--ask", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS)[:-1], help="in this order")
    asyncio.run(measure(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    options.run("replicas", main)
