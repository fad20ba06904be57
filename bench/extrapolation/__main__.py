"""Su's extrapolation tables (spaces.ac.cn 9708), from small models trained from scratch.

    python -m bench.extrapolation                     # about an hour on two CPU cores
    python -m bench.extrapolation --size large --device cuda

Three trainings a seed at N tokens: without log-n, with log-n, HFWA. Each position method then reads the first two at 8N
tokens of held-out text, repeated and not. Everything is kept in the output folder as it is made: the same command goes
on after an interruption, and prints the tables at once where all is there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.extrapolation.model import Model, Shape
from bench.extrapolation.report import Extrapolated, report
from bench.extrapolation.rows import EXTENSION, VARIANTS, Row, distinct_rows, measure, trained_accuracy
from bench.extrapolation.text import Text, baselines, held_out_rows, prepare, write_whole
from bench.extrapolation.training import OtherTraining, Recipe, train
from bench.shared import options
from bench.shared.machine import cpu_name


@dataclass(frozen=True, slots=True)
class Size:
    """Of models, trainings and tests. `rows` held-out texts of each kind are tested, `at_once` of them together."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    train_length: int
    steps: int
    batch: int
    rows: int
    at_once: int

    def shape(self, variant: str) -> Shape:
        return Shape(variant, self.vocabulary, self.layers, self.width, self.heads, self.train_length)


SIZES = {
    "small": Size(1024, 4, 128, 4, 128, steps=1400, batch=16, rows=16, at_once=1),
    "large": Size(2048, 6, 384, 6, 512, steps=1500, batch=48, rows=16, at_once=16),
}


def run_seed(size: Size, seed: int, text: Text, folder: Path, device: str) -> None:
    """Train what is not trained and measure what is not measured; results are kept row by row."""
    texts = held_out_rows(text, size.rows, size.train_length * EXTENSION, size.train_length)
    path = folder / "results.json"
    results = read_results(path, size)
    results.setdefault("baselines", baselines(text, texts["plain"]))
    on_device = {name: rows.to(device) for name, rows in texts.items()}
    for variant in VARIANTS:
        recipe = Recipe(size.steps, size.batch, seed)
        model = train(size.shape(variant), recipe, text.train, folder / variant, device)
        if variant not in results["trained"]:
            results["trained"][variant] = trained_accuracy(model, on_device["plain"], size.at_once)
        wanted = [row for row in distinct_rows(size.train_length) if row.variant == variant]
        measure_rows(model, [row for row in wanted if row.label not in results["rows"]], on_device, size, results, path)


def measure_rows(
    model: Model, rows: Sequence[Row], texts: dict[str, torch.Tensor], size: Size, results: dict[str, Any], path: Path
) -> None:
    with tqdm(rows, unit=" rows", mininterval=2) as bar:
        for row in bar:
            bar.set_description(row.label)
            results["rows"][row.label] = measure(model, row, texts, size.at_once)
            write_whole(path, json.dumps(results, indent=1))
    write_whole(path, json.dumps(results, indent=1))


def read_results(path: Path, size: Size) -> dict[str, Any]:
    """What a seed's folder holds. Raises OtherTraining where it is of another size."""
    empty: dict[str, Any] = {"size": asdict(size), "trained": {}, "rows": {}}
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else empty
    if results["size"] != asdict(size):
        raise OtherTraining(f"{path.parent.name} holds results of {results['size']}: choose another --out")
    return results


def read_found(size: Size, seeds: Sequence[int], folder: Path, device: str) -> Extrapolated:
    """Of what the folder holds now."""
    shape = size.shape("hfwa")
    parameters = sum(parameter.numel() for parameter in Model(shape, 0).parameters())
    machine = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    about = asdict(size) | {
        "seeds": list(seeds),
        "parameters": parameters,
        "hfwa_window": shape.hfwa_window,
        "machine": machine,
        "torch": torch.__version__,
    }
    results = [read_results(folder / f"seed-{seed}" / "results.json", size) for seed in seeds]
    return Extrapolated(size.train_length, results, about)


def main(arguments: Sequence[str] | None) -> int:
    parser = options.parser("extrapolation", __doc__, "extrapolation")
    add = parser.add_argument
    add("--size", choices=SIZES, default="small")
    add("--seeds", type=lambda text: [int(part) for part in text.split(",")], default="0,1", metavar="N,N",
        help="of weights and batches")  # fmt: skip
    add("--device", default="cpu", help="cpu or cuda")
    add("--report-only", action="store_true", help="print and write what has been measured so far, and run nothing")
    asked, console = parser.parse_args(arguments), options.console()
    size, folder = SIZES[asked.size], asked.out / asked.size
    if asked.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32: ten times the speed for 10 bits of each factor
    if not asked.report_only:
        text = prepare(folder / "text", size.vocabulary)
        console.print(f"{len(text.train):,} training tokens, {len(text.held_out)} held-out files")
        for seed in asked.seeds:
            run_seed(size, seed, text, folder / f"seed-{seed}", asked.device)
    report(read_found(size, asked.seeds, folder, asked.device)).publish(folder, console)
    return 0


if __name__ == "__main__":
    options.run("extrapolation", main)
