"""What is asked of a card: the stages of each part, in groups whose processes run at once."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.kernels.cases import FULL, TOY
from bench.shared.machine import free_port

PARTS = ("A", "B", "tests")
LIMITS = {"A": 150.0, "B": 540.0, "tests": 900.0}
"""Seconds, of which the groups' own limits are the sum at most."""

TOY_PATIENCE = 5
"""At toy size a stage has its limit so many times: that of a card's time is no measure of an interpreter's."""

MODEL = Path(__file__).parent.parent.parent / "build" / "gpu" / "llama-3-8b"
"""16 GB, made once and left there (git-ignored); the name is a shape of `bench.shared.shapes`."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One process.

    Attributes:
        limit_s: it is ended then.
        variables: added to its environment.
        after: run only where a stage whose name begins so has failed; it does not count to `LIMITS`.
        tool, modules: an executable, and what is imported, without which the stage is left out.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    variables: Mapping[str, str] = field(default_factory=dict)
    after: str | None = None
    tool: str | None = None
    modules: Sequence[str] = ()


FAILED = "the length of rows that failed"
"""In the command of a stage with `after`: what is after the prefix in the name of the first that failed."""

OF_SERVER = ("fastapi", "llguidance", "pydantic_settings", "sse_starlette", "structlog", "uvicorn")
OF_TESTS = (*OF_SERVER, "gguf", "httpx", "hypothesis", "pytest", "xdist")
OF_CLIENTS = (*OF_TESTS, "anthropic", "jsonschema", "ollama", "openai")

GRAPHS = ("-m", "", "tests/kernels", "tests/engine/graphs", "--ignore", "tests/kernels/test_compilation.py")
"""The slow among them, too: they are slow in the interpreter alone."""
ENGINE = (
    *("tests/engine/test_engine.py", "tests/engine/overlap", "tests/engine/test_invariance.py"),
    *("tests/engine/sampling/test_device_sampler.py", "tests/engine/memory", "tests/engine/test_batch.py"),
    "tests/engine/models/test_families.py",
)
SERVER = (
    *("tests/server/api/test_generate.py", "tests/server/api/test_stream.py", "tests/server/api/test_openai.py"),
    *(
        "tests/server/api/test_positions.py",
        "tests/server/structured/test_structured.py",
        "tests/server/test_health.py",
    ),
)
"""Of the tests of the engine and of the server those that say most of a card, first."""


def stages(part: str, *, toy: bool, out: Path) -> list[list[Stage]]:
    """Groups, one after the other."""
    made = {"A": _right_and_headline, "B": _why, "tests": _tests}[part](toy, out)
    if toy:
        return [[replace(one, limit_s=TOY_PATIENCE * one.limit_s) for one in group] for group in made]
    whole = sum(max([one.limit_s for one in group if one.after is None], default=0.0) for group in made)
    assert whole <= LIMITS[part]
    return made


def _bench(toy: bool, out: Path, module: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", f"bench.{module}", *arguments, "--out", str(out)]
    return [*command, "--toy"] if toy else command


def _right_and_headline(toy: bool, out: Path) -> list[list[Stage]]:
    about = Stage("about", [sys.executable, "-m", "bench.gpu.about"], 10)
    checks = [
        Stage(f"check-{rows}", _bench(toy, out, "kernels", "--only", "checks", "--checks", rows, "--minutes", "0.9",
                                      "--name", f"check-{rows}"), 74)
        for rows in (TOY if toy else FULL).checked
    ]  # fmt: skip
    tiny = Stage("tiny", _bench(toy, out, "gpu.tiny"), 74)
    judged = _bench(toy, out, "kernels", "--only", "judged", "--minutes", "0.8", "--name", "judged")
    judged += [] if toy else ["--models", "llama-3-8b"]
    sanitized = ["compute-sanitizer", "--launch-timeout", "60", *_bench(toy, out, "kernels", "--only", "checks",
                 "--checks", FAILED, "--minutes", "1", "--name", "sanitizer")]  # fmt: skip
    return [
        [about],
        [*checks, tiny],
        [Stage("judged", judged, 65)],
        [Stage("sanitizer", sanitized, 90, after="check-", tool="compute-sanitizer")],
    ]


def _why(toy: bool, out: Path) -> list[list[Stage]]:
    step = [sys.executable, "-m", "bench.step", "--minutes", "2.0", "--out", str(out)]
    step += ["--shape", "toy", "--device", "cpu", "--threads", "1"] if toy else ["--shape", "llama-3-8b"]
    sweep = _bench(toy, out, "gpu.sweep", "--minutes", "1.1")
    profile = ["ncu", "--clock-control", "none", "--kernel-name", "regex:decode_kernel|prefill_kernel"]
    profile += ["--launch-skip", "2", "--launch-count", "4", "--section", "SpeedOfLight", "--section", "Occupancy"]
    profile += ["--section", "MemoryWorkloadAnalysis", "--section", "WarpStateStats", "--section", "LaunchStats"]
    model = out / "toy-model" if toy else MODEL
    weights = [sys.executable, "-m", "bench.gpu.model", str(model), "--shape", "toy" if toy else model.name]
    methods = _bench(toy, out, "kernels", "--only", "methods", "--minutes", "1", "--name", "methods")
    return [
        [Stage("step", step, 150)],
        [Stage("sweep", sweep, 90)],
        [Stage("profile", [*profile, *_bench(toy, out, "gpu.sweep", "--once")], 60, tool="ncu"),
         Stage("model", weights, 60, modules=OF_SERVER)],
        [Stage("serving", _serving(toy, out, model), 115, modules=OF_SERVER)],
        [Stage("methods", methods, 90), *_on_the_card("graphs", GRAPHS, 120, toy=toy),
         *_on_the_card("engine", ENGINE, 120, toy=toy), *_on_the_card("server", SERVER, 120, OF_CLIENTS, toy=toy)],
    ]  # fmt: skip


def _serving(toy: bool, out: Path, model: Path) -> list[str]:
    """64 streams, and a prompt of 128 Ki tokens, at `python -m prerope.server` over that folder."""
    url, points = f"http://127.0.0.1:{free_port()}", "64x1,64x4,300x1" if toy else "1024x1,1024x64,131072x1"
    server = [sys.executable, "-m", "prerope.server", "--model-id", str(model), "--port", url.rpartition(":")[2]]
    server += ["--device", "cpu" if toy else "cuda", "--max-model-len", "400" if toy else "131200"]
    server += ["--max-num-seqs", "64", "--rope-per-request", "false"]
    command = [
        sys.executable,
        "-m",
        "bench.serving",
        "--url",
        f"ours={url}/v1",
        "--launch",
        f"ours={shlex.join(server)}",
    ]
    command += ["--tokenizer", str(model), "--points", points, "--output-tokens", "8" if toy else "64", "--rounds", "1"]
    return [*command, "--ready-timeout", "90", "--out", str(out)]


def _on_the_card(
    name: str, paths: Sequence[str], limit_s: float, modules: Sequence[str] = OF_TESTS, *, toy: bool
) -> list[Stage]:
    """Tests, in the order of their paths; there are none of a card at toy size. A file that cannot be imported there
    fails alone."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "5", "--dist", "loadfile"]
    stage = Stage(
        name,
        [*command, "--no-loadscope-reorder", "--continue-on-collection-errors", "-m", "not slow", *paths],
        limit_s,
        {"DEVICE": "cuda", "OMP_NUM_THREADS": "1"},
        modules=modules,
    )
    return [] if toy else [stage]


def _tests(toy: bool, _out: Path) -> list[list[Stage]]:
    """Each with a limit of its own: one that hangs costs itself alone."""
    rest = ["--ignore", "tests/engine/graphs", *(word for path in ENGINE for word in ("--ignore", path))]
    served = [word for path in SERVER for word in ("--ignore", path)]
    return [
        group
        for group in (
            _on_the_card("graphs", GRAPHS, 120, toy=toy),
            _on_the_card("engine", ENGINE, 120, toy=toy),
            _on_the_card("server", SERVER, 120, OF_CLIENTS, toy=toy),
            _on_the_card("cache", ["tests/cache"], 120, toy=toy),
            _on_the_card("rest-of-engine", ["tests/engine", *rest], 210, toy=toy),
            _on_the_card("rest-of-server", ["tests/server", *served], 210, OF_CLIENTS, toy=toy),
        )
        if group
    ]
