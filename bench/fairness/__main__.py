"""Do long prompts that arrive steadily make short requests wait, and running streams stutter? Against FIFO prefill.

    python -m bench.fairness

The bound. A step takes at most B tokens (MAX_BATCHED_TOKENS), so with a prefill rate of r tokens a second, the slowest
that a chunk sees, it lasts at most B ÷ r. Of its tokens, D go to running streams, one each; a quarter of the rest to
the oldest prefill; what remains to the prefills with least to go. So

    between two tokens of a running stream          ≤ B ÷ r
    TTFT of a short request                         ≤ (1 + ⌈n ÷ (B − D − ⌊(B − D) ÷ 4⌋)⌉) × B ÷ r

where n is the tokens of the short prompts that wait together, and the 1 is the step that runs when it arrives. No
length of a long prompt is in it, nor their number, as long as the cache has room to admit the request. FIFO prefill
gives the whole step to the oldest, so a short request waits for all long prompts before it: their tokens ÷ r. Streams
get their token of every step under both.

The measurement. Each policy is served on its own: ours by the product's own server, FIFO by the same server with
`bench.fairness.policy.FifoScheduler` in it. First r: one long prompt beside one stream, on the product's server; r is
B ÷ the longest time between two of the prompt's chunks. Then, for the given time: long prompts, `--in-flight` of them
always under way, a new one as soon as one is done; a short request every few seconds, whether or not the last was
answered; and one stream. The bound holds where the 99th percentile of each, over the whole time, is within it; the
worst is told beside it, for other programs on the machine stretch single steps.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shlex
import sys
from collections.abc import AsyncIterator, Sequence

import httpx
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import BenchError
from bench.fairness.load import LEAST_PAUSE, SHORT_OUTPUT, Latencies, Load, slowest_chunk
from bench.fairness.policy import POLICIES, most_steps
from bench.fairness.report import Fairness, report
from bench.shared import options
from bench.shared.machine import describe_machine
from bench.shared.servers import Server, free_port, http_client, launched
from bench.shared.text import Library

SPARE_TOKENS = 1024  # of MAX_MODEL_LEN beside a long prompt


@contextlib.asynccontextmanager
async def serving(policy: str, asked: argparse.Namespace) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server with this policy, ready."""
    port = free_port()
    settings = {"port": port, "max-model-len": asked.long_tokens + SPARE_TOKENS, "max-batched-tokens": asked.budget}
    settings |= {"max-num-seqs": min(64, asked.budget), "log-level": "warning"}
    settings |= {"model-id": asked.model_id} if asked.model_id else {}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = shlex.join([sys.executable, "-m", "bench.fairness.server", policy, *flags])
    root = f"http://127.0.0.1:{port}"
    async with (
        http_client(root) as http,
        launched(Server(policy, f"{root}/v1", http), command, asked.out / f"{policy}.log", asked.ready_timeout),
    ):
        yield http


async def measure(asked: argparse.Namespace, progress: Progress) -> Fairness:
    """Both policies, one after the other. Raises BenchError, httpx.HTTPError: of any request."""
    shown = ("budget", "long_tokens", "in_flight", "short_tokens", "short_every", "seconds", "seed")
    about = describe_machine() | {name: getattr(asked, name) for name in shown}
    task = progress.add_task("starting", total=len(POLICIES))
    latencies: dict[str, Latencies] = {}
    chunk_s = 0.0
    for policy in POLICIES:
        async with serving(policy, asked) as http:
            root = str(http.base_url)
            library = Library(lambda text, root=root: _tokenize(root, text))  # type: ignore[misc]
            await Load(http, library, asked, random.Random(1)).ask(asked.short_tokens, 4)  # the first is slower
            if not chunk_s:
                progress.update(task, description="the prefill rate of one long prompt")
                chunk_s = await slowest_chunk(Load(http, library, asked, random.Random(2)))
            progress.update(task, description=f"{policy}: {asked.seconds:g} s of long prompts")
            latencies[policy] = await Load(http, library, asked, random.Random(f"{asked.seed}, load")).run()
        progress.advance(task)
    return Fairness(about, latencies, asked.budget, chunk_s, steps_bound(asked, chunk_s))


def steps_bound(asked: argparse.Namespace, chunk_s: float) -> int:
    """Steps of `chunk_s` seconds that a short request waits at most, with those that came shortly before it.

    Raises:
        BenchError: they come faster than they are served.
    """
    steps, least_gap = 2, LEAST_PAUSE * asked.short_every
    for _ in range(20):
        waiting = 1 + int(steps * chunk_s / least_gap)
        decoding = 1 + waiting + int(SHORT_OUTPUT * chunk_s / least_gap)
        needed = most_steps(asked.budget, min(decoding, asked.budget - 2), waiting * asked.short_tokens)
        if needed <= steps:
            return steps
        steps = needed
    raise BenchError(
        f"short requests every {asked.short_every:g} s come faster than steps of {chunk_s:.1f} s serve them: "
        "raise --short-every"
    )


def _tokenize(root: str, text: str) -> list[int]:
    body = {"prompt": text, "add_special_tokens": False}
    ids: list[int] = httpx.post(f"{root}/tokenize", json=body, timeout=60.0).raise_for_status().json()["tokens"]
    return ids


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("fairness", __doc__, "fairness")
    add = parser.add_argument
    add("--seconds", type=float, default=100.0, help="of load for each policy")
    add("--long-tokens", type=options.count, default=6144, help="of each long prompt")
    add("--in-flight", type=options.count, default=2, help="long prompts under way at any time")
    add("--short-tokens", type=options.count, default=64, help="of each short prompt")
    add("--short-every", type=float, default=4.0, metavar="S", help="mean time between short requests")
    add("--budget", type=options.count, default=512, help="MAX_BATCHED_TOKENS")
    add("--model-id", metavar="MODEL", help="without it the embedded model")
    add("--seed", type=int, default=0)
    add("--ready-timeout", type=float, default=300.0, help="seconds a server may take to start")
    asked, console = parser.parse_args(arguments), options.console()
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    try:
        with Progress(*columns, console=console) as progress:
            found = asyncio.run(measure(asked, progress))
    except httpx.HTTPError as error:
        raise BenchError(f"{type(error).__name__}: {error}") from None
    report(found).publish(asked.out, console)
    return 0 if found.held else 1


if __name__ == "__main__":
    options.run("fairness", main)
