"""cos and sin of whole positions, kept from call to call for one frequency vector."""

from __future__ import annotations

from typing import NamedTuple

import torch
from prerope.rope.rotation import Table, table
from torch import Tensor


class _Kept(NamedTuple):
    """A table of positions 0…N−1 and what it was made from: tensor, its version as torch counts writes, spacing."""

    freqs: Tensor
    version: int
    interpolate_factor: float
    table: Table


class PositionTable:
    """Makes the table as far as it is asked for, and anew where the frequencies are others or were written to.

    Not for frequencies that are trained, nor for those made under inference mode, which have no version. Copies and
    pickles start empty, because the frequencies that they would name are another module's.
    """

    def __init__(self, max_positions: int) -> None:
        self.max_positions = max_positions
        self._kept: _Kept | None = None

    def __reduce__(self) -> tuple[type[PositionTable], tuple[int]]:
        return PositionTable, (self.max_positions,)

    def rows(self, freqs: Tensor, interpolate_factor: float, start: int, stop: int) -> Table:
        """cos and sin [stop − start, m] fp32 of positions start…stop − 1 over `interpolate_factor`; freqs [m]."""
        kept, version = self._kept, freqs._version
        made = 0 if kept is None else len(kept.table.cos)
        if (
            kept is None
            or made < stop
            or kept.freqs is not freqs
            or (kept.version, kept.interpolate_factor) != (version, interpolate_factor)
        ):
            size = max(stop, min(2 * made, self.max_positions))
            positions = torch.arange(size, device=freqs.device, dtype=torch.float64) / interpolate_factor
            kept = _Kept(freqs, version, interpolate_factor, table(positions[:, None] * freqs.double()))
            self._kept = kept
        return kept.table.rows(start, stop)
