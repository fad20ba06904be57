"""All that a GPU is asked, in one command that leaves one folder.

    python -m bench.gpu --tests 0     # on a machine with a card: kernels and steps; ends within ten minutes
    python -m bench.gpu               # then the tests on the card, for 15 minutes at most
    python -m bench.gpu --toy         # at toy size without a card: proves the program, measures nothing

    kernels   bench.kernels: are results right, and how fast is each kernel beside the card's limits and its peers
    step      bench.step --shape llama-3-8b: decode steps beside memory's floor, and prefill
    tests     the project's own, with DEVICE=cuda

Each stage is a process of its own that is told when to stop, and is ended a minute after; one that fails does not keep
the others from running. Of each stage the folder has NAME.log, and NAME.json and NAME.md where it measures; results.md
holds all tables, the card's name with them. The exit status is 1 when a stage failed: a wrong result, an exception, a
test, a limit. A target that is missed is told in the tables and fails nothing.

It needs torch with CUDA, Triton, transformers, rich, a C compiler and Python's headers (Triton builds its launcher with
them), and no network; the tests need what pyproject.toml lists under `test`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import BenchError
from bench.shared import options
from bench.shared.report import Table

ROOT = Path(__file__).parent.parent
GRACE_S = 60.0
"""From when a stage should stop by itself until it is ended."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One process. variables: added to its environment."""

    name: str
    command: Sequence[str]
    limit_s: float
    variables: Mapping[str, str] = field(default_factory=dict)


def stages(asked: argparse.Namespace) -> list[Stage]:
    """Those with more than 0 minutes."""
    kernels = [sys.executable, "-m", "bench.kernels", "--minutes", str(asked.kernels), "--out", str(asked.out)]
    step = [sys.executable, "-m", "bench.step", "--minutes", str(asked.step), "--out", str(asked.out)]
    tests = [sys.executable, "-m", "pytest", "-n", "4", "--dist", "loadfile", "-p", "no:cacheprovider"]
    if asked.toy:
        kernels, step = [*kernels, "--toy"], [*step, "--shape", "toy", "--device", "cpu", "--threads", "1"]
    else:
        step += ["--shape", "llama-3-8b", "--device", "cuda"]
    device = {"DEVICE": "cpu" if asked.toy else "cuda", "OMP_NUM_THREADS": "1"}
    found = [
        (asked.kernels, Stage("kernels", kernels, 60 * asked.kernels + GRACE_S)),
        (asked.step, Stage("step", step, 60 * asked.step + GRACE_S)),
        (asked.tests, Stage("tests", tests, 60 * asked.tests, device)),
    ]
    return [stage for minutes, stage in found if minutes > 0]


def run(stage: Stage, folder: Path) -> list[str]:
    """To its end or its limit; what it prints goes on and to NAME.log. [name, minutes, ending, last line]."""
    for suffix in ("json", "md", "log"):  # of an earlier run
        (folder / f"{stage.name}.{suffix}").unlink(missing_ok=True)
    began, last, cut = time.monotonic(), "", threading.Event()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.variables}
    with (
        (folder / f"{stage.name}.log").open("w", encoding="utf-8") as log,
        subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        ) as process,
    ):  # fmt: skip

        def end() -> None:
            cut.set()
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too

        timer = threading.Timer(stage.limit_s, end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
                last = line.strip() or last
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:  # interrupted
                os.killpg(process.pid, signal.SIGKILL)
    told = "ended at its limit" if cut.is_set() else "done" if status == 0 else f"failed, status {status}"
    return [stage.name, f"{(time.monotonic() - began) / 60:.1f}", told, last]


def results(endings: Sequence[list[str]], command: str, folder: Path) -> str:
    """A section for RESULTS.md: the card, how each stage ended, and the tables of those that measured."""
    found = [folder / f"{name}.json" for name in ("kernels", "step")]
    cards = [json.loads(path.read_text(encoding="utf-8"))["machine"]["device"] for path in found if path.exists()]
    table = Table(["stage", "minutes", "ended"], [ending[:3] for ending in endings], left=(0, 2))
    parts = [f"## GPU: {(cards or ['not measured'])[0]}", f"```sh\n{command}\n```", table.markdown()]
    for name, _, _, last in endings:
        tables = folder / f"{name}.md"
        told = tables.read_text(encoding="utf-8") if tables.exists() else f"Its last line: `{last}`"
        parts += [f"### {name}", told.strip()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("gpu", __doc__, "gpu")
    add = parser.add_argument
    add("--toy", action="store_true", help="toy sizes on the CPU, kernels under Triton's interpreter, no tests")
    add("--kernels", type=float, default=4.0, metavar="MINUTES", help="0 leaves the stage out")
    add("--step", type=float, default=3.5, metavar="MINUTES", help="0 leaves the stage out")
    add("--tests", type=float, metavar="MINUTES", help="15, and none with --toy; 0 leaves the stage out")
    asked = parser.parse_args(arguments)
    if asked.tests is None:
        asked.tests = 0.0 if asked.toy else 15.0
    asked.out = asked.out.absolute()
    if importlib.util.find_spec("triton") is None:
        raise BenchError("Triton is not installed; pip install -e '.[test,bench]' brings all")
    if not asked.toy and not torch.cuda.is_available():
        raise BenchError("torch sees no CUDA device; --toy needs none")
    asked.out.mkdir(parents=True, exist_ok=True)
    command = "python -m bench.gpu" + (" --toy" if asked.toy else "")
    command += f" --kernels {asked.kernels:g} --step {asked.step:g} --tests {asked.tests:g}"
    endings: list[list[str]] = []
    for stage in stages(asked):
        print(f"--- {stage.name}, at most {stage.limit_s / 60:.1f} minutes", flush=True)
        endings.append(run(stage, asked.out))
        # Written after each stage: what comes later may not end.
        (asked.out / "results.md").write_text(results(endings, command, asked.out), encoding="utf-8")
    for name, minutes, told, last in endings:
        print(f"{name}: {told} after {minutes} minutes; {last}")
    return int(any(told != "done" for _, _, told, _ in endings))


if __name__ == "__main__":
    options.run("gpu", main)
