"""Is a result of attention right, row by row? What a kernel may be off by is what a plain torch run is off by, twice.

A largest error over all rows cannot see long ones: the values of a row that reads n random keys are of the size 1/√n,
so that at position 131,000 zeros pass. So a row is measured by its own size, and in it the head that is farthest off:

    error(row) = max over heads of ‖Δ‖ ÷ ‖reference‖        allowed = 2 · error of a plain torch run's worst row

Rows of a check are of one kind: of a length, or of a chunk. Its own error would be no measure of a row that few keys
count in: there it is by chance that rounding moves one of them.

The same keys are read twice. Flat: every key counts a little, so that a tile that is left out is seen. Peaked: queries
are multiplied by `PEAKED`, few keys count, and so a key that is turned wrongly or belongs to somebody else is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 2.0
"""A row's error against fp32, over a plain torch run's in the same dtype."""

PEAKED = 8.0
SHARPNESS = {"flat": 1.0, "peaked": PEAKED}


@dataclass(frozen=True, slots=True)
class Verdict:
    """ratio: of the worst row's error to that of a plain torch run's; row: which; error, allowed: of it."""

    ratio: float
    row: int
    error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.ratio <= LIMIT  # NaN is not

    def __str__(self) -> str:
        return f"row {self.row} is off by {self.error:.2e} of its size; at most {self.allowed:.2e} is right"


def row_errors(actual: Tensor, truth: Tensor) -> Tensor:
    """[T, Hq, D] each → [T]: how far its worst head is off, over that head's size; infinitely far where it is NaN."""
    truth = truth.float()
    off = torch.linalg.vector_norm(actual.float() - truth, dim=-1)
    size = torch.linalg.vector_norm(truth, dim=-1)
    errors: Tensor = (off / size.clamp_min(torch.finfo(torch.float32).tiny)).nan_to_num(nan=torch.inf)
    return errors.amax(dim=1)


def judge(actual: Tensor, plain: Tensor, truth: Tensor) -> Verdict:
    """actual: of the kernel; plain: of a plain torch run in the same dtype; truth: in fp32.

    Where the plain run is exact, as for rows that read a single key, one rounding is allowed.
    """
    errors = row_errors(actual, truth)
    theirs = max(float(row_errors(plain, truth).max()), torch.finfo(actual.dtype).eps / 2)
    row = int(errors.argmax())
    return Verdict(float(errors[row]) / theirs, row, float(errors[row]), LIMIT * theirs)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that torch hands out without writing to it holds NaN: what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
