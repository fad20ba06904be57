"""pydantic's complaints about a body in the words of an error reply. Text of a client is never repeated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prerope.server.api.requests.body import RequestBody
from prerope.server.errors import InvalidRequest
from pydantic import ValidationError

SHOWN_CHARS = 40
SILENT_FIELDS = frozenset({"prompt", "messages", "tokens"})
"""Fields whose values are never repeated, numbers included: they are token ids. Text is never repeated at all."""


def first_invalid(errors: Sequence[Any]) -> InvalidRequest:
    """The first of pydantic's complaints, with the field's name and its value."""
    first = errors[0]
    if first["type"] == "json_invalid":
        position = first["loc"][-1]
        reason = first.get("ctx", {}).get("error", "invalid")
        return InvalidRequest(f"The body is not valid JSON: {reason} at character {position}.", code="invalid_json")
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if not path:
        return InvalidRequest("The body must be a JSON object.", code="invalid_body")
    param = ".".join(path)
    message = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{param}: {message}{_shown(path[0], first)}", param=param, code=first["type"])


@contextmanager
def in_words_of(body: RequestBody) -> Iterator[None]:
    """What is wrong with a conversation, said of the field in which this body has it."""
    try:
        yield
    except ValidationError as error:  # adapters make messages and tools of what is theirs
        raise _of_field(first_invalid(error.errors()), body.asked_in) from None
    except InvalidRequest as refusal:
        if not body.asked_in:
            raise
        raise _of_field(refusal, body.asked_in) from None


_CONVERSATION = re.compile(r"(?<![^'])(?:messages|prompt)(?=$|['.\[])")


def _of_field(refusal: InvalidRequest, field: str) -> InvalidRequest:
    if not field or _CONVERSATION.match(refusal.param or "") is None:
        return refusal
    message, param = (_CONVERSATION.sub(field, text) for text in (refusal.message, refusal.param or ""))
    return InvalidRequest(message, param=param, code=refusal.code)


def _shown(field: str, error: Mapping[str, Any]) -> str:
    """The value, where it is a short number: text may be a prompt, a stop string or a key in the wrong place."""
    value = error.get("input")
    if field in SILENT_FIELDS or error["type"] == "missing" or not isinstance(value, bool | int | float):
        return ""
    text = repr(value)
    return f" (given: {text})" if len(text) <= SHOWN_CHARS else ""
