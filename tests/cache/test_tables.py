"""Tables are those of the angles, whatever was asked before, and the oldest are forgotten first."""

from __future__ import annotations

import torch
from prerope.cache.cpu.tables import TableCache
from prerope.rope.reading import Reading
from prerope.rope.rotation import table

from tests.cache.layouts import method, rotary


def near(reading: Reading, start: int, stop: int) -> torch.Tensor:
    return table(reading.parts[0].key.angles(torch.arange(start, stop))).cos


def test_rows_after_growth_and_after_being_forgotten() -> None:
    leaky = method("dynamic_leaky", rotary(16, 16), window=16)
    readings = [leaky.reading(n) for n in (256, 512, 768)]
    tables = TableCache(max_bytes=1)  # room for the newest alone
    for start, stop in ((0, 10), (4000, 4200), (5, 9)):
        for reading in readings:
            assert torch.equal(tables.rows(reading.parts[0].key, start, stop).cos, near(reading, start, stop))
            far = table(reading.parts[1].key.angles(torch.arange(start, stop)))
            assert torch.equal(tables.rows(reading.parts[1].key, start, stop).sin, far.sin)
            assert len(tables._tables) == 1


def test_readings_with_the_same_frequencies_share_a_table() -> None:
    leaky = method("dynamic_leaky", rotary(16, 16), window=16)
    tables = TableCache()
    first, second = (tables.rows(leaky.reading(n).parts[0].key, 0, 8).cos for n in (256, 512))
    assert first.data_ptr() == second.data_ptr()


def test_groups_of_far_positions_have_tables_of_their_own() -> None:
    extended = method("self_extend", rotary(16, 16), window=16, group=3)
    reading = extended.reading(64)
    tables = TableCache()
    far = tables.rows(reading.parts[1].key, 0, 30).cos
    assert torch.equal(far, table(torch.arange(30)[:, None] // 3 * reading.theta).cos)
    assert torch.equal(tables.rows(reading.parts[0].key, 0, 30).cos, near(reading, 0, 30))
