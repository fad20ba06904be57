"""Position methods as a command line names them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from prerope.rope.spec import PARAMETERS, RopeSpec


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
    given = [f"{name}={value}" for name in PARAMETERS if (value := getattr(spec, name)) is not None]
    return ":".join([spec.method, *given, *(["logn"] if spec.logn else [])])


def environment(spec: RopeSpec) -> list[str]:
    """The lines to set for a server that reads so."""
    lines = [f"ROPE_METHOD={spec.method}"]
    lines += [f"ROPE_{name.upper()}={value}" for name in PARAMETERS if (value := getattr(spec, name)) is not None]
    return [*lines, "ROPE_LOGN=true"] if spec.logn else lines
