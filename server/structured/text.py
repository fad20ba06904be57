"""What a client asks its output to follow, as text. Knows no grammar library."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from prerope.server.errors import InvalidRequest

MAX_GRAMMAR_CHARS = 65_536
"""Of a schema, as JSON, or of the text of a regex or grammar: the choices or tools of one request together."""

JSON_WHITESPACE = r"[ ]|\r?\n[ \t]{0,32}"
"""At most this at each place where JSON allows whitespace."""

Kind = Literal["json", "regex", "lark"]


class Within(NamedTuple):
    """A document within a reply: the texts and special tokens behind which it begins, those by which it follows another
    one, and its schema."""

    head: tuple[str | int, ...]
    next_head: tuple[str | int, ...]
    schema: str


@dataclass(frozen=True, slots=True)
class GrammarText:
    """What a client asks for: `text` is a JSON schema, a regex or a grammar. `param` is the request's field.

    within: schemas of the JSON documents within a grammar of ours.
    """

    kind: Kind
    text: str
    param: str = field(compare=False)
    compact: bool = False
    within: tuple[Within, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        """Raises InvalidRequest where it is too long."""
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise InvalidRequest(
                f"'{self.param}' has {len(self.text)} characters; at most {MAX_GRAMMAR_CHARS} make a grammar",
                param=self.param,
                code="grammar_too_large",
            )

    @property
    def digest(self) -> bytes:
        """Equal for equal grammars, whatever the request's field is called."""
        return hashlib.sha256(f"{self.kind} {self.compact} {self.text}".encode(errors="surrogatepass")).digest()


def json_text(value: Any, param: str) -> str:
    """`value` as JSON. A body may nest deeper than Python can write."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise too_deep(param) from None


def too_deep(param: str) -> InvalidRequest:
    return InvalidRequest(f"'{param}' nests too deep to be compiled", param=param, code="grammar_too_large")


def json_options(compact: bool = False) -> dict[str, Any]:
    """What llguidance is told about whitespace in JSON (its `x-guidance`)."""
    return {"whitespace_flexible": False} if compact else {"whitespace_pattern": JSON_WHITESPACE}
