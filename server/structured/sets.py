"""Sets that can be listed: the values that a schema names, and every choice of them as a tuple."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, permutations
from typing import Any

from prerope.server.structured.document import Schema
from prerope.server.structured.numbers import few_integers
from prerope.server.structured.values import distinct, of_type

MAX_PERMUTED = 4
"""Items of a set that may come in any order."""

MAX_LISTED = 7
"""Items of a set that come in the order of their enumeration: 128 subsets."""

MAX_CHOICES = 256
"""Such subsets and orders of all sets in a schema: some 130 characters each of what is compiled."""


def enumerated(schema: Schema) -> list[Any] | None:
    """The values that a schema lists, without repetition; None for one that lists none or says more."""
    values: list[Any] | None
    says = set(schema) - {"type"}
    if says == {"enum"} and isinstance(schema["enum"], list):
        values = schema["enum"]
    elif says == {"const"}:
        values = [schema["const"]]
    elif not says and schema.get("type") in ("boolean", "null"):
        values = [False, True] if schema["type"] == "boolean" else [None]
    elif schema.get("type") == "integer" and says <= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}:
        values = few_integers(schema, MAX_LISTED)
    else:
        return None
    return values and distinct([value for value in values if of_type(value, schema.get("type"))])


def choices(values: list[Any]) -> Iterator[Schema]:
    """Each choice of these values, in any order where they are few."""
    choose: Callable[[list[Any], int], Iterator[tuple[Any, ...]]]
    choose = permutations if len(values) <= MAX_PERMUTED else combinations
    for size in range(len(values) + 1):
        yield from map(_tuple, choose(values, size))


def _tuple(values: tuple[Any, ...]) -> Schema:
    return {
        "type": "array",
        "prefixItems": [{"const": value} for value in values],
        "items": False,
        "minItems": len(values),
    }
