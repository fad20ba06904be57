"""What is asked of a card: the stages of each part, in groups whose processes run at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.kernels.cases import FULL, TOY

PARTS = ("A", "B", "tests")
LIMITS = {"A": 150.0, "B": 540.0, "tests": 900.0}
"""Seconds, of which the groups' own limits are the sum at most."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One process.

    Attributes:
        limit_s: it is ended then.
        variables: added to its environment.
        after: run only where a stage whose name begins so has failed; it does not count to `LIMITS`.
        tool: an executable without which the stage is left out.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    variables: Mapping[str, str] = field(default_factory=dict)
    after: str | None = None
    tool: str | None = None


def stages(part: str, *, toy: bool, out: Path) -> list[list[Stage]]:
    """Groups, one after the other."""
    made = {"A": _right_and_headline, "B": _why, "tests": _tests}[part](toy, out)
    whole = sum(max([one.limit_s for one in group if one.after is None], default=0.0) for group in made)
    assert toy or whole <= LIMITS[part]
    return made


def _bench(toy: bool, out: Path, module: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", f"bench.{module}", *arguments, "--out", str(out)]
    return [*command, "--toy"] if toy else command


def _right_and_headline(toy: bool, out: Path) -> list[list[Stage]]:
    about = Stage("about", [sys.executable, "-m", "bench.gpu.about"], 10 if not toy else 60)
    checks = [
        Stage(f"check-{rows}", _bench(toy, out, "kernels", "--only", "checks", "--checks", rows, "--minutes", "0.9",
                                      "--name", f"check-{rows}"), 74)
        for rows in (TOY if toy else FULL).checked
    ]  # fmt: skip
    tiny = Stage("tiny", _bench(toy, out, "gpu.tiny"), 74)
    judged = _bench(toy, out, "kernels", "--only", "judged", "--minutes", "0.8", "--name", "judged")
    judged += [] if toy else ["--models", "llama-3-8b"]
    sanitized = ["compute-sanitizer", "--launch-timeout", "60", *_bench(toy, out, "kernels", "--only", "checks",
                 "--checks", "rows" if toy else "700", "--minutes", "1", "--name", "sanitizer")]  # fmt: skip
    return [
        [about],
        [*checks, tiny],
        [Stage("judged", judged, 65)],
        [Stage("sanitizer", sanitized, 90, after="check", tool="compute-sanitizer")],
    ]


def _why(toy: bool, out: Path) -> list[list[Stage]]:
    step = [sys.executable, "-m", "bench.step", "--minutes", "3", "--out", str(out)]
    step += ["--shape", "toy", "--device", "cpu", "--threads", "1"] if toy else ["--shape", "llama-3-8b"]
    sweep = _bench(toy, out, "gpu.sweep", "--minutes", "1.5")
    profile = ["ncu", "--clock-control", "none", "--kernel-name", "regex:decode_kernel|prefill_kernel"]
    profile += ["--launch-skip", "2", "--launch-count", "4", "--section", "SpeedOfLight", "--section", "Occupancy"]
    profile += ["--section", "MemoryWorkloadAnalysis", "--section", "WarpStateStats", "--section", "LaunchStats"]
    methods = _bench(toy, out, "kernels", "--only", "methods", "--minutes", "1", "--name", "methods")
    return [
        [Stage("step", step, 220)],
        [Stage("sweep", sweep, 120)],
        [Stage("profile", [*profile, *_bench(toy, out, "gpu.sweep", "--once")], 80, tool="ncu")],
        [Stage("methods", methods, 100)],
    ]


def _tests(toy: bool, _out: Path) -> list[list[Stage]]:
    command = [sys.executable, "-m", "pytest", "-n", "4", "--dist", "loadfile", "-p", "no:cacheprovider"]
    command += ["tests/kernels", "tests/engine", "tests/cache", "tests/server"]
    device = {"DEVICE": "cpu" if toy else "cuda", "OMP_NUM_THREADS": "1"}
    return [] if toy else [[Stage("tests", command, LIMITS["tests"], device)]]
