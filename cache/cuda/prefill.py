"""Chunks on the GPU: what the prefill kernels need, worked out once a step and rotary group.

Rows of a chunk are cut into runs, by reading, and each run into tiles. Keys that are turned are turned once for all
runs that turn them alike: a span of scratch each. Spans that do not fit into scratch at once are turned in several
passes, each with the runs that read them: a long context read by maps that change every 256 rows, or many sequences.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from prerope.cache.attention.types import AttentionMetadata, SequenceRows
from prerope.cache.cuda.plan import (
    NO_READ,
    SCRATCH_BYTES,
    CudaPlan,
    Ints,
    Pass,
    PlanKey,
    sent_block_tables,
    step_of,
    tables_of,
    unrotated,
)
from prerope.cache.cuda.tables import LONGEST, KeyMap, QueryAngles, places_of
from prerope.cache.transfer import send
from prerope.rope.reading import Part, PositionMethod, Reading
from torch import Tensor

FADING_ROWS = 1024  # of a run: keys after its first row grow by exp(-decay) each, and must not overflow fp16


@dataclass(slots=True)
class _Run:
    """Rows [first, stop) of a sequence: positions that share a reading."""

    sequence: int
    packed: int  # row of the step that position 0 would have
    first: int
    stop: int
    reading: Reading
    parts: list[Part]  # those in which some row reads a key
    scale: NDArray[np.float64] | None


@dataclass(slots=True)
class _Span:
    """Keys [low, stop) of a sequence that are turned by one map."""

    sequence: int
    key_map: KeyMap
    low: int
    stop: int
    period: int
    group: int
    origin: int  # position from which queries and keys fade

    def tiles(self, tile: int) -> int:
        cycle = -(-self.period // tile)
        first, last = (
            key // self.period * cycle + key % self.period // tile for key in (self.low, self.stop - 1)
        )  # fmt: skip
        return last + 1 - first


@dataclass(slots=True)
class _Read:
    """How the rows of one run read one part. span: where they find its keys turned; None: as they lie in the cache."""

    run: _Run
    part: Part
    reach: int
    turn: int
    span: Hashable = None

    def edges(self) -> tuple[int, int, int, int]:
        return self.part.edges(self.reach, LONGEST)

    def keys(self) -> tuple[int, int]:
        """[low, stop) of the keys that any row reads."""
        return self.part.keys(self.run.first, self.run.stop, self.reach)


Spans = dict[Hashable, _Span]


@dataclass(slots=True)
class _Builder:
    """Collects what a step reads; records are written when all maps have a slot.

    scratch_rows: that the spans of a pass may take; those of one run take what they take.
    """

    tile: int
    reach: int
    num_parts: int
    scratch_rows: int
    reads: list[tuple[int, _Read | _Run]] = field(default_factory=list)  # a run stands for a part that reads nothing
    spans: list[Spans] = field(default_factory=lambda: [{}])  # of each pass
    passes: list[int] = field(default_factory=list)  # of each run
    num_turns: int = 0

    def add(self, run: _Run) -> None:
        reads = [self._read(run, part) for part in run.parts]
        spans = self._with(self.spans[-1], reads)
        if self.passes and sum(span.stop - span.low for span in spans.values()) > self.scratch_rows:
            self.spans.append(self._with({}, reads))
        else:
            self.spans[-1] = spans
        self.passes.append(len(self.spans) - 1)
        filled: list[_Read | _Run] = [*reads, *[run] * (self.num_parts - len(reads))]
        self.reads += [(self.passes[-1], one) for one in filled]

    def _read(self, run: _Run, part: Part) -> _Read:
        read = _Read(run, part, self.reach, self.num_turns - run.first)
        self.num_turns += run.stop - run.first
        low, stop = read.keys()
        decay = run.reading.decay
        if low < stop and not (part.key.unrotated and decay is None):
            # Runs share rotated keys, unless keys fade with the distance from the run: then each run has a copy.
            read.span = run.sequence, part.key, decay, 0 if decay is None else run.first
        return read

    @staticmethod
    def _with(spans: Spans, reads: Sequence[_Read]) -> Spans:
        """The spans to rotate: these, lengthened or added to until they hold what is read."""
        spans = dict(spans)
        for read in reads:
            if read.span is None:
                continue
            low, stop = read.keys()
            angles, decay = read.part.key, read.run.reading.decay
            before = spans.get(read.span)
            if before is not None:
                low, stop = min(low, before.low), max(stop, before.stop)
            period, origin = min(angles.period or LONGEST, LONGEST), 0 if decay is None else read.run.first
            spans[read.span] = _Span(read.run.sequence, (angles, decay), low, stop, period, angles.group, origin)
        return spans

    @property
    def key_maps(self) -> list[KeyMap]:
        return [span.key_map for spans in self.spans for span in spans.values()]

    def records(self, slots: dict[KeyMap, int]) -> tuple[Ints, Ints, list[tuple[int, int, int]]]:
        """(reads, spans, (spans, rows of scratch, key tiles) of each pass)."""
        records: list[tuple[int, ...]] = []
        shifts: dict[Hashable, int] = {}
        sizes = []
        for number, spans in enumerate(self.spans):
            rows = programs = 0
            for name, span in spans.items():
                shifts[number, name] = rows - span.low
                cycle = -(-span.period // self.tile)
                records.append(
                    (span.sequence, span.low, span.stop, slots[span.key_map], span.period, cycle, span.group,
                     shifts[number, name], span.origin, programs)
                )  # fmt: skip
                rows += span.stop - span.low
                programs += span.tiles(self.tile)
            sizes.append((len(spans), rows, programs))
        reads = [self._record(number, read, slots, shifts) for number, read in self.reads]
        return _ints(reads, len(NO_READ)), _ints(records, 10), sizes

    def _record(
        self, number: int, read: _Read | _Run, slots: dict[KeyMap, int], shifts: dict[Hashable, int]
    ) -> tuple[int, ...]:
        if isinstance(read, _Run):  # kernels look at its turns all the same: at those of the first rows
            return *NO_READ[:5], -read.first, *NO_READ[6:]
        if read.span is None:
            return *read.edges(), -1, read.turn, LONGEST, LONGEST // self.tile, 1, 0, 0
        span = self.spans[number][read.span]
        cycle = -(-span.period // self.tile)
        slot, shift = slots[span.key_map], shifts[number, read.span]
        return *read.edges(), slot, read.turn, span.period, cycle, span.group, shift, span.origin


def _ints(rows: Sequence[tuple[int, ...]], columns: int) -> Ints:
    return np.array(rows, dtype=np.int32).reshape(-1, columns)


def plan_chunks(metadata: AttentionMetadata, key: PlanKey, device: torch.device) -> CudaPlan:
    """The plan of a step's sequences with more than one row; there is at least one."""
    sequences = metadata.sequences
    chosen = [number for number, sequence in enumerate(sequences) if sequence.count > 1]
    methods = [key.method(sequences[number]) for number in chosen]
    rotary = next((method.rotary for method in methods if method is not None), None)
    rotary_dim = key.rotary_dim(rotary)
    runs = [run for number in chosen for run in _runs(number, sequences[number], key, rotary_dim)]
    builder = _Builder(
        key.tile, key.reach, max(len(run.parts) for run in runs), scratch_rows=SCRATCH_BYTES // (4 * key.head_dim)
    )
    for run in runs:
        builder.add(run)
    tables = tables_of(device, rotary_dim, key.tile)
    longest = max(sequence.length for sequence in sequences)
    slots = tables.keys.find(builder.key_maps, longest, step_of(metadata))
    reads, spans, sizes = builder.records(slots)
    tiles, tile_stops = _row_tiles(runs, builder.passes, key.rows)
    return CudaPlan(
        tiles=send(tiles, device),
        reads=send(reads, device),
        num_parts=builder.num_parts,
        turns=_turns(builder, tables.queries, step_of(metadata), device),
        base_turns=tables.keys.base_turns,
        key_turns=tables.keys.key_turns,
        decay=tables.keys.decay,
        row_scale=send(_scale(runs, metadata.num_rows), device),
        blocks=sent_block_tables(metadata, device),
        rotary_dim=rotary_dim,
        interleaved=rotary is not None and rotary.interleaved,
        grouped=any(angles.group > 1 for angles, _ in builder.key_maps),
        fades=any(decay is not None for _, decay in builder.key_maps),
        spans=send(spans, device),
        passes=_passes(tile_stops, sizes),
    )


def num_turned_keys(method: PositionMethod, start: int, stop: int) -> int:
    """Rows of scratch that the rows [start, stop) of one sequence read from, were they all read in one pass."""
    builder = _Builder(tile=1, reach=LONGEST, num_parts=0, scratch_rows=LONGEST)
    for run in _method_runs(0, 0, method, start, stop):
        builder.add(run)
    return sum(span.stop - span.low for spans in builder.spans for span in spans.values())


def _runs(number: int, sequence: SequenceRows, key: PlanKey, rotary_dim: int) -> list[_Run]:
    method, start, stop = key.method(sequence), sequence.start, sequence.length
    packed = sequence.first - start
    if method is None:
        reading = unrotated(rotary_dim // 2)
        return [_Run(number, packed, start, stop, reading, list(reading.parts), None)]
    return _method_runs(number, packed, method, start, stop)


def _method_runs(number: int, packed: int, method: PositionMethod, start: int, stop: int) -> list[_Run]:
    scale = method.query_scale(torch.arange(start, stop))
    runs = []
    for begin, end, reading in method.runs(start, stop):
        most = FADING_ROWS if reading.decay is not None else end - begin
        for first in range(begin, end, most):
            last = min(first + most, end)
            own = None if scale is None else scale[first - start : last - start].numpy()
            seen = [part for part in reading.parts if operator.lt(*part.keys(first, last))]
            runs.append(_Run(number, packed, first, last, reading, seen, own))
    return runs


def _scale(runs: Sequence[_Run], num_rows: int) -> NDArray[np.float32]:
    scale = np.ones(num_rows, dtype=np.float32)
    for run in runs:
        if run.scale is not None:
            scale[run.packed + run.first : run.packed + run.stop] = run.scale
    return scale


def _row_tiles(runs: Sequence[_Run], passes: Sequence[int], rows: int) -> tuple[Ints, list[int]]:
    """Tiles of up to `rows` rows of one run, pass by pass, and where each pass ends.

    Those that read most keys come first in their pass: the last to end are short ones.
    """
    tiles = [
        (run.sequence, run.packed + begin, begin, min(rows, run.stop - begin), number)
        for number, run in enumerate(runs)
        for begin in range(run.first, run.stop, rows)
    ]
    tiles.sort(key=lambda tile: (passes[tile[4]], -tile[2]))
    counts = np.bincount([passes[tile[4]] for tile in tiles])
    return np.array(tiles, dtype=np.int32), np.cumsum(counts).tolist()


def _passes(tile_stops: Sequence[int], sizes: Sequence[tuple[int, int, int]]) -> list[Pass]:
    """From (spans, rows of scratch, key tiles) of each."""
    passes = []
    first_tile = first_span = 0
    for stop_tile, (num_spans, rows, programs) in zip(tile_stops, sizes, strict=True):
        passes.append(Pass(first_tile, stop_tile, first_span, first_span + num_spans, rows, programs))
        first_tile, first_span = stop_tile, first_span + num_spans
    return passes


def _turns(builder: _Builder, queries: QueryAngles, step: object, device: torch.device) -> Tensor:
    """cos and sin [n, 2, D/2] for all query rows of all parts, computed at once on the device."""
    reads = [read for _, read in builder.reads if isinstance(read, _Read)]
    slots = queries.find([read.part.query for read in reads], step)
    counts = [read.run.stop - read.run.first for read in reads]
    rows = [np.arange(read.run.first, read.run.stop, dtype=np.int32) for read in reads]
    places = np.concatenate([places_of(read.part.query, own) for read, own in zip(reads, rows, strict=True)])
    factors = np.array([read.run.reading.attention_factor**2 for read in reads], dtype=np.float32)
    sent = send(np.stack([places, np.repeat([slots[read.part.query] for read in reads], counts)]), device)
    return queries.turns(sent[0], sent[1], send(np.repeat(factors, counts), device))
