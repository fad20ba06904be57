"""Documents of a chat as clients write them: parts of a message, and the `documents` that RAG templates know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from prerope.server.api.requests.body import RequestBody, unicode_text
from prerope.server.api.requests.documents import (
    MAX_DOCUMENTS,
    REREAD_FIELD,
    Attention,
    DocumentReading,
    check_number,
)
from prerope.server.api.requests.wording import json_type
from prerope.server.errors import InvalidRequest
from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

MAX_DEPTH = 8
"""How deep objects and lists may nest within a document's object."""

TEXT_NAMES = ("text", "content", "contents", "page_content", "snippet", "data")
"""What a document's text is called, by those who send `documents`."""

SEPARATOR = "\n\n"
HEADING = "Documents:"

Fields = Mapping[str, Any]
"""A document as templates take it: an object whose texts they write."""


class Content(str):
    """The text of a message, and where documents are in it: (start, stop) in order, in characters."""

    documents: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, text: str, documents: Iterable[tuple[int, int]]) -> Content:
        content = cls(text)
        content.documents = tuple(documents)
        return content

    @classmethod
    def joined(cls, parts: Sequence[str]) -> Content:
        """Parts in their order: texts with a line break between them, documents with an empty line around them."""
        pieces, places, length, previous = list[str](), list[tuple[int, int]](), 0, ""
        for index, part in enumerate(parts):
            if index:
                pieces.append(SEPARATOR if isinstance(part, Document) or isinstance(previous, Document) else "\n")
                length += len(pieces[-1])
            inside = part.documents if isinstance(part, Content) else ()
            places += [(length + start, length + stop) for start, stop in inside]
            pieces.append(part)
            length, previous = length + len(part), part
        return cls.of("".join(pieces), places)

    def stripped(self) -> Content:
        """Without white space at its ends, as many templates write it."""
        text = self.strip()
        first = len(self) - len(self.lstrip())
        cut = [(max(start - first, 0), min(stop - first, len(text))) for start, stop in self.documents]
        return Content.of(text, ((start, stop) for start, stop in cut if start < stop))


class Document(Content):
    """A text that is a document as a whole."""

    @classmethod
    def whole(cls, text: str) -> Document:
        document = cls(text)
        document.documents = ((0, len(text)),)
        return document


def document_part(part: Mapping[str, Any], param: str) -> Document:
    """A part of type `document`: {"text"}, {"document": {…} or text}, or Anthropic's {"source", "title", "context"}."""
    if "source" in part:
        texts = [part.get("title"), part.get("context"), _source(part["source"], f"{param}.source")]
    elif isinstance(part.get("document"), dict):
        texts = [part.get("title"), as_plain_text(part["document"])]
    else:
        name = "document" if "document" in part else "text"
        texts = [part.get("title"), unicode_text(part.get(name), f"{param}.{name}")]
    text = "\n".join(unicode_text(one, param) for one in texts if one)
    if not text.strip():
        raise InvalidRequest(f"'{param}' is an empty document: leave it out", param="messages")
    return Document.whole(text)


DOCUMENT_PART_NAMES = frozenset({"type", "source", "title", "context", "document", "text"})


def _source(source: Any, param: str) -> str:
    """The text of one of Anthropic's document blocks; sources of other types are refused."""
    if not isinstance(source, dict):
        raise InvalidRequest(f"'{param}' must be an object, not {json_type(source)}", param="messages")
    match source.get("type"):
        case "text":
            return unicode_text(source.get("data"), f"{param}.data")
        case "content":
            content = source.get("content")
            if isinstance(content, str):
                return unicode_text(content, f"{param}.content")
            if isinstance(content, list) and all(
                isinstance(one, dict) and one.get("type") == "text" for one in content
            ):
                return "\n".join(unicode_text(one.get("text"), f"{param}.content") for one in content)
    kind = str(source.get("type"))[:64]
    raise InvalidRequest(
        f"'{param}' has the type '{kind}': this server reads text only ('text', or 'content' with blocks of text)",
        param="messages",
        code="unsupported_field",
    )


def documents_field(value: Any) -> list[Fields]:
    """The `documents` of a chat: texts, or objects such as {"title", "text"}."""
    if not isinstance(value, list):
        raise InvalidRequest(f"'documents' must be a list, not {json_type(value)}", param="documents")
    check_number(len(value), "documents")
    documents: list[Fields] = []
    for index, one in enumerate(value):
        param = f"documents[{index}]"
        if not isinstance(one, str | dict):
            raise InvalidRequest(f"'{param}' must be an object or a text, not {json_type(one)}", param="documents")
        fields: Fields = {"text": one} if isinstance(one, str) else one
        if _depth(fields) > MAX_DEPTH:
            raise InvalidRequest(f"'{param}' is nested more than {MAX_DEPTH} deep", param="documents")
        for text in texts_of(fields):
            unicode_text(text, param)
        if not as_plain_text(fields).strip():
            raise InvalidRequest(f"'{param}' is empty: leave it out", param=param)
        documents.append(fields)
    return documents


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a document's fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from texts_of(one)


def _depth(value: Any) -> int:
    """Levels of objects and lists; what is deeper than allowed is not looked at."""
    depth, level = 0, [value]
    while depth <= MAX_DEPTH and (level := [one for one in level if isinstance(one, dict | list)]):
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def as_plain_text(fields: Fields) -> str:
    """A document for a model whose template takes none: its title and text, or whatever fields it has, one a line."""
    name = next((name for name in TEXT_NAMES if isinstance(fields.get(name), str | dict)), None)
    if name is None:
        return "\n".join(f"{key}: {value}" for key, value in fields.items() if isinstance(value, str) and value)
    body = fields[name]
    text = as_plain_text(body) if isinstance(body, dict) else body
    title = fields.get("title")
    return f"{title}\n{text}" if isinstance(title, str) and title else text


_FIELD_SCHEMA: dict[str, Any] = {
    "type": "array",
    "maxItems": MAX_DOCUMENTS,
    "items": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "object", "minProperties": 1}]},
}


class ChatDocumentFields(RequestBody):
    """Documents of a chat beside those in its messages, how all are read, and what else its template is told."""

    documents: Annotated[list[Fields], PlainValidator(documents_field), WithJsonSchema(_FIELD_SCHEMA)] = Field(
        default_factory=list,
        description="Texts or objects such as {title, text}. The chat template writes them; where it takes none, they "
        "stand before the first words of the user. Each is read on its own and found again in any order.",
    )
    document_attention: Attention | None = Field(
        None,
        description="own: a document sees what stands before the first one, and itself; full: everything before it. "
        "Unset: own, or full where the chat template writes documents otherwise than they are.",
    )
    document_reread: int = REREAD_FIELD
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="Handed to the chat template.")

    @model_validator(mode="after")
    def _documents_by_either_name(self) -> ChatDocumentFields:
        if given := self.chat_template_kwargs.pop("documents", None):
            self.documents = self.documents or documents_field(given)
        return self

    def document_reading(self) -> DocumentReading:
        return DocumentReading(attention=self.document_attention, reread=self.document_reread)
