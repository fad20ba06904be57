"""Reading the documents of a prompt on their own: see `cache.blocks.documents` for what that means.

A document is read by a sequence of its own, a `DocumentReader`: the prefix and the document, nothing to sample. It uses
the prefix cache like any other, so what was read once is found, and what it reads is there for the next. A sequence has
one reader at a time, for the document that its own rows have reached.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prerope.cache.blocks.documents import DocumentSpan
from prerope.cache.blocks.manager import PrefixHasher
from prerope.server.engine.sequence import SamplingParams, Sequence


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

    def row_of(self, position: int) -> int:
        """Where this reader has the token at a position of its parent."""
        return self.first_row + position - self.document.start
