"""What a JSON schema says by the draft that it is written in: up to draft 7, nothing beside a `$ref` is read."""

from __future__ import annotations

import re
from typing import Any

from prerope.server.structured.document import MAPS, VALUES

_OLD = re.compile(r"https?://json-schema\.org/draft-0[3-7]/(hyper-)?schema#?")
_MAY_BE_NULL = frozenset({"const", "default"})
_KEPT = frozenset({"$ref", "$defs", "definitions", "x-guidance"})
"""What stands beside a reference and is no part of it: names that it, or others, may lead to."""


def as_drafted(schema: Any) -> Any:
    """The schema in words of the newest draft: a copy without what its own ignores, and without the draft's name.
    RecursionError where it nests deeper than Python can follow."""
    if not isinstance(schema, dict):
        return schema
    draft = schema.get("$schema")
    if isinstance(draft, str) and _OLD.fullmatch(draft):
        schema = _read({key: value for key, value in schema.items() if key != "$schema"})
    return _stated(schema)


def _stated(value: Any) -> Any:
    """Without keywords that are null: so clients write those which they leave out."""
    if isinstance(value, list):
        return [_stated(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {key: _stated_at(key, one) for key, one in value.items() if one is not None or key in _MAY_BE_NULL}


def _stated_at(key: str, value: Any) -> Any:
    if key in VALUES:
        return value
    if key in MAPS and isinstance(value, dict):
        return {name: _stated(one) for name, one in value.items()}
    return _stated(value)


def _read(value: Any) -> Any:
    """Rewrite a schema, and every value that may hold one."""
    if isinstance(value, list):
        return [_read(one) for one in value]
    if not isinstance(value, dict):
        return value
    refers = isinstance(value.get("$ref"), str)
    return {key: _within(key, one) for key, one in value.items() if not refers or key in _KEPT}


def _within(key: str, value: Any) -> Any:
    if key in VALUES:
        return value
    if key in MAPS and isinstance(value, dict):  # whose names are the client's
        return {name: _read(one) for name, one in value.items()}
    return _read(value)
