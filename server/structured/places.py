"""Where in a document values must differ from each other, by the schema that it follows.

A grammar cannot tell that an item was there before, so `schemas` marks such schemas by `MARK`, and `differing` holds a
reply to them beside the grammar. A place is known by all schemas that a value there may follow; where one of them is
marked, the place is. So a reply may be held to more than its schema asks for, and never to less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prerope.server.structured.document import REMARKS, Document, Schema, subschemas
from prerope.server.structured.sets import enumerated
from prerope.server.structured.values import Unenforceable, distinct

MARK = "x-differ"
ITEMS, NAMES = "items", "names"
"""What must differ: an array's items, an object's names. A mark is a list of these."""

MAX_LOOKS = 40_000
"""Schemas that are looked at in one document, some 40 ms: a schema counts once for each place that may follow it."""

MAX_LOOKS_TO_COUNT = 200
"""Those that are looked at to tell how many values there are."""

_MANY = 10**9


class Place:
    """One place of a document, the same for all replies. Places within it where nothing must differ are None."""

    __slots__ = (
        *("_named", "_places", "_schemas", "has_free_items", "has_free_names", "items_differ", "names_differ"),
    )

    def __init__(self, places: Places, schemas: list[Schema]) -> None:
        self._places, self._schemas = places, schemas
        self._named: dict[object, Place | None] = {}
        marks = {mark for one in schemas for mark in one.get(MARK, ())}
        self.items_differ, self.names_differ = ITEMS in marks, NAMES in marks
        items = [item for one in schemas for item in (one.get("items", True), *_list(one, "prefixItems"))]
        self.has_free_items = all(map(_is_free, places.closure(items)))
        self.has_free_names = not any(_map(one, "patternProperties") or "propertyNames" in one for one in schemas)

    def item(self, index: int) -> Place | None:
        """Of an array's item."""
        most = max((len(_list(one, "prefixItems")) for one in self._schemas), default=0)
        return self._within(min(index, most))

    def value(self, name: str) -> Place | None:
        """Of an object's value. A name that no schema lists is any of them."""
        return self._within(name if any(name in _map(one, "properties") for one in self._schemas) else None)

    def all_within(self) -> Iterator[Place]:
        lists = (len(_list(one, "prefixItems")) for one in self._schemas)
        names = {name for one in self._schemas for name in _map(one, "properties")}
        keys: list[object] = [*range(max(lists, default=0) + 1), *sorted(names), None]
        yield from (found for key in keys if (found := self._within(key)) is not None)

    def check(self) -> None:
        """Unenforceable where more values are asked for than there may be."""
        for one in self._schemas:
            least = one.get("minItems", 0)
            if self.items_differ and least > 1 and _is_array(one):
                items = [one.get("items", True), *_list(one, "prefixItems")]
                if min(self._places.count(item, MAX_LOOKS_TO_COUNT) for item in items) < least:
                    raise Unenforceable(
                        f"'uniqueItems' with 'minItems' {least}, and it is not known that there are so many different "
                        "items: leave 'minItems' out, or list the items with 'enum'"
                    )
            least = one.get("minProperties", 0)
            if self.names_differ and least > 1 and _map(one, "patternProperties"):
                raise Unenforceable(
                    f"'minProperties' is {least}, and it is not known that so many names match 'patternProperties': "
                    "leave 'minProperties' out, or list the names with 'properties'"
                )

    def _within(self, key: object) -> Place | None:
        if key not in self._named:
            self._named[key] = self._places.of(_held(self._schemas, key))
        return self._named[key]


class Places:
    """The places of one document. Unenforceable where they cannot be told."""

    def __init__(self, root: Any) -> None:
        self._document = Document(root)
        self._known: dict[frozenset[int], Place] = {}
        self._left = MAX_LOOKS
        self._leading = self._that_lead_to_marks(root)
        self.root = self.of([root])
        left = [] if self.root is None else [self.root]
        seen = {id(one) for one in left}
        while left:
            place = left.pop()
            place.check()
            new = [one for one in place.all_within() if id(one) not in seen]
            seen |= {id(one) for one in new}
            left += new

    def of(self, schemas: Iterable[Any]) -> Place | None:
        """The place of a value that follows one of some schemas, or several."""
        found = self.closure(schemas)
        key = frozenset(map(id, found))
        if self._leading.isdisjoint(key):
            return None
        if key not in self._known:
            self._known[key] = Place(self, found)
        return self._known[key]

    def closure(self, schemas: Iterable[Any]) -> list[Schema]:
        """Some schemas with all others that look at the same value."""
        found, left = dict[int, Schema](), list(schemas)
        while left:
            one = left.pop()
            if isinstance(one, dict) and id(one) not in found:
                found[id(one)] = one
                left += [self._document.referenced(one.get("$ref"))]
                left += [branch for key in ("allOf", "anyOf", "oneOf") for branch in _list(one, key)]
        self._look(1 + len(found))
        return list(found.values())

    def _look(self, at: int) -> None:
        self._left -= at
        if self._left < 0:
            raise Unenforceable("items must differ in too many places; set 'uniqueItems' in fewer schemas")

    def _that_lead_to_marks(self, root: Any) -> set[int]:
        """The schemas from which a marked one is reached."""
        nodes, held_by, marked = dict[int, Schema](), dict[int, list[int]](), list[int]()
        left = [root] if isinstance(root, dict) else []
        while left:
            node = left.pop()
            if id(node) in nodes:
                continue
            nodes[id(node)] = node
            if MARK in node:
                marked.append(id(node))
            target = self._document.referenced(node.get("$ref"))
            if "$ref" in node and target is None:
                raise Unenforceable("'uniqueItems' beside a '$ref' that leads out of the schema: put that into '$defs'")
            for one in [*subschemas(node), *([target] if isinstance(target, dict) else [])]:
                held_by.setdefault(id(one), []).append(id(node))
                left.append(one)
        leading = set[int]()
        while marked:
            if (schema_id := marked.pop()) not in leading:
                leading.add(schema_id)
                marked += held_by.get(schema_id, ())
        return leading

    def count(self, schema: Any, looks: int) -> int:
        """At least so many values follow a schema, as far as one can see."""
        self._look(1)
        if schema is True or schema == {}:
            return _MANY
        if not isinstance(schema, dict) or looks <= 0:
            return 0
        if "$ref" in schema and not schema.keys() - REMARKS - {"$ref"}:
            return self.count(self._document.referenced(schema["$ref"]), looks - 1)
        bare = {key: value for key, value in schema.items() if key not in REMARKS and key != MARK}
        branches = _list(bare, "anyOf") if set(bare) <= {"anyOf", "type"} else []
        if branches:
            listed = [enumerated(one) for one in branches if isinstance(one, dict)]
            least = len(distinct([value for values in listed for value in values or ()]))
            return max(least, *(self.count(one, looks // 2) for one in branches))
        if (values := enumerated(bare)) is not None:
            return len(values)
        return self._count_of_type(bare, looks)

    def _count_of_type(self, bare: Schema, looks: int) -> int:
        asks = set(bare) - {"type"}
        match bare.get("type"):
            case "string" if asks <= {"minLength", "maxLength"}:
                return int(26 ** min(bare.get("maxLength", 6), 6))
            case "integer" | "number" as kind if asks <= _BOUNDS:
                low = max(bare.get(key, -_MANY) for key in ("minimum", "exclusiveMinimum"))
                high = min(bare.get(key, _MANY) for key in ("maximum", "exclusiveMaximum"))
                return max(0, int(high - low) - 1) if kind == "integer" else _MANY if low < high else 0
            case "array" if asks <= {"items", "minItems"}:
                return self.count(bare.get("items", True), looks - 1)
            case "object" if asks <= {"properties", "required", "additionalProperties"}:
                named = _map(bare, "properties").values()
                return max((self.count(one, looks // 4) for one in named), default=0)
        return 0


_BOUNDS = frozenset({"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"})


def _held(schemas: list[Schema], key: object) -> Iterator[Any]:
    """The schemas of an array's item (an index), or of an object's value (a name; None: any that is not listed)."""
    for one in schemas:
        if isinstance(key, int):
            listed = _list(one, "prefixItems")
            yield listed[key] if key < len(listed) else one.get("items")
            continue
        given = _map(one, "properties")
        yield given.get(key) if key in given else one.get("additionalProperties")
        yield from _map(one, "patternProperties").values()


def _is_free(schema: Schema) -> bool:
    """Whether a schema leaves all texts as long as they like to be."""
    types = schema.get("type", "string")
    return "string" not in (types if isinstance(types, list) else [types]) or schema.keys().isdisjoint(_LIMITS)


_LIMITS = frozenset({"const", "enum", "format", "maxLength", "pattern"})


def _is_array(schema: Schema) -> bool:
    types = schema.get("type", "array")
    return "array" in (types if isinstance(types, list) else [types])


def _list(schema: Schema, key: str) -> list[Any]:
    return value if isinstance(value := schema.get(key), list) else []


def _map(schema: Schema, key: str) -> dict[Any, Any]:
    return value if isinstance(value := schema.get(key), dict) else {}
