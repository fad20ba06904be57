"""The command line of bench.serving."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import OUTPUT_FOLDER
from bench.measure import Point


def named(value: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, separator, rest = value.partition("=")
    if not (name and separator and rest):
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=VALUE")
    return name, rest


def numbers(value: str) -> list[int]:
    """Whole numbers above 0, separated by commas."""
    try:
        found = [int(part) for part in value.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a list of whole numbers above 0, like 128,2048")
    return found


def points(value: str) -> list[Point]:
    """TOKENSxSTREAMS, separated by commas."""
    pairs = [part.partition("x") for part in value.split(",")]
    try:
        found = [Point(int(tokens), int(streams)) for tokens, _, streams in pairs]
    except ValueError:
        found = []
    if not found or min(min(point.prompt_tokens, point.num_streams) for point in found) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a list like 128x8,7000x1: tokens of a prompt x streams")
    return found


def parse_arguments(description: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench.serving", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--url",
        type=named,
        action="append",
        required=True,
        metavar="NAME=URL",
        help="a server, up to and including /v1; the first is compared with every other",
    )
    add("--launch", type=named, action="append", default=[], metavar="NAME=COMMAND", help="start that server from here")
    add("--alone", action="store_true", help="one server alive at a time (every server needs --launch)")
    add("--model", type=named, action="append", default=[], metavar="NAME=MODEL", help="default: as /v1/models says")
    add("--api-key", type=named, action="append", default=[], metavar="NAME=KEY")
    add("--prompt-tokens", type=numbers, default=[128, 2048, 7000], metavar="N,N", help="default: 128,2048,7000")
    add("--streams", type=numbers, default=[1, 8], metavar="N,N", help="requests at once; default: 1,8")
    add("--points", type=points, metavar="NxM,NxM", help="these alone, in place of all prompt tokens x all streams")
    add("--output-tokens", type=int, default=64, help="tokens generated a request; default: 64")
    add("--rounds", type=int, default=3, help="figures are medians of these; default: 3")
    add("--tokenizer", metavar="FOLDER", help="a model folder to count with; default: /tokenize, or reported usage")
    add("--seed", type=int, default=0, help="where in the text prompts begin; default: 0")
    add(
        "--patience",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds that each point of a round may wait for a quiet machine, and repeat a disturbed run; default: 0",
    )
    add("--timeout", type=float, default=900.0, help="seconds a stream may be silent; default: 900")
    add("--ready-timeout", type=float, default=300.0, help="seconds a server may take to start; default: 300")
    add("--out", type=Path, default=OUTPUT_FOLDER, help="folder for JSON, markdown and plot; default: bench/out")
    options = parser.parse_args(arguments)
    _check(parser, options)
    if options.points is None:
        options.points = [Point(length, streams) for length in options.prompt_tokens for streams in options.streams]
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    names = [name for name, _ in options.url]
    if len(set(names)) < len(names):
        parser.error(f"--url: the names must differ, not {', '.join(names)}")
    for flag in ("launch", "model", "api_key"):
        for name, _ in getattr(options, flag):
            if name not in names:
                parser.error(f"--{flag.replace('_', '-')} {name}: no --url has that name; only {', '.join(names)}")
    if options.alone and (missing := [name for name in names if name not in dict(options.launch)]):
        parser.error(f"--alone needs a --launch for every server; there is none for {', '.join(missing)}")
    if options.rounds < 1 or options.output_tokens < 2:
        parser.error("--rounds must be at least 1, --output-tokens at least 2")
