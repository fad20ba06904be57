"""What rank 0 tells the others: which rows a step computes, which slots are copied, and that it is over.

An order is whole numbers, nothing of a client's but its token ids:

    step    STEP, chunks, methods, numbers a method; of each method its fields; of each chunk start, tokens, blocks,
            logits, method and, where its last token is still on the device, its place there (else −1); then all
            tokens, then all blocks
    copy    COPY, then the slots to copy from and, as many, those to copy to
    end     nothing

A position method goes as it was asked for, and is resolved by each rank: to the same, since it is a function of that
and of the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from prerope.rope.spec import ALIASES, METHOD_NAMES, RopeSpec
from prerope.server.models.model import Chunk
from prerope.server.ranks.group import Ints, Ranks

if TYPE_CHECKING:
    from prerope.rope.model import ModelPositions
    from prerope.server.engine.engine import Engine

STEP, COPY = 1, 2
NAMES = (*METHOD_NAMES, *ALIASES)
SPEC_FIELDS = [field.name for field in fields(RopeSpec) if field.name not in ("method", "groups")]
"""Those of one number. The name goes before them, as its place in NAMES; groups, of which there may be many, last."""
CHUNK_FIELDS = 6


def tell_step(ranks: Ranks, chunks: Sequence[Chunk]) -> None:
    """Tell the other ranks to compute these chunks, too."""
    ranks.tell(pack_step(chunks))


def tell_copy(ranks: Ranks, slots: Ints) -> None:
    """Tell the other ranks to copy K and V; slots [2, n]: from which to which."""
    ranks.tell(np.concatenate([[COPY], slots.ravel()]))


def tell_end(ranks: Ranks) -> None:
    ranks.tell(np.empty(0, dtype=np.int64))


def pack_step(chunks: Sequence[Chunk]) -> Ints:
    specs: dict[RopeSpec, int] = {}
    rows: list[int] = []
    tokens: list[int] = []
    tables: list[Ints] = []
    for chunk in chunks:
        spec = chunk.positions.spec
        assert spec is not None, "positions of a request are resolved from a spec"
        table = np.asarray(chunk.block_table, dtype=np.int64)
        place = specs.setdefault(spec, len(specs))
        pending = -1 if chunk.pending_place is None else chunk.pending_place
        rows += (chunk.start, len(chunk.token_ids), len(table), chunk.num_logits, place, pending)
        tokens += chunk.token_ids
        tables.append(table)
    numbers = list(itertools.zip_longest(*map(_numbers, specs), fillvalue=math.nan))
    head = np.array([STEP, len(chunks), len(specs), len(numbers)], dtype=np.int64)
    methods = np.array(numbers, dtype=np.float64).T.copy().view(np.int64)
    return np.concatenate([head, methods.ravel(), np.array(rows, np.int64), np.array(tokens, np.int64), *tables])


def unpack_step(message: Ints, resolve: Callable[[RopeSpec], ModelPositions]) -> list[Chunk]:
    """The chunks that `pack_step` was given, with this rank's own positions."""
    _, num_chunks, num_specs, width = message[:4].tolist()
    methods, rows, rest = np.split(message[4:], np.cumsum([num_specs * width, num_chunks * CHUNK_FIELDS]))
    fields_of_methods = methods.copy().view(np.float64).reshape(num_specs, width).tolist()
    positions = [resolve(_spec(numbers)) for numbers in fields_of_methods]
    rows = rows.reshape(num_chunks, CHUNK_FIELDS)
    tokens, *tables = np.split(rest, np.cumsum([rows[:, 1].sum(), *rows[:-1, 2]]))
    of_chunks = np.split(tokens, np.cumsum(rows[:-1, 1]))
    return [
        Chunk.of(ids.tolist(), start, table, positions[place], num_logits, None if pending < 0 else pending)
        for (start, _, _, num_logits, place, pending), ids, table in zip(rows.tolist(), of_chunks, tables, strict=True)
    ]


def _numbers(spec: RopeSpec) -> list[float]:
    name, *parameters, groups = astuple(spec)
    numbers = [math.nan if value is None else float(value) for value in parameters]
    return [NAMES.index(name), *numbers, *map(float, groups or ())]


def _spec(numbers: list[float]) -> RopeSpec:
    one_each, groups = numbers[1 : 1 + len(SPEC_FIELDS)], numbers[1 + len(SPEC_FIELDS) :]
    given = {name: value for name, value in zip(SPEC_FIELDS, one_each, strict=True) if not math.isnan(value)}
    whole: dict[str, Any] = {name: _KINDS[name](value) for name, value in given.items()}
    whole["groups"] = tuple(int(group) for group in groups if not math.isnan(group)) or None
    return RopeSpec(method=NAMES[int(numbers[0])], **whole)


_KINDS = {name: float if name in ("factor", "leak") else bool if name == "logn" else int for name in SPEC_FIELDS}


@torch.inference_mode()
def follow(engine: Engine) -> None:
    """Do what rank 0 tells, until it says that it is over. RankLost where it ends without a word."""
    ranks, told_at = engine.model.raw.ranks, 0
    while len(message := ranks.hear()):
        if message[0] == COPY:
            engine.copy(message[1:].reshape(2, -1).copy())
            continue
        chunks = unpack_step(message, engine.resolve_positions)
        handed_on = any(chunk.pending_place is not None for chunk in chunks)
        num_touched = 1 + max(int(max(chunk.block_table, default=-1)) for chunk in chunks)
        if num_touched >= told_at:
            told_at = engine.storage.expect(num_touched)
        own = [replace(chunk, pending_place=None) for chunk in chunks]  # rank 0 puts all tokens in, and hands them on
        engine.compute(own, None, handed_on=handed_on)
