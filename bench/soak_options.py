"""The command line of bench.soak."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import OUTPUT_FOLDER
from bench.serving_options import numbers
from bench.soak_plan import ABORTED_TOKENS, MANY_TOKENS

LEAST_SECONDS = 25.0  # a sample a second into the windows of `soak_verdicts.trend`

LEAST_LONGEST = max(ABORTED_TOKENS) + MANY_TOKENS


def parse_arguments(description: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """`seconds` of the result has the length, whichever flag gave it."""
    parser = argparse.ArgumentParser(
        "python -m bench.soak", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=20.0, help="of traffic after the warm-up; default: 20")
    length.add_argument("--seconds", type=float, help="the same in seconds")
    add("--url", help="root of a running server of this project; default: start one")
    add("--api-key", metavar="KEY", help="of the server at --url")
    add("--model-id", metavar="MODEL", help="for the server that is started; default: the embedded model")
    add("--clients", type=int, default=5, help="beside the one that sends long prompts; default: 5")
    add("--long-tokens", type=numbers, default=[8192, 16384], metavar="N,N", help="default: 8192,16384")
    add("--long-pause", type=float, default=20.0, metavar="S", help="mean pause between long prompts; default: 20")
    add("--kv-cache-memory", default="640MiB", help="small, so that the warm-up writes to all of it; default: 640MiB")
    add("--block-size", type=int, default=16, help="of the cache of the server that is started; default: 16")
    add("--seed", type=int, default=0, help="of the clients' plans; default: 0")
    add("--patience", type=float, default=900.0, metavar="S", help="a request may take this long; default: 900")
    add("--ready-timeout", type=float, default=300.0, help="seconds the server may take to start; default: 300")
    add("--out", type=Path, default=OUTPUT_FOLDER / "soak", help="folder of the report; default: bench/out/soak")
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or 60 * options.minutes
    if options.seconds < LEAST_SECONDS:
        parser.error(f"--seconds {options.seconds:g}: at least {LEAST_SECONDS:g} are needed to fit a slope to")
    if max(options.long_tokens) < LEAST_LONGEST:
        parser.error(f"--long-tokens: the longest must have at least {LEAST_LONGEST} tokens, as aborted requests may")
    if options.clients < 1:
        parser.error(f"--clients {options.clients}: at least 1 is needed")
    if options.url is not None:
        options.url = options.url.rstrip("/").removesuffix("/v1")
        if not options.url.startswith("http://"):
            parser.error(f"--url {options.url}: only http:// is spoken here, like http://127.0.0.1:8000")
    return options
