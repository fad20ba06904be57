"""cos|sin tables by position, kept across steps: worked out once a reading, grown with the longest prompt."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch

from rope.methods import Reading
from rope.rotation import Table, table

Part = Literal["near", "far_query", "far_key"]
_GRAIN = 4096


class TableCache:
    """The most recently used tables, at most `capacity` of them; one per reading and part."""

    def __init__(self, capacity: int = 16) -> None:
        self._capacity = capacity
        # The reading is kept beside its table: an id alone could be reused after the reading is gone.
        self._tables: OrderedDict[tuple[int, Part], tuple[Reading, int, Table]] = OrderedDict()

    def rows(self, reading: Reading, part: Part, start: int, stop: int) -> Table:
        """cos and sin [stop − start, D/2] fp32 for positions start … stop − 1."""
        if part == "far_query":  # a few rows, and never asked for twice
            return table(reading.far_query_angles(torch.arange(start, stop)))
        key = (id(reading), part)
        entry = self._tables.get(key)
        if entry is None or entry[1] < stop:
            length = -(-stop // _GRAIN) * _GRAIN
            angles = reading.near_angles if part == "near" else reading.far_key_angles
            entry = (reading, length, table(angles(torch.arange(length))))
            self._tables[key] = entry
        self._tables.move_to_end(key)
        if len(self._tables) > self._capacity:
            self._tables.popitem(last=False)
        return entry[2].rows(start, stop)
