"""Schemas as sets of values: those that can be listed, and those that have no value in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from prerope.server.structured.document import Schema
from prerope.server.structured.values import KINDS, distinct, identity, kind, kinds, of_type

MAX_LOOKS = 3_000
"""Schemas that are looked at in one document to tell branches apart: some 15 ms, or 400 branches with a tag."""

MAX_TAGS = 256
"""Values of one enumeration that are looked at for that."""

MAX_DEPTH = 4
"""Objects within objects, and choices among choices, that are looked into."""


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
    else:
        return None
    return values and distinct([value for value in values if of_type(value, schema.get("type"))])


@dataclass(slots=True)
class _Facts:
    """What all values of some schemas have in common, and others may, too.

    Attributes:
        kinds: of the values.
        listed: the values, by identity; None where they are not listed.
        required: names that an object has.
        holders: the schemas that were read.
        choices: lists of schemas, one of each of which a value meets.
    """

    kinds: frozenset[str] = KINDS
    listed: dict[object, str] | None = None
    required: set[str] = field(default_factory=set)
    holders: list[Schema] = field(default_factory=list)
    choices: list[list[Any]] = field(default_factory=list)

    def add(self, schema: Schema) -> None:
        self.holders.append(schema)
        self.kinds &= kinds(schema.get("type")) if schema.get("not") not in ({}, True) else frozenset()
        for values in ([schema["const"]] if "const" in schema else None, schema.get("enum")):
            if isinstance(values, list) and len(values) <= MAX_TAGS and not any(map(_is_nested, values)):
                known = {identity(value): kind(value) for value in values}
                self.listed = known if self.listed is None else {one: known[one] for one in self.listed if one in known}
        self.required |= {name for name in _list(schema, "required") if isinstance(name, str)}
        self.choices += [some for key in ("anyOf", "oneOf") if (some := _list(schema, key))]

    def finish(self) -> None:
        if self.listed is not None:
            self.listed = {one: kind for one, kind in self.listed.items() if kind in self.kinds}
            self.kinds &= set(self.listed.values())

    def property(self, name: str) -> list[Any]:
        """The schemas that a property meets if it is there."""
        return [one for holder in self.holders for one in _property(holder, name)]


class _TooMuch(Exception):
    """More than is looked at."""


class Disjoint:
    """Finds schemas of a document that have no value in common: by type, by what they list, or by such a property that
    one of them requires. What it does not find may have none all the same."""

    def __init__(self, referenced: Callable[[Any], Any]) -> None:
        self._referenced = referenced
        self._known: dict[tuple[int, ...], tuple[list[Any], _Facts]] = {}
        self._left = MAX_LOOKS

    def branches(self, schema: Schema) -> bool:
        """Whether no value that a schema allows is in two branches of its `oneOf`."""
        beside = {key: value for key, value in schema.items() if key != "oneOf"}
        branches = [[beside, one] for one in _list(schema, "oneOf")]
        try:
            objects = [one for one in branches if self._facts(one).kinds == {"object"}]
            tagged = {id(one) for one in objects} if self._have_a_tag([*map(self._facts, objects)]) else set[int]()
            pairs = (pair for pair in combinations(branches, 2) if not {*map(id, pair)} <= tagged)
            return bool(branches) and all(self._are(*pair, MAX_DEPTH) for pair in pairs)
        except _TooMuch:
            return False

    def _have_a_tag(self, objects: list[_Facts]) -> bool:
        """Whether one property tells all objects apart, as a discriminator does: a short way past most pairs."""
        for name in sorted(set[str].intersection(*(one.required for one in objects))) if objects else ():
            seen = set[object]()
            for one in objects:
                self._look(one)
                listed = self._facts(one.property(name)).listed
                if listed is None or not seen.isdisjoint(listed):
                    break
                seen |= listed.keys()
            else:
                return True
        return False

    def _are(self, some: list[Any], others: list[Any], depth: int) -> bool:
        """Whether no value meets all schemas of both lists."""
        one, other = self._facts(some), self._facts(others)
        self._look(one, other)
        common = one.kinds & other.kinds
        if not common:
            return True
        if one.listed is not None and other.listed is not None and one.listed.keys().isdisjoint(other.listed):
            return True
        if not depth:
            return False
        names = sorted(one.required | other.required) if common == {"object"} else ()
        if any(self._are(one.property(name), other.property(name), depth - 1) for name in names):
            return True
        return self._by_choice(one, others, depth - 1) or self._by_choice(other, some, depth - 1)

    def _by_choice(self, one: _Facts, others: list[Any], depth: int) -> bool:
        return any(all(self._are([branch], others, depth) for branch in branches) for branches in one.choices)

    def _facts(self, schemas: list[Any]) -> _Facts:
        """The facts about values that meet all schemas of a list, with what those refer to."""
        key = tuple(map(id, schemas))
        if key in self._known:
            return self._known[key][1]
        facts, left, seen = _Facts(), [*schemas], set[int]()
        while left:
            schema = left.pop()
            if schema is False:
                facts.kinds = frozenset()
            if isinstance(schema, dict) and id(schema) not in seen:
                seen.add(id(schema))
                facts.add(schema)
                self._look(facts)
                left += [self._referenced(schema.get("$ref")), *_list(schema, "allOf")]
        facts.finish()
        self._known[key] = schemas, facts  # with the schemas, whose ids stay theirs
        return facts

    def _look(self, *at: _Facts) -> None:
        self._left -= 1 + sum(len(one.required) + len(one.holders) + len(one.listed or ()) for one in at) // 16
        if self._left < 0:
            raise _TooMuch


def _property(schema: Schema, name: str) -> list[Any]:
    properties = schema.get("properties", {})
    if isinstance(properties, dict) and name in properties:
        return [properties[name]]
    is_rest = isinstance(properties, dict) and not schema.get("patternProperties") and "additionalProperties" in schema
    return [schema["additionalProperties"]] if is_rest else []


def _list(schema: Schema, key: str) -> list[Any]:
    return value if isinstance(value := schema.get(key), list) else []


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | dict)
