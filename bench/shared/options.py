"""The command line of every measurement: flags with their defaults, types of values (position methods among them), and
how a program ends."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prerope.rope.spec import RopeSpec
from prerope.server.errors import PreRopeError
from rich.console import Console

from bench import OUTPUT_FOLDER, BenchError

WIDTH = 160  # of tables that go to a file or a pipe; a terminal says its own


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it is written, and every default."""


def parser(question: str, description: str | None, folder: str = "") -> argparse.ArgumentParser:
    """With --out, the folder of what it leaves: bench/out, or `folder` in it."""
    made = argparse.ArgumentParser(f"python -m bench.{question}", description=description, formatter_class=Help)
    made.add_argument("--out", type=Path, default=OUTPUT_FOLDER / folder, help="folder of the files that it leaves")
    return made


def toy(parser: argparse.ArgumentParser) -> None:
    """See `machine.card`."""
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, kernels under Triton's interpreter")


def at_least(least: float) -> Callable[[str], float]:
    """A number that is not below `least`."""

    def number(text: str) -> float:
        value = float(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least:g}")
        return value

    return number


def count(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def counts(text: str) -> list[int]:
    """Whole numbers of at least 1, separated by commas."""
    try:
        return [count(part) for part in text.split(",")]
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, like 128,2048") from None


def named(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


@dataclass(frozen=True, slots=True)
class Method:
    """`label` is what the user wrote: NAME, or NAME:parameter=value:…:logn."""

    label: str
    spec: RopeSpec


def method_list(text: str) -> list[Method]:
    """Separated by commas, each once."""
    try:
        methods = [Method(part.strip(), RopeSpec.parse(part)) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if len({method.label for method in methods}) < len(methods):
        raise argparse.ArgumentTypeError(f"{text}: each once")
    return methods


def label(spec: RopeSpec) -> str:
    """As `RopeSpec.parse` reads it."""
    given = [f"{name}={value}" for name, value in spec.written().items()]
    return ":".join([spec.method, *given, *(["logn"] if spec.logn else [])])


def environment(spec: RopeSpec) -> list[str]:
    """The lines to set for a server that reads so."""
    lines = [f"ROPE_METHOD={spec.method}"]
    lines += [f"ROPE_{name.upper()}={value}" for name, value in spec.written().items()]
    return [*lines, "ROPE_LOGN=true"] if spec.logn else lines


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def run(question: str, main: Callable[[Sequence[str] | None], int]) -> None:
    """Exit with what `main` returns; 1 where it cannot measure, 130 where it is interrupted, by SIGTERM too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(None))
    except (BenchError, PreRopeError) as error:
        sys.exit(f"bench.{question}: {error}")
    except KeyboardInterrupt:
        print(f"bench.{question}: interrupted", file=sys.stderr)
        sys.exit(130)
