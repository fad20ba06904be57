"""What the GPU kernels are given: records that stay inside their tensors, angles that stay while a step needs them."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from prerope.cache.cuda.decode import plan_rows, single_rows
from prerope.cache.cuda.plan import CudaPlan, PlanKey
from prerope.cache.cuda.prefill import plan_chunks
from prerope.cache.cuda.tables import KeyTables, QueryAngles, cos_sin
from prerope.cache.kernels.triton.read import READ_FIELDS, TILE_FIELDS
from prerope.rope.reading import AngleMap

from tests.cache.layouts import METHOD_NAMES, Paged, method, one_group, paged, rotary

CPU = torch.device("cpu")
ROWS = [(position, 1) for position in (0, 31, 32, 64, 257, 300)]
CHUNKS = [(0, 3), (25, 15), (250, 12), (300, 40)]


def key(*, single: bool) -> PlanKey:
    return PlanKey(single, 1 if single else 16, 32, 32, kv_heads=2, head_dim=16, group="", sliding_window=None)


def step(name: str, rows: list[tuple[int, int]]) -> Paged:
    return paged(rows, [one_group(method(name, rotary(16, 16), window=32, logn=True))] * len(rows))


def turn_rows(plan: CudaPlan) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last row of `turns` that each tile of rows looks at, in each part."""
    tiles = {name: plan.tiles[:, place].numpy() for place, name in enumerate(TILE_FIELDS)}
    turn = plan.reads[:, READ_FIELDS.index("turn")].view(-1, plan.num_parts).numpy()[tiles["run"]]
    first = turn + tiles["position"][:, None]
    return first, first + tiles["count"][:, None] - 1


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_turns_of_every_part_lie_in_the_table(name: str) -> None:
    """Of parts in which a run reads no key, too: the kernels load them before they know."""
    own = step(name, ROWS + CHUNKS)
    for single, make in ((True, plan_rows), (False, plan_chunks)):
        plan = make(own.metadata, key(single=single), CPU)
        first, last = turn_rows(plan)
        assert first.min() >= 0
        assert last.max() < len(plan.turns)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_layout_is_the_methods_and_not_the_steps(name: str) -> None:
    """Rows anywhere can be replayed by one graph."""
    layouts = {single_rows(step(name, [(at, 1)]).metadata, key(single=True)).layout for at in (0, 31, 40, 63, 64, 300)}
    assert len(layouts) == 1


@pytest.mark.parametrize("name", ["rerope", "dynamic_leaky", "xpos", "streaming"])
def test_rows_that_fill_up_change_nothing_else(name: str) -> None:
    own = step(name, ROWS)
    rows = single_rows(own.metadata, key(single=True))
    found = rows.find(rows.layout.tables(CPU))
    plan, wide = (
        layout.plan(torch.from_numpy(rows.fill(layout, found)), torch.zeros(1, 1, dtype=torch.int32))
        for layout in (rows.layout, rows.layout.filled_up(16))
    )
    count = len(ROWS)
    assert torch.equal(wide.tiles[:count], plan.tiles)
    assert torch.equal(wide.reads[: count * plan.num_parts], plan.reads)
    assert torch.equal(wide.turns[: count * plan.num_parts], plan.turns)
    assert torch.equal(wide.row_scale[:count], plan.row_scale)
    _, last = turn_rows(wide)
    assert last.max() < len(wide.turns)
    stop_key = wide.reads.view(16, plan.num_parts, -1)[count:, :, READ_FIELDS.index("stop_key")]
    assert not stop_key.any(), "they read no key"


def test_tables_made_in_a_step_are_filled_outside_of_one() -> None:
    """A step runs in inference mode, whose tensors nothing else may change."""
    maps = [AngleMap(torch.tensor([0.1 * n], dtype=torch.float64)) for n in range(2)]
    queries, keys = QueryAngles(1, CPU), KeyTables(1, 16, CPU)
    with torch.inference_mode():
        queries.reserve(9)
        keys.reserve(9, 2000)
    assert len(queries.find(maps, object())) == 2
    assert len(keys.find([(one, None) for one in maps], 10, object())) == 2


def test_angles_stay_while_a_step_needs_them() -> None:
    """A second look-up of one step never takes the slot of the first; that of the next step may."""
    maps = [AngleMap(torch.tensor([0.1 * n], dtype=torch.float64)) for n in range(24)]
    tables, step = QueryAngles(1, CPU), object()
    tables.find(maps[:2], object())
    version = tables.version
    seven, one = tables.find(maps[2:9], step), tables.find(maps[9:10], step)
    assert tables.version == version, "eight fit"
    assert len({*seven.values(), *one.values()}) == 8
    held, before = seven[maps[2]], tables.maps
    more = tables.find(maps[10:12], step)
    assert tables.version > version, "ten do not fit: new tensors"
    assert float(before[held, 0]) == float(maps[2].theta), "which what is planned already does not see"
    assert float(tables.maps[more[maps[11]], 0]) == float(maps[11].theta)
    found = tables.find(maps[:20], object())
    places, slots = torch.full((20,), 7), torch.tensor([found[one] for one in maps[:20]])
    expected = cos_sin(torch.stack([7 * one.theta for one in maps[:20]]))
    assert torch.equal(tables.turns(places, slots, torch.ones(20)), expected)


@pytest.mark.parametrize("limit", [1, 100, 300, 700, 10**6])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_passes_hold_what_their_tiles_read_and_no_more_than_fits(name: str, limit: int) -> None:
    """A pass takes more than the limit only for a single run."""
    own = step(name, [*CHUNKS, (300, 250)])
    with patch("prerope.cache.cuda.prefill.SCRATCH_BYTES", limit * 4 * key(single=False).head_dim):
        plan = plan_chunks(own.metadata, key(single=False), CPU)
    names = READ_FIELDS.index("slot"), READ_FIELDS.index("scratch")
    reads = plan.reads.view(-1, plan.num_parts, plan.reads.shape[1])
    seen: set[int] = set()
    for one in plan.passes:
        runs = set(plan.tiles[one.first_tile : one.stop_tile, TILE_FIELDS.index("run")].tolist())
        assert not runs & seen
        seen |= runs
        spans = plan.spans[one.first_span : one.stop_span]
        assert int((spans[:, 2] - spans[:, 1]).sum()) == one.scratch_rows
        assert one.scratch_rows <= limit or len(runs) == 1
        turned = [tuple(read[list(names)].tolist()) for run in runs for read in reads[run] if read[names[0]] >= 0]
        assert set(turned) == {(int(span[3]), int(span[7])) for span in spans}
    assert plan.passes[0].first_tile == plan.passes[0].first_span == 0
    assert plan.passes[-1][1::2][:2] == (len(plan.tiles), len(plan.spans))
    assert [one.first_tile for one in plan.passes[1:]] == [one.stop_tile for one in plan.passes[:-1]]
    assert len(seen) == len(reads)
