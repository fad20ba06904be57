"""Trains one small model, so that an interruption costs at most `SAVE_EVERY` steps and changes nothing.

A model's folder holds `model.json` (shape, recipe, losses) and, while training, `training.pt`: weights and both
optimisers' whole state after a step. At the end `weights.safetensors` takes its place. Step n draws its rows from
a generator seeded by (seed, n), so that a resumed run goes on bit for bit, on the same machine with as many threads.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Muon, Optimizer
from tqdm import tqdm

from bench import BenchError
from bench.extrapolation.model import Model, Shape, TrainedAttention
from bench.extrapolation.text import write_whole

SAVE_EVERY = 100  # steps


@dataclass(frozen=True, slots=True)
class Recipe:
    """Muon for the matrices of the blocks, AdamW for the rest; warm-up, then a straight line to zero."""

    steps: int
    batch: int
    seed: int
    matrix_rate: float = 0.02
    vector_rate: float = 3e-3
    warmup: int = 50
    clip: float = 1.0

    def factor(self, step: int) -> float:
        """Of the learning rates at this step, 0-based."""
        return min((step + 1) / self.warmup, (self.steps - step) / max(1, self.steps - self.warmup), 1.0)


class OtherTraining(BenchError):
    """The folder holds a model of another shape or recipe."""


def train(
    shape: Shape, recipe: Recipe, stream: Tensor, folder: Path, device: str, stop_after: int | None = None
) -> Model:
    """The trained model, from `folder` as far as it is there.

    stream: [T] int64 training tokens. stop_after: leave after this step as an interruption would (for tests).
    Raises OtherTraining.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = _open_log(folder, shape, recipe)
    model = Model(shape, recipe.seed).to(device)
    if (folder / "weights.safetensors").exists():
        model.load_state_dict(load_file(folder / "weights.safetensors", device=device))
        return model
    optimizers = make_optimizers(model, recipe)
    first = restore(model, optimizers, folder / "training.pt")
    attention = TrainedAttention(shape, shape.train_length, device)
    label = f"{shape.variant}, seed {recipe.seed}"
    with tqdm(initial=first, total=recipe.steps, desc=label, unit=" steps", mininterval=2, smoothing=0.05) as bar:
        for step in range(first, recipe.steps):
            loss = train_step(
                model, optimizers, attention, batch_at(step, shape, recipe, stream).to(device), recipe, step
            )
            if step % 20 == 19 or step + 1 == recipe.steps:
                log["losses"][str(step + 1)] = float(loss)
                bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
            bar.update()
            if step + 1 == stop_after:
                return model
            if (step + 1) % SAVE_EVERY == 0:
                keep(model, optimizers, step + 1, folder / "training.pt")
                write_whole(folder / "model.json", json.dumps(log, indent=1))
    write_whole(folder / "model.json", json.dumps(log, indent=1))
    save_file(model.state_dict(), folder / "weights.unfinished")
    os.replace(folder / "weights.unfinished", folder / "weights.safetensors")
    (folder / "training.pt").unlink(missing_ok=True)
    return model


def _open_log(folder: Path, shape: Shape, recipe: Recipe) -> dict[str, Any]:
    log: dict[str, Any] = {"shape": dataclasses.asdict(shape), "recipe": dataclasses.asdict(recipe), "losses": {}}
    path = folder / "model.json"
    if not path.exists():
        write_whole(path, json.dumps(log, indent=1))
        return log
    kept: dict[str, Any] = json.loads(path.read_text())
    if (kept["shape"], kept["recipe"]) != (log["shape"], log["recipe"]):
        raise OtherTraining(
            f"{folder.name} holds a model of {kept['shape']}, {kept['recipe']}, and {log['shape']}, {log['recipe']} is "
            "wanted: choose another --out, or delete the folder"
        )
    return kept


def batch_at(step: int, shape: Shape, recipe: Recipe, stream: Tensor) -> Tensor:
    """[batch, N + 1] token ids: pieces of the stream from random places."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - shape.train_length, (recipe.batch,), generator=generator)
    return torch.stack([stream[start : start + shape.train_length + 1] for start in starts.tolist()])


def train_step(
    model: Model, optimizers: list[Optimizer], attention: TrainedAttention, rows: Tensor, recipe: Recipe, step: int
) -> Tensor:
    """One update; the loss before it, in nats a token."""
    loss = cross_entropy(model(rows[:, :-1], attention).flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * recipe.factor(step)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def make_optimizers(model: Model, recipe: Recipe) -> list[Optimizer]:
    named = [(name.startswith("blocks.") and p.ndim == 2, p) for name, p in model.named_parameters()]
    matrices, rest = ([p for matrix, p in named if matrix == wanted] for wanted in (True, False))
    muon = Muon([{"params": matrices, "initial_lr": recipe.matrix_rate}], weight_decay=0.0)
    adamw = AdamW([{"params": rest, "initial_lr": recipe.vector_rate}], betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def keep(model: Model, optimizers: list[Optimizer], step: int, path: Path) -> None:
    """Weights and optimiser state after `step` steps."""
    states = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    unfinished = path.with_suffix(".unfinished")
    torch.save(states, unfinished)
    os.replace(unfinished, path)


def restore(model: Model, optimizers: list[Optimizer], path: Path) -> int:
    """The step to go on with; 0 where nothing is kept."""
    if not path.exists():
        return 0
    states = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
    model.load_state_dict(states["model"])
    for optimizer, state in zip(optimizers, states["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return int(states["step"])
