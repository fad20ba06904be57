"""Reading the documents of a prompt on their own: see `cache.blocks.documents` for what that means.

A document is read by a sequence of its own, a `DocumentReader`: the prefix and the document, nothing to sample. It uses
the prefix cache like any other, so what was read once is found, and what it reads is there for the next. A sequence has
one reader at a time, for the document that its own rows have reached.

    the scheduler comes to a document ─ open: a reader ─ its rows in steps ─ copy: K and V to the sequence's place
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from prerope.cache.blocks.documents import STOP, DocumentSpan, next_copied, span_at
from prerope.cache.blocks.manager import KVCacheManager, PrefixHasher
from prerope.server.engine.outputs import TokenOutput
from prerope.server.engine.sequence import SamplingParams, Sequence
from prerope.server.engine.step import Scheduled

COPIED = 64
"""Tokens that are copied in less than the time in which a row is read. So many take a row of a step's budget, and so
does each document: a prompt may have a thousand, all known, or one as long as the cache."""


@dataclass(eq=False, slots=True, kw_only=True)
class DocumentReader(Sequence):
    """The prefix of `parent` and one of its documents, read for their K and V alone."""

    parent: Sequence
    document: DocumentSpan

    @classmethod
    def of(cls, parent: Sequence, document: DocumentSpan, block_size: int) -> DocumentReader:
        prefix = parent.request.documents[0].start
        ids = parent.token_ids[:prefix] + parent.token_ids[document.start : document.stop]
        request = replace(
            parent.request,
            request_id=f"{parent.request_id} document {document.start}",
            prompt_token_ids=ids,
            sampling=SamplingParams(max_tokens=0),
            documents=(),
        )
        hasher = PrefixHasher(block_size, parent.positions, request.cache_salt)
        hasher.hashes = parent.hasher.hashes[: min(prefix, parent.selects_from) // block_size]
        return cls(
            request=request,
            positions=parent.positions,
            hasher=hasher,
            generator=None,
            token_ids=ids,
            num_prompt_tokens=len(ids),
            arrived_at=parent.arrived_at,
            parent=parent,
            document=document,
        )

    def num_logits(self, start: int, count: int) -> int:  # noqa: ARG002
        return 0

    @property
    def num_reusable_tokens(self) -> int:
        return self.num_tokens

    @property
    def first_row(self) -> int:
        """The reader's row that reads the document's first token: the prefix's length."""
        return self.parent.request.documents[0].start

    def progress(self) -> list[tuple[str, TokenOutput]]:
        """What the parent has come to with a chunk of this document, where its caller wants to know."""
        parent, rows = self.parent, self.num_processed_tokens - self.first_row
        parent.num_processed_tokens = self.document.start + max(0, rows)
        return [(parent.request_id, parent.output())] if parent.request.report_progress else []

    def row_of(self, position: int) -> int:
        """Where this reader has the token at a position of its parent."""
        return self.first_row + position - self.document.start


class Copy(NamedTuple):
    """K and V of a document, from the slots where its reader has them to those of the sequence that reads it."""

    sequence: Sequence
    source: list[int]
    target: list[int]

    @property
    def slots(self) -> NDArray[np.int64]:
        """[2, n]"""
        return np.asarray([self.source, self.target], dtype=np.int64)


class Documents:
    """Readers of the documents of running sequences, and the copies that are to be made of what they have read."""

    def __init__(
        self,
        cache: KVCacheManager,
        schedule_rows: Callable[[Sequence, int, int, int, list[Scheduled]], int],
        grow: Callable[[Sequence, int, list[Scheduled]], bool],
    ) -> None:
        """schedule_rows, grow: the scheduler's."""
        self._cache, self._schedule_rows, self._grow = cache, schedule_rows, grow
        self.copies: list[Copy] = []

    def schedule(self, sequence: Sequence, num_tokens: int, plan: list[Scheduled]) -> None:
        """Schedule up to `num_tokens` rows of a prompt; documents that it comes to are copied, or read first."""
        position, documents, first = sequence.num_computed_tokens, sequence.request.documents, None
        while num_tokens > 0 and position < sequence.num_tokens:
            document = span_at(documents, position)
            if document is None:
                first = position if first is None else first
                stop = min(position + num_tokens, sequence.num_tokens)
                stop = min(stop, next_copied(documents, position, stop))
                stop = self._schedule_rows(sequence, position, stop, first, plan)
                if stop == position:
                    return
                num_tokens, position = num_tokens - (stop - position), stop
                continue
            reader = self.open(sequence, document, position)
            if reader.num_processed_tokens < reader.num_tokens:
                # The rows that a reader builds on, above all the prefix, may be computed in this very step: it waits.
                if first is None:
                    start = reader.num_computed_tokens
                    self._schedule_rows(reader, start, min(start + num_tokens, reader.num_tokens), start, plan)
                else:
                    self.close(sequence)
                return
            stop = min(document.stop, position + COPIED * num_tokens)
            num_tokens -= -(-(stop - position) // COPIED)
            if first is not None and num_tokens == 0:  # behind rows of this step it counts only with more rows
                self.close(sequence)
                return
            if not self._grow(sequence, stop, plan):
                return
            self.copy(reader, position, stop)
            position = stop
            if first is None:
                sequence.num_computed_tokens = position

    def open(self, sequence: Sequence, document: DocumentSpan, position: int) -> DocumentReader:
        """The reader of a document that is wanted from `position` on; it begins with what the cache has."""
        if sequence.reader is None:
            reader = sequence.reader = DocumentReader.of(sequence, document, self._cache.block_size)
            reader.num_processed_tokens = self._cache.take_prefix(reader)
            found = reader.num_processed_tokens - reader.row_of(position)
            sequence.documents_found.setdefault(document, max(0, found))
        assert isinstance(sequence.reader, DocumentReader)
        return sequence.reader

    def copy(self, reader: DocumentReader, position: int, stop: int) -> None:
        """From `position` of the parent to `stop`; at the document's end the reader's work is done."""
        parent = reader.parent
        source = self._cache.slots(reader, reader.row_of(position), reader.row_of(stop))
        self.copies.append(Copy(parent, source, self._cache.slots(parent, position, stop)))
        if stop == reader.document.stop:
            self.close(parent)

    def close(self, sequence: Sequence) -> None:
        """End its reader, if it has one."""
        if sequence.reader is not None:
            self._cache.release(sequence.reader)
            sequence.reader = None

    def forget(self, sequence: Sequence) -> None:
        """It runs no more: its reader ends, and nothing is copied to it."""
        self.copies = [copy for copy in self.copies if copy.sequence is not sequence]
        self.close(sequence)

    def blocks_to_read(self, sequence: Sequence) -> int:
        """Blocks that its readers, one at a time, are still to get beside its own."""
        held = 0 if sequence.reader is None else len(sequence.reader.block_table)
        place = bisect_right(sequence.request.documents, sequence.num_computed_tokens, key=STOP)
        largest = sequence.longest_readings[place]
        return max(0, self._cache.blocks_for(largest) - held)
