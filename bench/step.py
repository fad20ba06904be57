"""One engine step. Where its time goes, or, of a known shape with random weights, how far it is from memory's floor.

    python -m bench.step --threads 1 --rows 1 8 --chunk 512         # by parts (bench.step_parts)
    python -m bench.step --shape llama-3-8b --contexts 32768 131072 # beside the floor (bench.step_floor), on a GPU
    python -m bench.step --shape toy --device cpu                   # proves the program, measures nothing

Nothing is downloaded for a shape, and no weight is written to a disk.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import OUTPUT_FOLDER, WIDTH
from bench.shared.shapes import MODELS

TOY: dict[str, Any] = {"rows": [1, 2], "contexts": [48, 96], "prompt": 96, "budget": 48, "steps": 3, "rounds": 1}
TOY["methods"] = ["rope", "rerope"]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.step", description="Where the time of one engine step goes.")
    add = parser.add_argument
    add("--dtype", default="auto")
    add("--device", default="auto")
    add("--rows", nargs="+", type=int, default=[1, 8], help="sequences in a decode step")
    add("--steps", type=int, default=40, help="decode steps; a tenth of that are prefill chunks")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--out", type=Path, default=OUTPUT_FOLDER, help="folder for step.json")
    add = parser.add_argument_group("by parts").add_argument
    add("--model", help="a folder or a hub id; the embedded model when left out")
    add("--weights", choices=["none", "int8"], default="none", help="WEIGHT_QUANTIZATION")
    add("--method", default="auto", help="position method")
    add("--context", type=int, default=128, help="prompt tokens before a decode step")
    add("--chunk", type=int, default=512, help="rows of the prefill chunk; 0 leaves it out")
    add = parser.add_argument_group("beside the floor").add_argument
    add("--shape", choices=list(MODELS), help="random weights of this shape, in bfloat16 unless --dtype says otherwise")
    add("--methods", nargs="+", default=["rope", "rerope", "dynamic_leaky"], help="compared with the first")
    add("--contexts", nargs="+", type=int, default=[32768, 131072], help="tokens in the cache before a decode step")
    add("--prompt", type=int, default=32768, help="tokens of the prompt that is prefilled; 0 leaves it out")
    add("--budget", type=int, default=2048, help="MAX_BATCHED_TOKENS")
    add("--rounds", type=int, default=3, help="each measures every case once")
    add("--minutes", type=float, default=3.5, help="no case begins after these")
    if parser.parse_args(arguments).shape == "toy":
        parser.set_defaults(**TOY)
    options = parser.parse_args(arguments)
    for name in ("rows", "contexts", "steps", "rounds", "budget"):
        least = min(given) if isinstance(given := getattr(options, name), list) else given
        if least < 1:
            parser.error(f"--{name} {least}: must be at least 1")
    if len(set(options.methods)) < len(options.methods):
        parser.error(f"--methods {' '.join(options.methods)}: each once")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    # Imported as asked for: the floor needs torch and transformers only, and nothing of the HTTP server.
    if options.shape is None:
        from bench import step_parts

        step_parts.run(options, console)
        return 0
    from bench import step_floor

    return step_floor.run(options, console)


if __name__ == "__main__":
    sys.exit(main())
