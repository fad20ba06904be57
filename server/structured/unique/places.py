"""Where in a document items or names must differ, by the marks of its rewritten schema.

A place is known by all schemas that a value there may follow. Those that may be an array (or an object, for names) have
to agree on what differs, and nothing else may look at it; else the document is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prerope.server.structured.document import REMARKS, Schema, pointed, subschemas
from prerope.server.structured.unique.items import MARK
from prerope.server.structured.values import Unenforceable

MAX_PLACES = 1_000
"""Of one document."""

MAX_LOOKS = 300_000
"""At schemas of one document, one at several places: some tenths of a second."""

_WRAPS = frozenset({"$ref", "anyOf", "oneOf", "allOf"})
_BESIDE = REMARKS | {"$defs", "definitions", "x-guidance"}

ANY: Schema = {}
"""`true`, as a schema."""

Language = Any
"""What `seen` makes of a mark."""


class Place:
    """One place of a document, the same for all replies. items, names: what differs there, if anything. Places within
    it where nothing must differ are None."""

    __slots__ = ("_arrays", "_most", "_named", "_names", "_objects", "_patterns", "_places", "items", "names")

    def __init__(self, places: Places, schemas: list[Schema]) -> None:
        self._places = places
        arrays = [one for one in schemas if _looks(one, "array")]
        objects = [one for one in schemas if _looks(one, "object")]
        self._arrays = [(_list(one, "prefixItems"), one.get("items", True)) for one in arrays]
        self._objects = [(_map(one, "properties"), one.get("additionalProperties", True)) for one in objects]
        self._patterns = [held for one in objects for held in _map(one, "patternProperties").values()]
        self._most = max((len(listed) for listed, _ in self._arrays), default=0)
        self._names = {name for listed, _ in self._objects for name in listed}
        self._named: dict[object, Place | None] = {}
        self.items = places.language(schemas, "items", "array")
        self.names = places.language(schemas, "names", "object")

    def item(self, index: int) -> Place | None:
        """The schema of an array's item."""
        return self._within(min(index, self._most))

    def value(self, name: str) -> Place | None:
        """The schema of an object's value. A name that no schema lists is any of them."""
        return self._within(name if name in self._names else None)

    def all_within(self) -> Iterator[Place]:
        keys: list[object] = [*range(self._most + 1), *sorted(self._names), None]
        yield from (found for key in keys if (found := self._within(key)) is not None)

    def _within(self, key: object) -> Place | None:
        if key not in self._named:
            self._named[key] = self._places.of(self._held(key))
        return self._named[key]

    def _held(self, key: object) -> list[Any]:
        """The schemas of an array's item (an index), or of an object's value (a name; None: any that is not listed)."""
        if isinstance(key, int):
            held = [listed[key] if key < len(listed) else rest for listed, rest in self._arrays]
        else:
            held = [*(listed.get(key, rest) for listed, rest in self._objects), *self._patterns]
        return [one for one in held if one is not False]


class Places:
    """The places of one document. Unenforceable where what must differ cannot be told."""

    def __init__(self, root: Any, languages: Callable[[dict[str, Any]], Language]) -> None:
        self._document, self._languages = root, languages
        self._known: dict[frozenset[int], Place] = {}
        self._marked = set[int]()
        self._left = MAX_LOOKS
        self._leading = self._that_lead_to_marks()
        self.root = self.of([root])
        left = [] if self.root is None else [self.root]
        seen = {id(one) for one in left}
        while left:  # all of them now: what is wrong is said at once
            new = [one for one in left.pop().all_within() if id(one) not in seen]
            seen |= {id(one) for one in new}
            left += new
        if not self._marked <= {schema_id for key in self._known for schema_id in key}:
            raise _unclear()  # under a keyword that is not followed

    def of(self, schemas: Iterable[Any]) -> Place | None:
        """The place of a value that follows one of some schemas, or several."""
        found = self._closure(schemas)
        key = frozenset(map(id, found))
        if self._leading.isdisjoint(key):
            return None
        if key not in self._known:
            if len(self._known) >= MAX_PLACES:
                raise Unenforceable(f"items must differ in more than {MAX_PLACES} places: set 'uniqueItems' in fewer")
            self._known[key] = Place(self, found)
        return self._known[key]

    def language(self, schemas: list[Schema], what: str, kind: str) -> Language | None:
        """What differs at the place of these schemas."""
        marks = [one[MARK][what] for one in schemas if what in one.get(MARK, ())]
        if not marks:
            return None
        others = [one for one in schemas if what not in one.get(MARK, ()) and _looks(one, kind)]
        if others or any(mark != marks[0] for mark in marks):
            raise _unclear()
        return self._languages(marks[0])

    def _closure(self, schemas: Iterable[Any]) -> list[Schema]:
        """Some schemas with all others that look at the same value."""
        found, left = dict[int, Schema](), list(schemas)
        while left:
            self._left -= 1
            if not self._left:
                raise Unenforceable("its branches are too many to tell what must differ: leave 'uniqueItems' out")
            one = ANY if (one := left.pop()) is True else one
            if isinstance(one, dict) and id(one) not in found:
                found[id(one)] = one
                left += [pointed(self._document, one.get("$ref"))]
                left += [branch for key in ("allOf", "anyOf", "oneOf") for branch in _list(one, key)]
        return list(found.values())

    def _that_lead_to_marks(self) -> set[int]:
        """The schemas from which a marked one is reached."""
        nodes, held_by = dict[int, Schema](), dict[int, list[int]]()
        left = [self._document] if isinstance(self._document, dict) else []
        while left:
            node = left.pop()
            if id(node) in nodes:
                continue
            nodes[id(node)] = node
            self._marked |= {id(node)} if MARK in node else set()
            target = pointed(self._document, node.get("$ref"))
            if "$ref" in node and target is None:
                raise Unenforceable("'uniqueItems' beside a '$ref' that leads out of the schema: put that into '$defs'")
            for one in [*subschemas(node), *([target] if isinstance(target, dict) else [])]:
                held_by.setdefault(id(one), []).append(id(node))
                left.append(one)
        leading, to_marks = set[int](), [*self._marked]
        while to_marks:
            if (schema_id := to_marks.pop()) not in leading:
                leading.add(schema_id)
                to_marks += held_by.get(schema_id, ())
        return leading


def _unclear() -> Unenforceable:
    return Unenforceable(
        "values that must differ ('uniqueItems', 'minProperties') stand where they may follow another schema, too "
        "(anyOf, allOf): leave the keyword out, or give it to each of the branches alike"
    )


def _looks(schema: Schema, kind: str) -> bool:
    """Whether a schema has a say of its own in a value of this kind."""
    types = schema.get("type", kind)
    if kind not in (types if isinstance(types, list) else [types]):
        return False
    own = schema.keys() - _BESIDE
    wraps = len(own) == 1 and own <= _WRAPS
    return not wraps or len(_list(schema, "allOf")) > 1


def _list(schema: Schema, key: str) -> list[Any]:
    return value if isinstance(value := schema.get(key), list) else []


def _map(schema: Schema, key: str) -> dict[Any, Any]:
    return value if isinstance(value := schema.get(key), dict) else {}
