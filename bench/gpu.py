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

from bench import OUTPUT_FOLDER

ROOT = Path(__file__).parent.parent
NEEDED = ("triton", "transformers", "rich", "psutil")
GRACE_S = 60.0
"""From when a stage should stop by itself until it is ended."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One process. variables: added to its environment."""

    name: str
    command: Sequence[str]
    limit_s: float
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a stage ended; `last` is the last line that it printed."""

    name: str
    status: int
    seconds: float
    cut: bool
    last: str

    @property
    def told(self) -> str:
        if self.cut:
            return "ended at its limit"
        return "done" if self.status == 0 else f"failed, status {self.status}"


def stages(options: argparse.Namespace) -> list[Stage]:
    """Those with more than 0 minutes."""
    kernels = [sys.executable, "-m", "bench.kernels", "--minutes", str(options.kernels), "--out", str(options.out)]
    step = [sys.executable, "-m", "bench.step", "--minutes", str(options.step), "--out", str(options.out)]
    tests = [sys.executable, "-m", "pytest", "-n", "4", "--dist", "loadfile", "-p", "no:cacheprovider"]
    if options.toy:
        kernels, step = [*kernels, "--toy"], [*step, "--shape", "toy", "--device", "cpu", "--threads", "1"]
    else:
        step += ["--shape", "llama-3-8b", "--device", "cuda"]
    device = {"DEVICE": "cpu" if options.toy else "cuda", "OMP_NUM_THREADS": "1"}
    found = [
        (options.kernels, Stage("kernels", kernels, 60 * options.kernels + GRACE_S)),
        (options.step, Stage("step", step, 60 * options.step + GRACE_S)),
        (options.tests, Stage("tests", tests, 60 * options.tests, device)),
    ]
    return [stage for minutes, stage in found if minutes > 0]


def run(stage: Stage, folder: Path) -> Ending:
    """To its end or its limit; what it prints goes to the terminal and to NAME.log."""
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
    return Ending(stage.name, status, time.monotonic() - began, cut.is_set(), last)


def results(endings: Sequence[Ending], command: str, folder: Path) -> str:
    """A section for RESULTS.md: the card, how each stage ended, and the tables of those that measured."""
    lines = [f"## GPU: {_card(folder)}", "", "```sh", command, "```", ""]
    lines += ["| stage | minutes | ended |", "|---|---:|---|"]
    lines += [f"| {ending.name} | {ending.seconds / 60:.1f} | {ending.told} |" for ending in endings]
    for ending in endings:
        tables = folder / f"{ending.name}.md"
        told = tables.read_text(encoding="utf-8").strip() if tables.exists() else f"Its last line: `{ending.last}`"
        lines += ["", f"### {ending.name}", "", told]
    return "\n".join(lines) + "\n"


def _card(folder: Path) -> str:
    for name in ("kernels", "step"):
        path = folder / f"{name}.json"
        if path.exists():
            return str(json.loads(path.read_text(encoding="utf-8"))["machine"]["device"])
    return "not measured"


def missing(toy: bool) -> str | None:
    """Why nothing can run here; None where it can."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}; pip install -e '.[test,bench]' brings all"
    if not toy and not torch.cuda.is_available():
        return "torch sees no CUDA device; --toy needs none"
    return None


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu", description="All that a GPU is asked, in one command.")
    add = parser.add_argument
    add("--toy", action="store_true", help="toy sizes on the CPU, kernels under Triton's interpreter, no tests")
    add("--kernels", type=float, default=4.0, metavar="MINUTES", help="default: 4; 0 leaves the stage out")
    add("--step", type=float, default=3.5, metavar="MINUTES", help="default: 3.5; 0 leaves the stage out")
    add("--tests", type=float, metavar="MINUTES", help="default: 15; 0 leaves the stage out")
    add("--out", type=Path, default=OUTPUT_FOLDER / "gpu", help="folder of all files; default: bench/out/gpu")
    options = parser.parse_args(arguments)
    if options.tests is None:
        options.tests = 0.0 if options.toy else 15.0
    options.out = options.out.absolute()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    reason = missing(options.toy)
    if reason is not None:
        print(f"bench.gpu: {reason}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    command = "python -m bench.gpu" + (" --toy" if options.toy else "")
    command += f" --kernels {options.kernels:g} --step {options.step:g} --tests {options.tests:g}"
    endings: list[Ending] = []
    for stage in stages(options):
        print(f"--- {stage.name}, at most {stage.limit_s / 60:.1f} minutes", flush=True)
        endings.append(run(stage, options.out))
        # Written after each stage: what comes later may not end.
        (options.out / "results.md").write_text(results(endings, command, options.out), encoding="utf-8")
    for ending in endings:
        print(f"{ending.name}: {ending.told} after {ending.seconds / 60:.1f} minutes; {ending.last}")
    return 1 if any(ending.status for ending in endings) else 0


if __name__ == "__main__":
    sys.exit(main())
