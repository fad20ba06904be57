"""All that a GPU is asked, in the order that makes the most of a short time, in one folder.

    python -m bench.gpu A              # is it right, and the headline figures; ends within 150 s
    python -m bench.gpu B              # what it takes to say why, and to mend it; within 540 s
    python -m bench.gpu tests          # the project's own tests on the card, for 15 minutes at most
    python -m bench.gpu                # all three
    python -m bench.gpu A B --toy      # at toy size without a card: proves the program, measures nothing
    python -m bench.gpu A --beside bench/out/before/results.json

docs/gpu.md says what a machine without a network needs, and the command lines.

A   about     the card, its clocks, versions, and which peers and tools there are
    check-*   bench.kernels: is every row right, at four lengths, each in a process of its own, all at once
    tiny      bench.gpu.tiny: logits of graphs are those of steps, two engines in one process, stack and graphs found
    judged    bench.kernels: the figures that targets are about, beside copy and product rates of a warm card
    sanitizer only where a check failed: compute-sanitizer on the first that did
B   step      bench.step --shape llama-3-8b: decode steps beside memory's floor, and prefill
    sweep     bench.gpu.sweep: other tile sizes, and the order of the grid
    profile   ncu on both kernels, while
    model     bench.gpu.model writes an 8B-shaped model into a folder, once
    serving   bench.serving: `python -m prerope.server` over that folder, 64 streams, and a prompt of 128 Ki tokens
    methods   bench.kernels: is every other method right, beside
    graphs    the tests of kernels, layers and graphs, on the card; beside them
    engine    the most telling tests of the engine, and
    server    of the server

Each stage is a process that is told when to stop, and is ended soon after; one that fails does not keep the others from
running. Of each the folder has NAME.log, with tracebacks, and NAME.json and NAME.md where it measures; results.md holds
all tables, and results.json every figure, for the next run to be laid beside. The exit status is 1 when a stage failed:
a wrong result, an exception, a test, a limit. A target that is missed is told in the tables and fails nothing.

A and B need torch with CUDA, Triton, transformers, accelerate, rich, psutil, a C compiler and Python's headers (Triton
builds its launcher with them), and no network. What needs the server's packages (model, serving) or those of the tests
(graphs, tests) is left out where one of them is not there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench import BenchError
from bench.gpu.figures import results, save
from bench.gpu.running import Ending, run_all
from bench.gpu.stages import FAILED, PARTS, Stage, stages
from bench.shared import options
from bench.shared.machine import card


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("gpu", __doc__, "gpu")
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}, in this order; all when left out")
    options.toy(parser)
    add("--only", nargs="+", metavar="STAGE", help="of the parts, these stages alone")
    add("--beside", type=Path, help="results.json of an earlier run, whose figures are shown beside these")
    asked = parser.parse_args(arguments)
    asked.parts = asked.parts or list(PARTS)
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: of {', '.join(PARTS)}")
    asked.out = asked.out.absolute()
    if importlib.util.find_spec("triton") is None:
        raise BenchError("Triton is not installed; pip install -e '.[test,bench]' brings all")
    card(asked.toy)
    if asked.beside is not None and not asked.beside.is_file():
        raise BenchError(f"--beside {asked.beside}: there is no such file")
    asked.out.mkdir(parents=True, exist_ok=True)
    command = "python -m bench.gpu " + " ".join([*asked.parts, *(["--toy"] if asked.toy else [])])
    endings: list[Ending] = []
    for part in asked.parts:
        groups = [_chosen(group, asked.only) for group in stages(part, toy=asked.toy, out=asked.out)]
        for group in filter(None, groups):
            wanted = [found for stage in group if (found := _wanted(stage, endings)) is not None]
            print(f"--- {part}: {', '.join(stage.name for stage in wanted)}", flush=True)
            endings += run_all(wanted, asked.out)
            # Written after each group: what comes later may not end.
            save(endings, command, asked.out, asked.beside)
    print(results(endings, command, asked.out, asked.beside))
    for ending in endings:
        print(f"{ending.name}: {ending.told} after {ending.seconds:.0f} s; {ending.last}")
    return int(any(ending.failed for ending in endings))


def _chosen(group: Sequence[Stage], names: Sequence[str] | None) -> list[Stage]:
    return [stage for stage in group if names is None or stage.name in names]


def _wanted(stage: Stage, endings: Sequence[Ending]) -> Stage | None:
    """The stage, told what failed; None where it is to look into a failure and there is none."""
    if stage.after is None:
        return stage
    failed = [ending.name for ending in endings if ending.failed and ending.name.startswith(stage.after)]
    if not failed:
        return None
    first = failed[0].removeprefix(stage.after)
    return replace(stage, command=[first if word == FAILED else word for word in stage.command])


if __name__ == "__main__":
    options.run("gpu", main)
