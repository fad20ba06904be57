"""How long a step of so many rows takes, learned from the steps that run.

Steps of few rows are all measured; a number of rows that has not been seen lately is taken for what lies between its
neighbours, and beyond them for a little dearer than the last, so that it is tried where it might pay. More rows take no
less time: where measurements say so they were late or early by chance, and what is between counts. Otherwise the
luckiest number of rows would be chosen.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

KEPT = 5
"""Measurements of a number of rows; their median counts, since a step may be late by chance."""
STALE = 1024
"""Steps after which a number of rows that no step had is forgotten."""
PER_ROW = 0.03
"""What one more row is guessed to cost, as a share of a step of one row."""
EXACT = 32
"""Up to so many rows each number is for itself; above, numbers within an eighth are one."""


def _bucket(rows: int) -> int:
    if rows <= EXACT:
        return rows
    unit = 1 << (rows.bit_length() - 4)
    return max(EXACT + 1, rows // unit * unit)


@dataclass(slots=True)
class _Measured:
    last: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    seconds: float = 0.0  # their median
    last_step: int = 0

    def add(self, seconds: float, step: int) -> None:
        self.last.append(seconds)
        self.last_step = step
        self.seconds = sorted(self.last)[(len(self.last) - 1) // 2]


class StepTimes:
    """Seconds by rows."""

    def __init__(self) -> None:
        self._by_rows: dict[int, _Measured] = {}
        self._num_steps = 0
        self._curve: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def add(self, rows: int, seconds: float) -> None:
        """A step is over."""
        self._num_steps += 1
        self._by_rows.setdefault(_bucket(rows), _Measured()).add(seconds, self._num_steps)
        self._curve = None
        if self._num_steps % STALE == 0:
            old = self._num_steps - STALE
            self._by_rows = {rows: one for rows, one in self._by_rows.items() if one.last_step > old}

    def of(self, first: int, count: int) -> NDArray[np.float64] | None:
        """Of `first`, `first` + 1, … rows; None where nothing has been measured."""
        if not self._by_rows:
            return None
        if self._curve is None:
            known = sorted(self._by_rows)
            measured = np.array([self._by_rows[n].seconds for n in known])
            above, below = np.maximum.accumulate(measured), np.minimum.accumulate(measured[::-1])[::-1]
            self._curve = np.array(known, dtype=np.float64), (above + below) / 2
        rows, seconds = self._curve
        asked = np.arange(first, first + count)
        beyond = np.maximum(asked - rows[-1], 0.0) * PER_ROW * seconds[-1] / (1 + PER_ROW * (rows[-1] - 1))
        found: NDArray[np.float64] = np.interp(asked, rows, seconds) + beyond
        return found
