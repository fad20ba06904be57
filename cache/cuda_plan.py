"""What the GPU kernels need beside the tensors, worked out once a step and rotary group.

A plan is a handful of tensors: records of tiles and of how each run of rows reads each part of its keys
(`kernels.read`), block tables, and angles. A decode step's grid depends on the number of rows alone, and splits are
chosen on the device: with its plan copied into tensors that stay, the step can be captured in a CUDA graph.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cache.angle_tables import LONGEST, KeyTables, QueryAngles, places_of
from cache.attention import AttentionMetadata, AttentionOptions, SequenceRows
from cache.transfer import send
from rope.reading import AngleMap, Part, Reading

Ints = NDArray[np.int32]

FADING_ROWS = 1024  # of a run: keys after its first row grow by exp(-decay) each, and must not overflow fp16


@dataclass(slots=True)
class CudaPlan:
    """Some sequences of one step, read by one rotary group.

    Attributes:
        tiles: [N, 5] int32, `kernels.read.TILE_FIELDS` of each tile of rows.
        reads: [runs, num_parts, 11] int32, `kernels.read.READ_FIELDS`.
        turns: [n, 2, D/2] fp32, cos and sin of queries, times both attention factors.
        base_turns, key_turns, decay: as in `KeyTables`.
        row_scale: [T] fp32, c_i of each packed row.
        blocks: [sequences, max_blocks] int32 block tables.
        grouped: some keys share positions.
        fades: some reading has a decay.
        spans: [n, 10] int32, `kernels.prefill.SPAN_FIELDS` of the keys that a chunk's rows read turned.
        scratch_rows, key_programs: rows of scratch for all spans, and key tiles.
        schedule: of decode; the kernel fills it at the step's first layer.
    """

    tiles: Tensor
    reads: Tensor
    num_parts: int
    turns: Tensor
    base_turns: Tensor
    key_turns: Tensor
    decay: Tensor
    row_scale: Tensor
    blocks: Tensor
    rotary_dim: int
    interleaved: bool
    grouped: bool
    fades: bool
    spans: Tensor
    scratch_rows: int
    key_programs: int
    schedule: Tensor | None = None


_TABLES: dict[Hashable, tuple[KeyTables, QueryAngles]] = {}


def _tables(device: torch.device, pairs: int, tile: int) -> tuple[KeyTables, QueryAngles]:
    key = (device, pairs, tile)
    if key not in _TABLES:
        _TABLES[key] = KeyTables(pairs, tile, device), QueryAngles(pairs, device)
    return _TABLES[key]


@dataclass(slots=True)
class _Run:
    """Rows [first, stop) of a sequence: positions that share a reading."""

    sequence: int
    packed: int  # row of the step that position 0 would have
    first: int
    stop: int
    parts: list[tuple[Part, Reading]]
    scale: NDArray[np.float64] | None


@dataclass(slots=True)
class _Span:
    """Keys [low, stop) of a sequence that are turned by one map."""

    sequence: int
    key_map: Hashable
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
    reading: Reading
    reach: int
    turn: int
    key_map: Hashable
    span: Hashable

    def edges(self) -> tuple[int, int, int, int]:
        part = self.part
        d_max = min(part.d_max, self.reach, LONGEST)
        return max(part.first_key, 0), min(part.stop_key, LONGEST), max(part.d_min, 0), d_max

    def keys(self) -> tuple[int, int]:
        """[low, stop) of the keys that any row reads."""
        first_key, stop_key, d_min, d_max = self.edges()
        return max(first_key, self.run.first - d_max + 1), min(stop_key, self.run.stop - d_min)


NO_READ = (0, 0, 0, 0, -1, 0, LONGEST, LONGEST, 1, 0, 0)


@dataclass(slots=True)
class _Builder:
    """Collects what a step reads; records are written when all maps have a slot."""

    tile: int
    reach: int
    num_parts: int
    reads: list[_Read | None] = field(default_factory=list)
    spans: dict[Hashable, _Span] = field(default_factory=dict)
    key_maps: dict[Hashable, tuple[AngleMap, Tensor | None]] = field(default_factory=dict)
    query_maps: dict[Hashable, AngleMap] = field(default_factory=dict)
    num_turns: int = 0

    def add(self, run: _Run) -> None:
        for part, reading in run.parts:
            self._part(run, part, reading)
        self.reads += [None] * (self.num_parts - len(run.parts))

    def _part(self, run: _Run, part: Part, reading: Reading) -> None:
        self.query_maps[id(part.query)] = part.query
        read = _Read(run, part, reading, self.reach, self.num_turns - run.first, None, None)
        self.reads.append(read)
        self.num_turns += run.stop - run.first
        low, stop = read.keys()
        if (part.key.still and reading.decay is None) or low >= stop:
            return
        read.key_map = id(part.key), id(reading.decay)
        self.key_maps[read.key_map] = part.key, reading.decay
        # Runs share turned keys, unless these fade: from where is each run's own.
        origin = 0 if reading.decay is None else run.first
        read.span = run.sequence, read.key_map, origin
        period = min(part.key.period or LONGEST, LONGEST)
        span = self.spans.setdefault(
            read.span, _Span(run.sequence, read.key_map, low, stop, period, part.key.group, origin)
        )
        span.low, span.stop = min(span.low, low), max(span.stop, stop)

    def records(self, slots: dict[Hashable, int]) -> tuple[Ints, Ints, int, int]:
        """(reads, spans, rows of scratch, key tiles)."""
        spans, shifts, rows, programs = [], {}, 0, 0
        for name, span in self.spans.items():
            shifts[name] = rows - span.low
            cycle = -(-span.period // self.tile)
            spans.append(
                (span.sequence, span.low, span.stop, slots[span.key_map], span.period, cycle, span.group,
                 shifts[name], span.origin, programs)
            )  # fmt: skip
            rows += span.stop - span.low
            programs += span.tiles(self.tile)
        reads = [NO_READ if read is None else self._record(read, slots, shifts) for read in self.reads]
        return _ints(reads, len(NO_READ)), _ints(spans, 10), rows, programs

    def _record(self, read: _Read, slots: dict[Hashable, int], shifts: dict[Hashable, int]) -> tuple[int, ...]:
        if read.key_map is None:
            return *read.edges(), -1, read.turn, LONGEST, LONGEST // self.tile, 1, 0, 0
        span = self.spans[read.span]
        cycle = -(-span.period // self.tile)
        slot, shift = slots[read.key_map], shifts[read.span]
        return *read.edges(), slot, read.turn, span.period, cycle, span.group, shift, span.origin


def _ints(rows: Sequence[tuple[int, ...]], columns: int) -> Ints:
    return np.array(rows, dtype=np.int32).reshape(-1, columns)


def make_plan(
    metadata: AttentionMetadata,
    single: bool,
    shape: tuple[int, int, int, int],
    options: AttentionOptions,
    device: torch.device,
) -> CudaPlan:
    """Of the sequences with a single row, or of the others. shape: rows of a tile, keys of a tile, T, D."""
    rows_of_tile, tile, num_rows, head_dim = shape
    sequences = metadata.sequences
    chosen = [number for number, sequence in enumerate(sequences) if (sequence.count == 1) == single]
    methods = [options.method(sequences[number]) for number in chosen]
    rotary = next((method.rotary for method in methods if method is not None), None)
    # Without positions all dims are pairs that do not turn.
    rotary_dim = head_dim if rotary is None else rotary.dim
    runs = [run for number in chosen for run in _runs(number, sequences[number], options, rotary_dim)]
    num_parts = max(len(run.parts) for run in runs)
    builder = _Builder(tile, LONGEST if options.sliding_window is None else options.sliding_window, num_parts)
    for run in runs:
        builder.add(run)
    tables, queries = _tables(device, rotary_dim // 2, tile)
    slots = tables.find(builder.key_maps, max(sequence.length for sequence in sequences))
    reads, spans, scratch_rows, key_programs = builder.records(slots)
    scale = np.ones(num_rows, dtype=np.float32)
    for run in runs:
        if run.scale is not None:
            scale[run.packed + run.first : run.packed + run.stop] = run.scale
    return CudaPlan(
        tiles=send(_row_tiles(runs, rows_of_tile), device),
        reads=send(reads, device),
        num_parts=num_parts,
        turns=_turns(builder, queries, device),
        base_turns=tables.base_turns,
        key_turns=tables.key_turns,
        decay=tables.decay,
        row_scale=send(scale, device),
        blocks=_blocks(metadata),
        rotary_dim=rotary_dim,
        interleaved=rotary is not None and rotary.interleaved,
        grouped=any(angles.group > 1 for angles, _ in builder.key_maps.values()),
        fades=any(decay is not None for _, decay in builder.key_maps.values()),
        spans=send(spans, device),
        scratch_rows=scratch_rows,
        key_programs=key_programs,
    )


def _runs(number: int, sequence: SequenceRows, options: AttentionOptions, rotary_dim: int) -> list[_Run]:
    method, start = options.method(sequence), sequence.start
    packed = sequence.first - start
    if method is None:
        reading = _still(rotary_dim // 2)
        return [_Run(number, packed, start, sequence.length, [(reading.parts[0], reading)], None)]
    scale = method.query_scale(torch.arange(start, sequence.length))
    runs = []
    for begin, end, reading in method.runs(start, sequence.length):
        most = FADING_ROWS if reading.decay is not None else end - begin
        for first in range(begin, end, most):
            stop = min(first + most, end)
            own = None if scale is None else scale[first - start : stop - start].numpy()
            seen = [part for part in reading.parts if operator.lt(*part.keys(first, stop))]
            parts = [(part, reading) for part in seen]
            runs.append(_Run(number, packed, first, stop, parts, own))
    return runs


@cache
def _still(pairs: int) -> Reading:
    """Every key as it lies in the cache. The same object each time, so that its angles keep their slot."""
    still = AngleMap(torch.zeros(pairs, dtype=torch.float64))
    return Reading((Part(still, still),))


def _row_tiles(runs: Sequence[_Run], rows: int) -> Ints:
    """Tiles of up to `rows` rows of one run. Those that read most keys come first: the last to end are short ones."""
    tiles = [
        (run.sequence, run.packed + begin, begin, min(rows, run.stop - begin), number)
        for number, run in enumerate(runs)
        for begin in range(run.first, run.stop, rows)
    ]
    return np.array(sorted(tiles, key=lambda tile: -tile[2]), dtype=np.int32)


def _turns(builder: _Builder, queries: QueryAngles, device: torch.device) -> Tensor:
    """[n, 2, D/2]: all query rows of all parts, in one go on the device."""
    slots = queries.find(builder.query_maps)
    reads = [read for read in builder.reads if read is not None]
    counts = [read.run.stop - read.run.first for read in reads]
    places = np.concatenate([places_of(read.part.query, read.run.first, read.run.stop) for read in reads])
    factors = np.array([read.reading.attention_factor**2 for read in reads], dtype=np.float32)
    sent = send(np.stack([places, np.repeat([slots[id(read.part.query)] for read in reads], counts)]), device)
    return queries.turns(sent[0], sent[1], send(np.repeat(factors, counts), device))


def _blocks(metadata: AttentionMetadata) -> Tensor:
    """[sequences, max_blocks] int32, the same for all groups."""
    blocks: Tensor | None = metadata.plans.get("cuda blocks")
    if blocks is None:
        tables = [sequence.block_table for sequence in metadata.sequences]
        blocks = metadata.plans["cuda blocks"] = pad_sequence(tables, batch_first=True).int()
    return blocks
