"""The words of refusals: what JSON calls a value, how much of a client's is shown, and pydantic's complaints in ours.

Text of a client is never repeated: it may be a prompt, or a key in the wrong place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prerope.server.errors import InvalidRequest

MAX_SHOWN = 64
"""Characters of a client's own text that an error message repeats at most."""


def shown_number(number: float) -> str:
    """A number of any size, short enough for an error message."""
    return str(number) if isinstance(number, float) or abs(number) < 10**20 else "beyond 20 digits"


def json_type(value: object) -> str:
    """What JSON calls the type of `value`, with the article that a sentence needs."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


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


def _shown(field: str, error: Mapping[str, Any]) -> str:
    """The value, where it is a short number: text may be a prompt, a stop string or a key in the wrong place."""
    value = error.get("input")
    if field in SILENT_FIELDS or error["type"] == "missing" or not isinstance(value, bool | int | float):
        return ""
    text = repr(value)
    return f" (given: {text})" if len(text) <= SHOWN_CHARS else ""
