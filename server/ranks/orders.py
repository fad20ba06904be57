"""What rank 0 tells the others: which rows a step computes, which slots are copied, and that it is over.

An order is whole numbers, nothing of a client's but its token ids:

    step    STEP, chunks, methods; of each method its fields; of each chunk start, tokens, blocks, logits, method and
            whether its last token is still on the device; then all tokens, then all blocks
    copy    COPY, then the slots to copy from and, as many, those to copy to
    end     nothing

A position method goes as it was asked for, and is resolved by each rank: to the same, since it is a function of that
and of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from prerope.rope.spec import ALIASES, METHOD_NAMES, RopeSpec
from prerope.server.models.batch import Chunk
from prerope.server.ranks.group import Ints, Ranks

if TYPE_CHECKING:
    from prerope.server.engine.engine import Engine

STEP, COPY = 1, 2
NAMES = (*METHOD_NAMES, *ALIASES)
SPEC_FIELDS = [field.name for field in fields(RopeSpec)][1:]  # the method's name goes as its place in NAMES
CHUNK_FIELDS = 6


@dataclass(frozen=True, slots=True)
class ToldChunk:
    """A `Chunk` without what is the rank's own: its method is as asked for, its last token may be rank 0's to give."""

    token_ids: list[int]
    start: int
    blocks: Ints
    spec: RopeSpec
    num_logits: int
    pending: bool


def tell_step(ranks: Ranks, chunks: Sequence[Chunk]) -> None:
    """The others will compute these, too."""
    ranks.tell(encode_step(chunks))


def tell_copy(ranks: Ranks, slots: Ints) -> None:
    """[2, n]: from which slots to which."""
    ranks.tell(np.concatenate([[COPY], slots.ravel()]))


def tell_end(ranks: Ranks) -> None:
    ranks.tell(np.empty(0, dtype=np.int64))


def encode_step(chunks: Sequence[Chunk]) -> Ints:
    specs: dict[RopeSpec, int] = {}
    rows: list[int] = []
    tokens: list[int] = []
    tables: list[Ints] = []
    for chunk in chunks:
        spec = chunk.positions.spec
        assert spec is not None, "positions of a request are resolved from a spec"
        table = np.asarray(chunk.block_table, dtype=np.int64)
        place = specs.setdefault(spec, len(specs))
        pending = int(chunk.pending_place is not None)
        rows += (chunk.start, len(chunk.token_ids), len(table), chunk.num_logits, place, pending)
        tokens += chunk.token_ids
        tables.append(table)
    head = np.array([STEP, len(chunks), len(specs)], dtype=np.int64)
    methods = np.array([_numbers(spec) for spec in specs], dtype=np.float64).view(np.int64)
    return np.concatenate([head, methods.ravel(), np.array(rows, np.int64), np.array(tokens, np.int64), *tables])


def decode_step(message: Ints) -> list[ToldChunk]:
    """What `encode_step` was given."""
    _, num_chunks, num_specs = message[:3].tolist()
    width, rest = 1 + len(SPEC_FIELDS), message[3:]
    methods, rest = rest[: num_specs * width].copy().view(np.float64), rest[num_specs * width :]
    specs = [_spec(row) for row in methods.reshape(num_specs, width).tolist()]
    rows, rest = rest[: num_chunks * CHUNK_FIELDS].reshape(num_chunks, CHUNK_FIELDS).tolist(), rest
    tokens = rest[num_chunks * CHUNK_FIELDS :]
    blocks = tokens[sum(row[1] for row in rows) :]
    chunks = []
    for start, num_tokens, num_blocks, num_logits, place, pending in rows:
        chunks.append(
            ToldChunk(tokens[:num_tokens].tolist(), start, blocks[:num_blocks], specs[place], num_logits, bool(pending))
        )
        tokens, blocks = tokens[num_tokens:], blocks[num_blocks:]
    return chunks


def _numbers(spec: RopeSpec) -> list[float]:
    name, *parameters = astuple(spec)
    return [NAMES.index(name), *(math.nan if value is None else float(value) for value in parameters)]


def _spec(numbers: list[float]) -> RopeSpec:
    given = {name: value for name, value in zip(SPEC_FIELDS, numbers[1:], strict=True) if not math.isnan(value)}
    whole: dict[str, Any] = {name: _KINDS[name](value) for name, value in given.items()}
    return RopeSpec(method=NAMES[int(numbers[0])], **whole)


_KINDS = {name: float if name in ("factor", "leak") else bool if name == "logn" else int for name in SPEC_FIELDS}


@torch.inference_mode()
def follow(engine: Engine) -> None:
    """Do what rank 0 tells, until it says that it is over. RankLost where it ends without a word."""
    ranks = engine.model.raw.ranks
    while len(message := ranks.hear()):
        if message[0] == COPY:
            engine.copy(message[1:].reshape(2, -1).copy())
            continue
        told = decode_step(message)
        chunks = [
            Chunk(one.token_ids, one.start, one.blocks, engine.resolve_positions(one.spec), one.num_logits)
            for one in told
        ]
        engine.compute(chunks, None, handed_on=any(one.pending for one in told))
