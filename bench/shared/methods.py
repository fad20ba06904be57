"""Position methods as a command line names them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from prerope.rope.spec import RopeSpec


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
