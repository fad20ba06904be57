"""What the GPU kernels need beside the tensors, the same for all layers that read the same way: a `CudaPlan`.

A plan is a handful of tensors: records of tiles and of how each run of rows reads each part of its keys
(`read`), block tables, and angles. It is made on the host, by `cache.cuda.decode` for sequences with one row and
by `cache.cuda.prefill` for the others, sent in one copy, and nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from prerope.cache.attention.types import AttentionMetadata, SequenceRows
from prerope.cache.cuda.tables import LONGEST, KeyTables, QueryAngles
from prerope.cache.transfer import send
from prerope.rope.frequencies import Rotary
from prerope.rope.reading import AngleMap, Part, PositionMethod, Reading
from torch import Tensor

Ints = NDArray[np.int32]

NO_READ = (0, 0, 0, 0, -1, 0, LONGEST, LONGEST, 1, 0, 0)
"""`kernels.read.READ_FIELDS` of a part without keys."""


SCRATCH_BYTES = 256 * 2**20
"""For keys that chunks read turned, whatever the context. What needs more is turned and read in several passes."""


@dataclass(frozen=True, slots=True)
class PlanKey:
    """What a plan depends on beside the step: layers with equal keys share one.

    Attributes:
        single: of the sequences with one row, or of the others.
        rows, tile: rows and keys of a tile.
        fine_tile: a divisor of it, of single rows where some read keys that turn in groups or fade.
        group, sliding_window: as in `AttentionOptions`.
    """

    single: bool
    rows: int
    tile: int
    fine_tile: int
    kv_heads: int
    head_dim: int
    group: str | None
    sliding_window: int | None

    @property
    def reach(self) -> int:
        return LONGEST if self.sliding_window is None else self.sliding_window

    def method(self, sequence: SequenceRows) -> PositionMethod | None:
        return None if self.group is None else sequence.positions.methods[self.group]

    def rotary_dim(self, rotary: Rotary | None) -> int:
        """The dims that are rotated; in layers without positions all dims, as pairs with angle zero."""
        return self.head_dim if rotary is None else rotary.dim


class Pass(NamedTuple):
    """Tiles [first_tile, stop_tile) of a plan of chunks, which read what spans [first_span, stop_span) turn.

    scratch_rows, key_programs: rows of scratch for all these spans, and their key tiles.
    """

    first_tile: int
    stop_tile: int
    first_span: int
    stop_span: int
    scratch_rows: int
    key_programs: int


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
        spans: [n, 10] int32, `kernels.turns.SPAN_FIELDS` of the keys that a chunk's rows read turned.
        passes: of chunks: all tiles, in order, and each with the spans that it needs.
        schedules: of decode, by how many items there are; the kernel fills one at the first layer that has as many.
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
    passes: Sequence[Pass] = ()
    schedules: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tables:
    """Angles on one device, for heads of so many pairs and key tiles of one size."""

    keys: KeyTables
    queries: QueryAngles

    @property
    def versions(self) -> tuple[int, int]:
        """The versions of the tables. They change when tensors are made anew; slots looked up before are then void."""
        return self.keys.version, self.queries.version


_TABLES: dict[Hashable, Tables] = {}


def tables_of(device: torch.device, rotary_dim: int, tile: int) -> Tables:
    """The tables of this device and shape, kept across steps and shared by all plans."""
    key = (device, rotary_dim, tile)
    if key not in _TABLES:
        _TABLES[key] = Tables(KeyTables(rotary_dim // 2, tile, device), QueryAngles(rotary_dim // 2, device))
    return _TABLES[key]


def table_bytes() -> int:
    """Bytes of the tables of keys' angles on all devices. May be called by any thread."""
    return sum(tables.keys.num_bytes for tables in list(_TABLES.values()))


@cache
def unrotated(pairs: int) -> Reading:
    """Every key as it lies in the cache. The same object each time, so that its angles keep their slot."""
    angles = AngleMap(torch.zeros(pairs, dtype=torch.float64))
    return Reading((Part(angles, angles),))


def block_tables(metadata: AttentionMetadata) -> Ints:
    """[sequences, blocks] int32 on the host; what no sequence fills is 0."""
    tables = [sequence.block_table for sequence in metadata.sequences]
    blocks = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for row, table in zip(blocks, tables, strict=True):
        row[: len(table)] = table.numpy()
    return blocks


def step_of(metadata: AttentionMetadata) -> object:
    """The identity of one step, by which `Slots.find` knows what belongs together."""
    return metadata.plans.setdefault("cuda step", object())


def sent_block_tables(metadata: AttentionMetadata, device: torch.device) -> Tensor:
    """The block tables on the device, sent once a step."""
    if "cuda blocks" not in metadata.plans:
        metadata.plans["cuda blocks"] = send(block_tables(metadata), device)
    blocks: Tensor = metadata.plans["cuda blocks"]
    return blocks


@dataclass(frozen=True, slots=True)
class Buffer:
    """Named arrays in one buffer of int32, each on a 16-byte boundary.

    fields: (name, shape, whether it holds fp32 instead).
    """

    fields: tuple[tuple[str, tuple[int, ...], bool], ...]

    @property
    def size(self) -> int:
        return sum(_aligned(shape) for _, shape, _ in self.fields)

    def host(self) -> tuple[Ints, dict[str, NDArray[Any]]]:
        """The buffer as zeros, and its arrays as views."""
        buffer, begin = np.zeros(self.size, dtype=np.int32), 0
        views: dict[str, NDArray[Any]] = {}
        for name, shape, real in self.fields:
            view = buffer[begin : begin + int(np.prod(shape))].reshape(shape)
            views[name] = view.view(np.float32) if real else view
            begin += _aligned(shape)
        return buffer, views

    def device(self, buffer: Tensor) -> dict[str, Tensor]:
        """The views, by name, of the copy of this buffer on a device."""
        views, begin = {}, 0
        for name, shape, real in self.fields:
            view = buffer[begin : begin + int(np.prod(shape))].view(shape)
            views[name] = view.view(torch.float32) if real else view
            begin += _aligned(shape)
        return views


def _aligned(shape: tuple[int, ...]) -> int:
    return -(-int(np.prod(shape)) // 4) * 4
