"""Documents of a prompt, as clients send them; `cache.blocks.documents` says how they are read.

Prefix, each document and the rest are tokenised apart, so a document's tokens do not depend on what stands beside it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from prerope.cache.blocks.documents import DocumentSpan
from prerope.server.api.requests.body import RequestBody, token_ids, unicode_text
from prerope.server.api.requests.wording import json_type
from prerope.server.errors import InvalidRequest
from pydantic import Field, PlainValidator, WithJsonSchema

MAX_DOCUMENTS = 1024
DEFAULT_PREFIX = "Documents:\n\n"
"""Documents are read worse with nothing before them: some tokens at the beginning of a text draw attention anyway."""

DEFAULT_REREAD = 16
"""Tokens of a document that are read again at their place; `python -m bench.reuse` compares others."""

Given = str | list[int]
Attention = Literal["own", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentReading:
    """How documents are read.

    Attributes:
        attention: own: each is read on its own; full: as plain text in this order; None: own, or full where a chat
            template writes them otherwise than they are.
        reread: tokens of each that are read again at their place.
    """

    attention: Attention | None = None
    reread: int = DEFAULT_REREAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """What stands before a prompt: a prefix, then documents."""

    given: Sequence[Given]
    prefix: Given = DEFAULT_PREFIX
    reading: DocumentReading = DocumentReading()


class Piece(NamedTuple):
    """Consecutive tokens of a prompt, tokenised by themselves."""

    ids: list[int]
    is_document: bool = False


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """Token ids, and which of them are documents that are read on their own. A worker sends the ids packed."""

    ids: Sequence[int]
    documents: tuple[DocumentSpan, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (array("i", self.ids).tobytes(), self.documents)


def _unpacked(packed: bytes, documents: tuple[DocumentSpan, ...]) -> TokenizedPrompt:
    return TokenizedPrompt(array("i", packed), documents)


def _given(value: Any, param: str) -> Given:
    if isinstance(value, str):
        return unicode_text(value, param)
    if isinstance(value, list):
        ids = token_ids(value, param)
        if ids and min(ids) < 0:  # checked here too, since a prefix without documents meets no vocabulary
            raise InvalidRequest(f"'{param}' holds {min(ids)}: token ids are not negative", param=param)
        return ids
    raise InvalidRequest(f"'{param}' must be text or a list of token ids, not {json_type(value)}", param=param)


def check_number(count: int, param: str) -> None:
    """Refuse more documents than a request may have."""
    if count > MAX_DOCUMENTS:
        raise InvalidRequest(
            f"'{param}' has {count} documents: at most {MAX_DOCUMENTS} are taken; join some of them", param=param
        )


def not_cut() -> InvalidRequest:
    return InvalidRequest(
        "'truncate_prompt_tokens' would cut the documents: send fewer of them", param="truncate_prompt_tokens"
    )


def _documents(value: Any) -> list[Given]:
    if not isinstance(value, list):
        raise InvalidRequest(f"'documents' must be a list, not {json_type(value)}", param="documents")
    check_number(len(value), "documents")
    documents = [_given(one, f"documents[{index}]") for index, one in enumerate(value)]
    for index, one in enumerate(documents):
        if not one:
            raise InvalidRequest(f"'documents[{index}]' is empty: leave it out", param=f"documents[{index}]")
    return documents


_GIVEN_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0}}]
}
_FULL_SCHEMA: dict[str, Any] = {
    "type": "array",
    "maxItems": MAX_DOCUMENTS,
    "items": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        ]
    },
}


REREAD_FIELD: Any = Field(
    DEFAULT_REREAD, ge=0, le=65536, description="Tokens at the beginning of each document that see all before them."
)


class DocumentFields(RequestBody):
    """Documents before the prompt, each read once in any order and for any question."""

    documents: Annotated[list[Given], PlainValidator(_documents), WithJsonSchema(_FULL_SCHEMA)] = Field(
        default_factory=list,
        description="Texts or token ids that stand before the prompt. Each is read on its own and found again in any "
        "order; separators between them are yours to write.",
    )
    document_prefix: Annotated[
        Given, PlainValidator(lambda value: _given(value, "document_prefix")), WithJsonSchema(_GIVEN_SCHEMA)
    ] = Field(DEFAULT_PREFIX, description="What stands before the first document, and is seen by all of them.")
    document_attention: Attention = Field(
        "own", description="own: a document sees the prefix and itself; full: all before it, as in a plain prompt."
    )
    document_reread: int = REREAD_FIELD

    def wanted_documents(self) -> Documents | None:
        if not self.documents:
            return None
        return Documents(
            given=self.documents,
            prefix=self.document_prefix,
            reading=DocumentReading(attention=self.document_attention, reread=self.document_reread),
        )


def assembled(pieces: Iterable[Piece], reading: DocumentReading) -> TokenizedPrompt:
    """The prompt of these pieces, with the spans of its documents where they are read on their own."""
    ids: list[int] = []
    spans: list[DocumentSpan] = []
    for piece in pieces:
        if piece.is_document and piece.ids:
            # The first document has the prefix alone before it, in a prompt as on its own: it is read at its place.
            reread = reading.reread if spans else len(piece.ids)
            spans.append(DocumentSpan(len(ids), len(ids) + len(piece.ids), reread))
        ids += piece.ids
    return TokenizedPrompt(ids, () if reading.attention == "full" else tuple(spans))
