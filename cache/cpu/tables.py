"""cos|sin tables by position, kept across steps: worked out once a frequency vector, grown with the longest prompt."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from prerope.rope.reading import AngleMap, Part, Reading
from prerope.rope.rotation import Table, table
from torch import Tensor

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

    Maps that share a frequency vector share its table: dynamic_leaky's near part is the same in every bucket.
    """

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        self._max_bytes = max_bytes
        self._tables: OrderedDict[tuple[int, int | None, int], _Kept] = OrderedDict()  # (id of θ, period, group)

    def rows(self, angles: AngleMap, start: int, stop: int) -> Table:
        """cos and sin [stop − start, D/2] fp32 for positions start … stop − 1."""
        if angles.shift or angles.cap is not None or angles.offset is not None:  # queries': a few rows, once a step
            return table(angles.angles(torch.arange(start, stop)))
        key = (id(angles.theta), angles.period, angles.group)
        kept = self._tables.get(key)
        if kept is None or len(kept.table.cos) < stop:
            positions = torch.arange(-(-stop // _GRAIN) * _GRAIN)
            kept = self._tables[key] = _Kept(angles.theta, table(angles.angles(positions)))
        self._tables.move_to_end(key)
        self._shrink()
        return kept.table.rows(start, stop)

    def _shrink(self) -> None:
        """Forget the least recently used; the newest stands at the end."""
        excess = sum(kept.num_bytes for kept in self._tables.values()) - self._max_bytes
        while excess > 0 and len(self._tables) > 1:
            excess -= self._tables.popitem(last=False)[1].num_bytes


TABLES = TableCache()


def query_table(reading: Reading, part: Part, start: int, stop: int, origin: int) -> Table:
    """For the queries at positions [start, stop), with the attention factors of q and of k: the keys stay as they are.

    origin: the position from which queries and keys both fade; what counts is their product.
    """
    rows = TABLES.rows(part.query, start, stop)
    if reading.attention_factor != 1.0:
        rows = _times(rows, torch.tensor(reading.attention_factor**2))
    if reading.decay is not None:
        rows = _times(rows, torch.exp((torch.arange(start, stop) - origin).double()[:, None] * reading.decay))
    return rows


def key_table(reading: Reading, part: Part, low: int, high: int, origin: int) -> Table | None:
    """For the keys [low, high); None where they are read as they lie."""
    if part.key.still:
        return None
    rows = TABLES.rows(part.key, low, high)
    if reading.decay is None:
        return rows
    return _times(rows, torch.exp((origin - torch.arange(low, high)).double()[:, None] * reading.decay))


def _times(rows: Table, factor: Tensor) -> Table:
    return Table(rows.cos * factor.float(), rows.sin * factor.float())
