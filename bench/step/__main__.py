"""One engine step. Where its time goes, or, of a known shape with random weights, how far it is from memory's floor.

    python -m bench.step --threads 1 --rows 1 8 --chunk 512         # by parts (bench.step.parts)
    python -m bench.step --shape llama-3-8b --contexts 32768 131072 # beside the floor (bench.step.floor), on a GPU
    python -m bench.step --shape toy --device cpu                   # proves the program, measures nothing

Nothing is downloaded for a shape, and no weight is written to a disk.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from bench.shared import options
from bench.shared.engines import model_options
from bench.shared.shapes import MODELS

TOY: dict[str, Any] = {"rows": [1, 2], "contexts": [48, 96], "prompt": 96, "budget": 48, "steps": 3, "rounds": 1}
TOY["methods"] = ["rope", "rerope"]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("step", __doc__)
    add = parser.add_argument
    model_options(parser)
    add("--rows", nargs="+", type=options.count, default=[1, 8], help="sequences in a decode step")
    add("--steps", type=options.count, default=40, help="decode steps; a tenth of that are prefill chunks")
    add = parser.add_argument_group("by parts").add_argument
    add("--weights", choices=["none", "int8"], default="none", help="WEIGHT_QUANTIZATION")
    add("--method", default="auto", help="position method")
    add("--context", type=int, default=128, help="prompt tokens before a decode step")
    add("--chunk", type=int, default=512, help="rows of the prefill chunk; 0 leaves it out")
    add("--held", type=int, default=0, help="sequences beside them whose replies match an expression with slow masks")
    add = parser.add_argument_group("beside the floor").add_argument
    add("--shape", choices=list(MODELS), help="random weights of this shape, in bfloat16 unless --dtype says otherwise")
    add("--methods", nargs="+", default=["rope", "rerope", "dynamic_leaky"], help="compared with the first")
    add("--contexts", nargs="+", type=options.count, default=[32768, 131072], help="tokens in the cache before a step")
    add("--prompt", type=int, default=32768, help="tokens of the prompt that is prefilled; 0 leaves it out")
    add("--budget", type=options.count, default=2048, help="MAX_BATCHED_TOKENS")
    add("--rounds", type=options.count, default=3, help="each measures every case once")
    add("--minutes", type=float, default=3.5, help="no case begins after these")
    if parser.parse_args(arguments).shape == "toy":
        parser.set_defaults(**TOY)
    asked = parser.parse_args(arguments)
    if len(set(asked.methods)) < len(asked.methods):
        parser.error(f"--methods {' '.join(asked.methods)}: each once")
    return asked


def main(arguments: Sequence[str] | None) -> int:
    asked, console = parse_arguments(arguments), options.console()
    torch.set_num_threads(asked.threads)
    # Imported as asked for: the floor needs torch and transformers only, and nothing of the HTTP server.
    if asked.shape is None:
        from bench.step import parts

        return parts.run(asked, console)
    from bench.step import floor

    return floor.run(asked, console)


if __name__ == "__main__":
    options.run("step", main)
