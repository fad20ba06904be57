"""Reading the documents of a prompt on their own: see `cache.blocks.documents` for what that means.

A document is read by a sequence of its own, a `DocumentReader`: the prefix and the document, nothing to sample. It uses
the prefix cache like any other, so what was read once is found, and what it reads is there for the next. A sequence has
one reader at a time, for the document that its own rows have reached.

    the scheduler comes to a document ─ open: a reader ─ its rows in steps ─ copy: K and V to the sequence's place
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from prerope.cache.blocks.documents import DocumentSpan, largest_reading, next_copied, span_at
from prerope.cache.blocks.manager import KVCacheManager, PrefixHasher
from prerope.server.engine.outputs import TokenOutput
from prerope.server.engine.sequence import SamplingParams, Sequence
from prerope.server.engine.step import Scheduled


@dataclass(eq=False, slots=True, kw_only=True)
class DocumentReader(Sequence):
    """The prefix of `parent` and one of its documents, read for their K and V alone."""

    parent: Sequence
    document: DocumentSpan

    @classmethod
    def of(cls, parent: Sequence, document: DocumentSpan, block_size: int) -> DocumentReader:
        ids = parent.token_ids[: parent.request.documents[0].start] + parent.token_ids[document.start : document.stop]
        request = replace(
            parent.request,
            request_id=f"{parent.request_id} document {document.start}",
            prompt_token_ids=ids,
            sampling=SamplingParams(max_tokens=0),
            documents=(),
        )
        return cls(
            request=request,
            positions=parent.positions,
            hasher=PrefixHasher(block_size, parent.positions, request.cache_salt),
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
            if not self._grow(sequence, document.stop, plan):
                return
            self.copy(reader, position)
            position = document.stop
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

    def copy(self, reader: DocumentReader, position: int) -> None:
        """From `position` of the parent to the document's end; the reader's work is done then."""
        parent, stop = reader.parent, reader.document.stop
        source = self._cache.slots(reader, reader.row_of(position), reader.row_of(stop))
        self.copies.append(Copy(parent, source, self._cache.slots(parent, position, stop)))
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
        largest = largest_reading(sequence.request.documents, sequence.num_computed_tokens)
        return max(0, self._cache.blocks_for(largest) - held)
