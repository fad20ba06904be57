"""Values that a JSON schema lists: which are the same, and of which type they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

KINDS = frozenset({"null", "boolean", "integer", "fraction", "string", "array", "object"})

_LOOK_AROUND = re.compile(r"\(\?<?[=!]")
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Characters that are written by their number alone."""


class Unenforceable(ValueError):
    """What a schema asks for that no grammar could hold a reply to, in words for the client."""


def distinct(values: Sequence[Any]) -> list[Any]:
    """Each value once. In JSON 1 and 1.0 are the same and 1 and true are not; Python has it otherwise."""
    seen: dict[object, Any] = {}
    for value in values:
        seen.setdefault(identity(value), value)
    return list(seen.values())


def of_type(value: Any, types: Any) -> bool:
    """Whether a value is of one of the types that `type` names; None names all of them."""
    if types is None:
        return True
    named = types if isinstance(types, list) else [types]
    return bool(_types(value) & {name for name in named if isinstance(name, str)})


def kinds(types: Any) -> frozenset[str]:
    """The kinds of values that `type` allows; all where it is left out, or is no type. Numbers are of two kinds, since
    integers are a type beside them."""
    named = types if isinstance(types, list) else [types]
    if not all(isinstance(name, str) and name in KINDS - {"fraction"} | {"number"} for name in named):
        return KINDS
    return frozenset(named) - {"number"} | ({"integer", "fraction"} if "number" in named else set())


def kind(value: Any) -> str:
    """The kind of one value."""
    (found,) = _types(value) - {"number"} or {"fraction"}
    return found


def identity(value: Any) -> object:
    """A key that is equal for values that are equal in JSON."""
    if isinstance(value, list):
        return "array", tuple(map(identity, value))
    if isinstance(value, dict):
        return "object", frozenset((name, identity(one)) for name, one in value.items())
    return isinstance(value, bool), value


def unsigned_zeros(value: Any) -> Any:
    """The same value, without the sign of any zero in it."""
    if isinstance(value, list):
        return [unsigned_zeros(one) for one in value]
    if isinstance(value, dict):
        return {name: unsigned_zeros(one) for name, one in value.items()}
    return 0 if isinstance(value, float) and not value else value


def _types(value: Any) -> set[str]:
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"integer", "number"} if value.is_integer() else {"number"}
        case str():
            return {"string"}
        case list():
            return {"array"}
        case _:
            return {"object"}


def holds_control(value: Any) -> bool:
    """Whether a text within a value has a character that is written by its number."""
    if isinstance(value, list):
        return any(map(holds_control, value))
    if isinstance(value, dict):
        return any(map(holds_control, value.values()))
    return isinstance(value, str) and _CONTROL.search(value) is not None


def looks_around(schema: Any) -> bool:
    """Whether a schema has a pattern with look-around, which no grammar has."""
    return (
        isinstance(schema, dict) and isinstance(text := schema.get("pattern"), str) and bool(_LOOK_AROUND.search(text))
    )
