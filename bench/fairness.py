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
`bench.fairness_policy.FifoScheduler` in it. First r: one long prompt beside one stream, on the product's server; r is
B ÷ the longest time between two of the prompt's chunks. Then, for the given time: long prompts, `--in-flight` of them
always under way, a new one as soon as one is done; a short request every few seconds, whether or not the last was
answered; and one stream. The bound holds where the 99th percentile of each, over the whole time, is within it; the
worst is told beside it, for other programs on the machine stretch single steps.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import random
import shlex
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import OUTPUT_FOLDER, WIDTH
from bench.client import Server, ServerUnusable
from bench.fairness_load import LEAST_PAUSE, SHORT_OUTPUT, Latencies, Load, slowest_chunk
from bench.fairness_policy import POLICIES, most_steps
from bench.fairness_report import FairnessReport, print_report, save
from bench.launch import launched
from bench.machine import describe_machine
from bench.serving import until_terminated
from bench.soak_plan import read_library
from bench.streams import StreamFailed

SPARE_TOKENS = 1024  # of MAX_MODEL_LEN beside a long prompt


@contextlib.asynccontextmanager
async def serving(policy: str, options: argparse.Namespace) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server with this policy, ready."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    root = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "bench.fairness_server", policy, "--port", str(port)),
        *("--max-model-len", str(options.long_tokens + SPARE_TOKENS), "--max-batched-tokens", str(options.budget)),
        *("--max-num-seqs", str(min(64, options.budget)), "--log-level", "warning"),
        *(("--model-id", options.model_id) if options.model_id else ()),
    ]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=root, timeout=None, limits=limits, trust_env=False) as http:
        server = Server(policy, f"{root}/v1", http)
        async with launched(server, shlex.join(command), options.out / f"{policy}.log", options.ready_timeout):
            yield http


async def measure(options: argparse.Namespace, progress: Progress) -> FairnessReport:
    """Both policies, one after the other.

    Raises:
        ServerUnusable, StreamFailed, httpx.HTTPError: of any request; nothing is measured then.
    """
    shown = ("budget", "long_tokens", "in_flight", "short_tokens", "short_every", "seconds", "seed")
    about = describe_machine() | {name: getattr(options, name) for name in shown}
    task = progress.add_task("starting", total=len(POLICIES))
    latencies: dict[str, Latencies] = {}
    chunk_s = 0.0
    for policy in POLICIES:
        async with serving(policy, options) as http:
            library = read_library(functools.partial(_tokenize, str(http.base_url)))
            await Load(http, library, options, random.Random(1)).ask(options.short_tokens, 4)  # the first is slower
            if not chunk_s:
                progress.update(task, description="the prefill rate of one long prompt")
                chunk_s = await slowest_chunk(Load(http, library, options, random.Random(2)))
            progress.update(task, description=f"{policy}: {options.seconds:g} s of long prompts")
            latencies[policy] = await Load(http, library, options, random.Random(f"{options.seed}, load")).run()
        progress.advance(task)
    return FairnessReport(about, latencies, options.budget, chunk_s, steps_bound(options, chunk_s))


def steps_bound(options: argparse.Namespace, chunk_s: float) -> int:
    """Steps of `chunk_s` seconds that a short request waits at most, with those that came shortly before it.

    Raises:
        ServerUnusable: they come faster than they are served.
    """
    steps, least_gap = 2, LEAST_PAUSE * options.short_every
    for _ in range(20):
        waiting = 1 + int(steps * chunk_s / least_gap)
        decoding = 1 + waiting + int(SHORT_OUTPUT * chunk_s / least_gap)
        needed = most_steps(options.budget, min(decoding, options.budget - 2), waiting * options.short_tokens)
        if needed <= steps:
            return steps
        steps = needed
    raise ServerUnusable(
        f"short requests every {options.short_every:g} s come faster than steps of {chunk_s:.1f} s serve them: "
        "raise --short-every"
    )


def _tokenize(root: str, text: str) -> list[int]:
    body = {"prompt": text, "add_special_tokens": False}
    ids: list[int] = httpx.post(f"{root}/tokenize", json=body, timeout=60.0).raise_for_status().json()["tokens"]
    return ids


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench.fairness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seconds", type=float, default=100.0, help="of load for each policy; default: 100")
    add("--long-tokens", type=int, default=6144, help="of each long prompt; default: 6144")
    add("--in-flight", type=int, default=2, help="long prompts under way at any time; default: 2")
    add("--short-tokens", type=int, default=64, help="of each short prompt; default: 64")
    add("--short-every", type=float, default=4.0, metavar="S", help="mean time between short requests; default: 4")
    add("--budget", type=int, default=512, help="MAX_BATCHED_TOKENS; default: 512")
    add("--model-id", metavar="MODEL", help="default: the embedded model")
    add("--seed", type=int, default=0)
    add("--ready-timeout", type=float, default=300.0, help="seconds a server may take to start; default: 300")
    add("--out", type=Path, default=OUTPUT_FOLDER / "fairness", help="folder; default: bench/out/fairness")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    try:
        with Progress(*columns, console=console) as progress:
            report = asyncio.run(until_terminated(measure(options, progress)))
    except (ServerUnusable, StreamFailed, httpx.HTTPError) as error:
        print(f"bench.fairness: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("bench.fairness: interrupted, nothing written", file=sys.stderr)
        return 130
    print_report(report, console)
    for path in save(report, options.out):
        console.print(f"wrote {os.path.relpath(path)}", highlight=False)
    return 0 if report.held else 1


if __name__ == "__main__":
    sys.exit(main())
