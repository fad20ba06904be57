"""Single rows on the GPU: what the decode kernel needs, in a few array operations, however many rows there are.

Rows that share a reading differ in their position alone: the kernel works out which keys a row reads. So a record a
reading and part is enough, copied to its rows. Everything is laid out in one buffer whose shape, a `RowLayout`, says
all that the kernel is compiled for. A step sends the buffer in one copy; a CUDA graph keeps one of its own, and a step
with the same layout is replayed by copying into it. Rows that fill a graph up read no key, and their result is zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from prerope.cache.attention.types import AttentionMetadata
from prerope.cache.cuda.plan import (
    NO_READ,
    Buffer,
    CudaPlan,
    Ints,
    PlanKey,
    Tables,
    sent_block_tables,
    step_of,
    tables_of,
    unrotated,
)
from prerope.cache.cuda.tables import LONGEST, KeyMap, places_of
from prerope.cache.transfer import send
from prerope.rope.model import ModelPositions
from prerope.rope.reading import ROW_LENGTH_BUCKET, UNBOUNDED, AngleMap, Part, PositionMethod, Reading
from torch import Tensor

FoundSlots = tuple[dict[KeyMap, int], dict[AngleMap, int]]


@dataclass(frozen=True, slots=True)
class RowLayout:
    """rows: tiles of a row each, those that fill up included; packed_rows: of the whole step."""

    key: PlanKey
    rows: int
    packed_rows: int
    num_parts: int
    rotary_dim: int
    interleaved: bool
    grouped: bool
    fades: bool

    @property
    def tile(self) -> int:
        """Keys that the kernel takes at once; tables are of `key.tile` all the same."""
        return self.key.fine_tile if self.grouped or self.fades else self.key.tile

    @property
    def buffer(self) -> Buffer:
        parts = (self.rows, self.num_parts)
        return Buffer(
            (
                ("tiles", (self.rows, 5), False),
                ("reads", (*parts, len(NO_READ)), False),
                ("places", parts, False),
                ("slots", parts, False),
                ("factors", parts, True),
                ("row_scale", (self.packed_rows,), True),
            )
        )

    def tables(self, device: torch.device) -> Tables:
        return tables_of(device, self.rotary_dim, self.key.tile)

    def filled_up(self, rows: int) -> RowLayout:
        """The layout of a step of these rows alone, filled up to `rows` with rows that read nothing."""
        return replace(self, rows=rows, packed_rows=rows)

    def plan(self, buffer: Tensor, blocks: Tensor) -> CudaPlan:
        """From the buffer on the device. What is computed here is computed there, so a graph that is captured around
        it follows the buffer."""
        views, tables = self.buffer.device(buffer), self.tables(buffer.device)
        return CudaPlan(
            tiles=views["tiles"],
            reads=views["reads"].view(-1, len(NO_READ)),
            num_parts=self.num_parts,
            turns=tables.queries.turns(*(views[name].flatten() for name in ("places", "slots", "factors"))),
            base_turns=tables.keys.base_turns,
            key_turns=tables.keys.key_turns,
            decay=tables.keys.decay,
            row_scale=views["row_scale"],
            blocks=blocks,
            rotary_dim=self.rotary_dim,
            interleaved=self.interleaved,
            grouped=self.grouped,
            fades=self.fades,
            spans=buffer[:0].view(0, 10),
        )


@dataclass(frozen=True, slots=True)
class SingleRows:
    """The single rows of a step, as one rotary group reads them.

    Attributes:
        numbers, packed, positions: [N] of each: its sequence, its row of the step, where it stands.
        readings: the distinct ones, and the rows that each is for.
        scale: [N] c_i.
        step: as in `Slots.find`.
    """

    layout: RowLayout
    numbers: Ints
    packed: Ints
    positions: Ints
    readings: list[tuple[Reading, NDArray[np.intp]]]
    scale: NDArray[np.float64]
    step: object

    def find(self, tables: Tables) -> FoundSlots:
        """The slots of the tables with the angles of these rows' keys and queries, filled where they were not."""
        parts = [(part, reading.decay) for reading, _ in self.readings for part in reading.parts]
        keys = [(part.key, decay) for part, decay in parts if not part.key.unrotated or decay is not None]
        found = tables.keys.find(keys, int(self.positions.max()) + 1, self.step)
        return found, tables.queries.find([part.query for part, _ in parts], self.step)

    def fill(self, layout: RowLayout, found: FoundSlots) -> Ints:
        """The buffer of this layout, on the host."""
        buffer, views = layout.buffer.host()
        count, shape = len(self.positions), (layout.rows, layout.num_parts)
        positions = np.zeros(layout.rows, dtype=np.int32)
        positions[:count] = self.positions
        rows = np.arange(layout.rows, dtype=np.int32)
        tiles = views["tiles"]
        tiles[:] = np.stack([rows * 0, rows, positions, rows * 0 + 1, rows], axis=1)
        tiles[:count, 0], tiles[:count, 1] = self.numbers, self.packed
        reads, places, slots, factors = (views[name] for name in ("reads", "places", "slots", "factors"))
        reads[:] = NO_READ
        key_slots, query_slots = found
        for reading, own in self.readings:
            for number, part in enumerate(reading.parts):
                reads[own, number] = _record(layout, part, key_slots.get((part.key, reading.decay)))
                places[own, number] = places_of(part.query, positions[own])
                slots[own, number] = query_slots[part.query]
                factors[own, number] = reading.attention_factor**2
        # Where the kernel finds a row's turn: at the sum of this and its position.
        reads[:, :, 5] = np.arange(layout.rows * layout.num_parts, dtype=np.int32).reshape(shape) - positions[:, None]
        views["row_scale"][:] = 1.0
        views["row_scale"][self.packed] = self.scale
        return buffer


def _record(layout: RowLayout, part: Part, slot: int | None) -> tuple[int, ...]:
    """`READ_FIELDS`, but for the turn, which is the row's own. slot None: keys as they lie in the cache."""
    edges = part.edges(layout.key.reach, LONGEST)
    if slot is None:
        return *edges, -1, 0, LONGEST, LONGEST // layout.tile, 1, 0, 0
    period = min(part.key.period or LONGEST, LONGEST)
    return *edges, slot, 0, period, -(-period // layout.tile), part.key.group, 0, 0


def single_rows(metadata: AttentionMetadata, key: PlanKey) -> SingleRows:
    """The rows of a step's sequences that have a single one; there is at least one such sequence."""
    sequences = metadata.sequences
    numbers = [number for number, sequence in enumerate(sequences) if sequence.count == 1]
    positions = np.array([sequences[number].start for number in numbers], dtype=np.int32)
    methods = [key.method(sequences[number]) for number in numbers]
    rotary = next((method.rotary for method in methods if method is not None), None)
    rotary_dim = key.rotary_dim(rotary)
    rows_of = defaultdict[Reading, list[int]](list)
    for row, method in enumerate(methods):
        reading = unrotated(rotary_dim // 2) if method is None else method.reading_of(int(positions[row]))
        rows_of[reading].append(row)
    turning = [(part.key, reading.decay) for reading in rows_of for part in reading.parts]
    layout = RowLayout(
        key=key,
        rows=len(numbers),
        packed_rows=metadata.num_rows,
        num_parts=max(1 if method is None else method.num_parts for method in set(methods)),
        rotary_dim=rotary_dim,
        interleaved=rotary is not None and rotary.interleaved,
        grouped=any(angles.group > 1 for angles, _ in turning),
        fades=any(decay is not None for _, decay in turning),
    )
    return SingleRows(
        layout=layout,
        numbers=np.array(numbers, dtype=np.int32),
        packed=np.array([sequences[number].first for number in numbers], dtype=np.int32),
        positions=positions,
        readings=[(reading, np.array(own)) for reading, own in rows_of.items()],
        scale=_scale(methods, positions),
        step=step_of(metadata),
    )


def _scale(methods: Sequence[PositionMethod | None], positions: Ints) -> NDArray[np.float64]:
    scale = np.ones(len(positions))
    for method in {method for method in methods if method is not None and method.logn}:
        own = [row for row, other in enumerate(methods) if other is method]
        found = method.query_scale(torch.from_numpy(positions[own]))
        assert found is not None
        scale[own] = found.numpy()
    return scale


def plan_rows(metadata: AttentionMetadata, key: PlanKey, device: torch.device) -> CudaPlan:
    """The plan of a step's sequences with a single row, where no CUDA graph is for that step."""
    rows = single_rows(metadata, key)
    found = rows.find(rows.layout.tables(device))
    buffer = send(rows.fill(rows.layout, found), device)
    return rows.layout.plan(buffer, sent_block_tables(metadata, device))


def reserve_tables(
    keys: Iterable[PlanKey], allowed: Sequence[ModelPositions], readings: int, length: int, device: torch.device
) -> None:
    """Make room in the tables for all angles of a step, so that their tensors stay, and with them the graphs.

    allowed: methods that requests may have. readings: of one step, were each row of it read in a way of its own: by
    the method that has most maps, or by any that has the same for all rows. length: tokens of the longest sequence.
    """
    wanted = defaultdict[Tables, list[tuple[int, int]]](list)
    for key in keys:
        if key.group is None:
            continue
        methods = list({id(own): own for own in (positions.methods[key.group] for positions in allowed)}.values())
        counts = [_num_maps(one, readings, length) for one in methods]
        shared = [count for one, count in zip(methods, counts, strict=True) if one.run_end(0) == UNBOUNDED]
        most = [max(count[side] for count in counts) + sum(count[side] for count in shared) for side in (0, 1)]
        own = tables_of(device, key.rotary_dim(methods[0].rotary), key.tile)
        wanted[own].append((most[0], most[1]))
    for tables, numbers in wanted.items():
        tables.keys.reserve(sum(keys for keys, _ in numbers), length)
        tables.queries.reserve(sum(queries for _, queries in numbers))


def _num_maps(method: PositionMethod, readings: int, length: int) -> tuple[int, int]:
    """The most key maps and query maps of so many readings; each run past the trained length has maps of its own."""
    last = length - 1
    runs = [method.reading_of(max(0, row)) for row in (last, last - ROW_LENGTH_BUCKET, 0)]
    found = []
    for maps in (
        ({part.key for part in one.parts} for one in runs),
        ({part.query for part in one.parts} for one in runs),
    ):
        newest, *others = maps
        known = set[AngleMap]().union(*others)
        own = newest - known
        found.append(len(own | known) + len(own) * max(0, readings - len(runs)))
    return found[0], found[1]
