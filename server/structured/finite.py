"""Refuses JSON schemas that no finite value fits: `{"type": "object", "properties": {"a": {"$ref": "#"}}, "required":
["a"]}` asks for an object in an object, and so on for ever.

What is looked at are the keywords by which a schema can ask for another one: references, branches, required properties
and items. Others are taken to be met. A schema that only may hold an endless one is refused, too: a reply that began
it would be cut. What no value fits for another reason is left to llguidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from prerope.server.structured.document import APPLICATORS, Schema
from prerope.server.structured.numbers import is_number
from prerope.server.structured.productive import Needs
from prerope.server.structured.values import Unenforceable

SHOWN = 64
"""Characters of a reference in a message."""

_DEFINITIONS = frozenset({"$defs", "definitions"})

Referenced = Callable[[Any], Any]
"""What a reference names; None where that is not known."""


def check_finite(root: Any, referenced: Referenced) -> None:
    """Unenforceable where a schema in use refers to one that no finite value fits."""
    graph = _Graph(referenced)
    graph.number(root)
    graph.build()
    endless = graph.needs.endless()
    for reference, target in graph.references:
        if target in endless:
            raise Unenforceable(
                f"no finite value fits '{reference[:SHOWN]}': what it requires leads back to itself; make a property "
                "on the way optional, or give it another choice (null, an empty list)"
            )


class _Graph:
    """The schemas in use as `Needs`. references: each with the number of what it names."""

    def __init__(self, referenced: Referenced) -> None:
        self.needs = Needs()
        self.references: list[tuple[str, int]] = []
        self._referenced = referenced
        self._numbers: dict[int, int] = {}
        self._left: list[Schema] = []

    def number(self, schema: Any) -> int:
        if schema is False or (isinstance(schema, dict) and schema.get("not") in ({}, True)):
            return self.needs.never
        if not isinstance(schema, dict):
            return self.needs.always
        if id(schema) not in self._numbers:
            self._numbers[id(schema)] = self.needs.add()
            self._left.append(schema)
        return self._numbers[id(schema)]

    def build(self) -> None:
        while self._left:
            schema = self._left.pop()
            parts = [*self._parts(schema)]
            self.needs.settle(self._numbers[id(schema)], len(parts), parts)

    def _parts(self, schema: Schema) -> Iterator[int]:
        """All that a value has to meet at once."""
        if isinstance(reference := schema.get("$ref"), str):
            target = self._referenced(reference)
            number = self.needs.always if target is None else self.number(target)
            self.references.append((reference, number))
            yield number
        yield from self._all(schema.get("allOf"))
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                yield self.needs.any_of(self._all(schema[key]))
        types = schema.get("type")
        named = [types] if isinstance(types, str) else types if isinstance(types, list) else None
        shapes = {"object": self._object, "array": self._array}
        possible = {one: shape(schema) for one, shape in shapes.items() if named is None or one in named}
        if named is not None and not ({"const", "enum"} & schema.keys()):
            yield self.needs.any_of(possible.get(str(one), self.needs.always) for one in named)

    def _all(self, schemas: Any) -> list[int]:
        return [self.number(one) for one in schemas] if isinstance(schemas, list) else []

    def _object(self, schema: Schema) -> int:
        if schema.get("maxProperties") == 0:
            return self.needs.always
        properties, patterns = _map(schema, "properties"), _map(schema, "patternProperties")
        named = {name: self.number(one) for name, one in properties.items()}
        matching = {pattern: self.number(one) for pattern, one in patterns.items()}
        rest = self._rest(schema, "additionalProperties", "unevaluatedProperties")
        required = [name for name in _list(schema, "required") if isinstance(name, str)]
        unlisted = self.needs.any_of([rest, *matching.values()])  # a client's pattern may take for ever to match
        needed = [named.get(name, unlisted) for name in required]
        if (least := _least(schema, "minProperties")) > 0:
            enough = self.needs.add(least, named.values())
            needed.append(self.needs.any_of([enough, unlisted]))
        return self.needs.all_of(needed)

    def _array(self, schema: Schema) -> int:
        if schema.get("maxItems") == 0:
            return self.needs.always
        items, tuples = schema.get("items"), isinstance(schema.get("items"), list)
        first = items if isinstance(items, list) else _list(schema, "prefixItems")
        rest = self._rest(schema, "additionalItems" if tuples else "items", "unevaluatedItems")
        places = self._all(first)
        least = _least(schema, "minItems")
        needed = places[:least] + ([rest] if least > len(places) else [])
        if "contains" in schema:
            held = self.number(schema["contains"])
            needed += [held] if schema.get("minContains", 1) != 0 else []
        return self.needs.all_of(needed)

    def _rest(self, schema: Schema, key: str, unevaluated: str) -> int:
        """What names or items are that no other keyword lists. Neighbours may list those that are `unevaluated…`."""
        if key in schema:
            return self.number(schema[key])
        number = self.number(schema.get(unevaluated, True))
        return number if APPLICATORS.isdisjoint(schema) else self.needs.always


def _least(schema: Schema, key: str) -> int:
    """How many a schema asks for at least; none where it says no number. JSON as Python reads it has infinite ones."""
    value = schema.get(key, 0)
    if not is_number(value):
        return 0
    if not abs(value) < math.inf:
        raise Unenforceable(f"'{key}' is {value}: it must be a whole number from 0")
    return max(math.ceil(value), 0)


def _map(schema: Schema, key: str) -> dict[str, Any]:
    return value if isinstance(value := schema.get(key), dict) else {}


def _list(schema: Schema, key: str) -> list[Any]:
    return value if isinstance(value := schema.get(key), list) else []
