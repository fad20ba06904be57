"""cos|sin tables by position, kept across steps: worked out once a frequency vector, grown with the longest prompt."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rope.reading import Reading
from rope.rotation import Table, table

Part = Literal["near", "far_query", "far_key"]
_GRAIN = 4096


class _Kept(NamedTuple):
    """`theta` is held beside its table: an id alone could be reused after the tensor is gone."""

    theta: Tensor
    table: Table

    @property
    def num_bytes(self) -> int:
        return self.table.cos.nbytes + self.table.sin.nbytes


class TableCache:
    """The most recently used tables, up to `max_bytes` of them and never fewer than one.

    Readings that share a frequency vector share its table: dynamic_leaky's near part is the same in every bucket.
    """

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        self._max_bytes = max_bytes
        self._tables: OrderedDict[tuple[int, int], _Kept] = OrderedDict()  # (id of θ, group of positions)

    def rows(self, reading: Reading, part: Part, start: int, stop: int) -> Table:
        """cos and sin [stop − start, D/2] fp32 for positions start … stop − 1."""
        if part == "far_query":  # a few rows, and never asked for twice
            return table(reading.far_query_angles(torch.arange(start, stop)))
        theta = reading.theta if part == "near" else reading.theta_far
        assert theta is not None
        key = (id(theta), 1 if part == "near" else reading.group)
        kept = self._tables.get(key)
        if kept is None or len(kept.table.cos) < stop:
            positions = torch.arange(-(-stop // _GRAIN) * _GRAIN)
            angles = reading.near_angles(positions) if part == "near" else reading.far_key_angles(positions)
            kept = self._tables[key] = _Kept(theta, table(angles))
        self._tables.move_to_end(key)
        self._shrink()
        return kept.table.rows(start, stop)

    def _shrink(self) -> None:
        """Forget the least recently used; the newest stands at the end."""
        excess = sum(kept.num_bytes for kept in self._tables.values()) - self._max_bytes
        while excess > 0 and len(self._tables) > 1:
            excess -= self._tables.popitem(last=False)[1].num_bytes
