"""The rows of Su's tables (spaces.ac.cn 9708) with his figures, our own beside them, and how a row is measured.

Su trained at 512 and tested at 4096. Windows here are the same shares of the trained length N, and everything is tested
at 8N. A row is a training (without log-n, with log-n, HFWA) read through a method; "†" has log-n at test time only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from prerope.rope.methods import resolve
from prerope.rope.spec import RopeSpec
from torch import Tensor

from bench.extrapolation.model import Attention, MethodAttention, Model, TrainedAttention

EXTENSION = 8  # tested length ÷ trained length, in Su's tables and here
SU_TRAIN_LENGTH = 512
VARIANTS = ("plain", "logn", "hfwa")

Figures = tuple[float, float]  # accuracy in %, repeated and not
SU_TRAINED = {"plain": 49.41, "logn": 49.40, "hfwa": 48.70}  # % at 512


@dataclass(frozen=True, slots=True)
class Row:
    """`variant` names the training, `spec` the method it is read through (None: as trained); `su` his figures."""

    label: str
    variant: str
    spec: RopeSpec | None
    su: Figures | None = None


def tables(train_length: int) -> dict[str, list[Row]]:
    """Title → rows, Su's three in his order, then the methods that he did not have. A row may be in two tables."""
    n, half, quarter = train_length, train_length // 2, train_length // 4
    figures = {
        8: [(69.39, 45.19), (78.58, 47.42), (84.38, 48.14)],
        4: [(76.11, 47.82), (82.28, 48.78), (85.47, 48.87)],
        2: [(77.90, 48.48), (82.40, 48.85), (85.12, 49.07)],
    }
    windows = {n // share: list(_rerope(n, n // share, su)) for share, su in figures.items()}
    windows[3 * n // 4] = list(_rerope(n, 3 * n // 4, [(70.72, 48.15), (76.42, 48.31), (83.24, 48.62)]))
    windows[n] = list(_rerope(n, n, [(7.09, 8.25), (7.08, 8.25), (15.84, 10.83)]))
    return {
        "Methods": [*_frequency_rows(), *windows[half], Row("HFWA", "hfwa", None, (80.84, 48.15))],
        "ReRoPE's window": [row for rows in windows.values() for row in rows],
        "Leaky ReRoPE's slope": [
            windows[quarter][-1],
            *_leaky(quarter, [(85.29, 48.96), (85.31, 49.03), (85.15, 49.10), (80.00, 48.11)]),
            windows[half][-1],
            *_leaky(half, [(84.60, 49.03), (84.30, 48.97), (83.59, 48.87), (69.80, 45.72)]),
        ],
        "Methods that Su did not have": list(_own_rows(half, quarter)),
    }


def distinct_rows(train_length: int) -> list[Row]:
    """Every row once."""
    return list({row.label: row for rows in tables(train_length).values() for row in rows}.values())


def _frequency_rows() -> Iterator[Row]:
    yield from _three("Baseline", [(24.17, 23.16), None, (24.60, 24.02)], method="rope")
    yield from _three("PI-RoPE", [(15.04, 13.54), None, (14.99, 16.51)], method="linear")
    yield from _three("NTK-RoPE-old", [(51.28, 39.27), None, (61.71, 43.75)], method="ntk")
    yield from _three("NTK-RoPE-fixed", [(51.86, 39.61), (55.94, 41.11), (62.85, 44.14)], method="ntk_fixed")
    yield from _three("NTK-RoPE-mixed", [(53.09, 40.12), (59.11, 42.38), (68.91, 45.41)], method="ntk_mixed")


def _rerope(train_length: int, window: int, su: list[Figures]) -> Iterator[Row]:
    # A window of N is refused for serving, and its row shows why: distance N was never trained.
    declared = train_length + 1 if window == train_length else None
    yield from _three(f"ReRoPE-w{window}", su, method="rerope", window=window, train_length=declared)


def _leaky(window: int, su: list[Figures]) -> Iterator[Row]:
    for leak, figures in zip((64, 32, 16, 8), su, strict=True):
        spec = RopeSpec(method="leaky_rerope", window=window, leak=leak)
        yield Row(f"Leaky ReRoPE-w{window}-k{leak}-log n", "logn", spec, figures)


def _own_rows(half: int, quarter: int) -> Iterator[Row]:
    nothing = [None, None, None]
    yield from _three("YaRN", nothing, method="yarn")
    for window in (quarter, half):
        yield from _three(f"Self-Extend-w{window}", nothing, method="self_extend", window=window)
    for window in (quarter, half):
        yield from _three(f"dynamic_leaky-w{window}", nothing, method="dynamic_leaky", window=window)


def _three(label: str, su: Any, **parameters: Any) -> Iterator[Row]:
    """Without log-n, with log-n at test time only, trained with log-n."""
    plain, tested = (RopeSpec(factor=EXTENSION, logn=logn, **parameters) for logn in (False, True))
    yield Row(label, "plain", plain, su[0])
    yield Row(f"{label}-log n†", "plain", tested, su[1])
    yield Row(f"{label}-log n", "logn", plain, su[2])


def measure(model: Model, row: Row, texts: dict[str, Tensor], at_once: int) -> dict[str, list[float]]:
    """Accuracy (0 to 1) in each of the 8 stretches of N tokens, for each text [R, 8N + 1] on the model's device."""
    return {name: accuracies(model, _attention(model, row, rows), rows, at_once) for name, rows in texts.items()}


def _attention(model: Model, row: Row, rows: Tensor) -> Attention:
    shape = model.shape
    if row.spec is None:
        return TrainedAttention(shape, rows.shape[1] - 1, rows.device)
    method = resolve(row.spec, shape.rotary)
    chunk = 256 if rows.device.type == "cpu" else 2048
    return MethodAttention(method, shape.train_length, logn_trained=row.variant == "logn", chunk=chunk)


def trained_accuracy(model: Model, rows: Tensor, at_once: int) -> float:
    """Accuracy over the same targets as `rows` [R, 8N + 1] has, cut into pieces of the trained length."""
    n = model.shape.train_length
    inputs, targets = rows[:, :-1].reshape(-1, n), rows[:, 1:].reshape(-1, n)
    attention = TrainedAttention(model.shape, n, rows.device)
    return _hits(model, attention, inputs, targets, at_once * EXTENSION).mean().item()


def accuracies(model: Model, attention: Attention, rows: Tensor, at_once: int) -> list[float]:
    """rows [R, n·N + 1] → n accuracies, one for each N positions."""
    hits = _hits(model, attention, rows[:, :-1], rows[:, 1:], at_once)
    found: list[float] = hits.view(len(rows), -1, model.shape.train_length).mean((0, 2)).tolist()
    return found


@torch.inference_mode()
def _hits(model: Model, attention: Attention, inputs: Tensor, targets: Tensor, at_once: int) -> Tensor:
    """[R, T] fp64 on the CPU: 1 where the most probable token is the target."""
    guesses = [model(part, attention).argmax(-1) for part in torch.split(inputs, at_once)]
    return (torch.cat(guesses) == targets).double().cpu()
