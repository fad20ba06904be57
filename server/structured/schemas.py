"""A client's JSON schema in words that llguidance enforces.

llguidance refuses a schema with a keyword that it does not enforce. Many of those ask for nothing where they stand
(`"uniqueItems": false`, `then` without `if`, a format of the client's own), or can be said in another way (the names of
an object's properties, as a dictionary with keys of an enumeration has them). The rewritten schema allows what the
client's allows or less, never more, with one exception that the caller is told of by name: `uniqueItems` of items that
cannot be listed. What can be said in no other way is left as it is, for llguidance to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import Any

from prerope.server.structured.formats import format_schema

Schema = dict[str, Any]

MAX_PERMUTED = 4
"""Items of a set that may come in any order."""

MAX_LISTED = 6
"""Items of a set that come in the order of their enumeration: 64 subsets."""

_ONE = ("additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then")
_UNEVALUATED = ("unevaluatedItems", "unevaluatedProperties")
_LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_MAPS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")
_APPLICATORS = frozenset(("$dynamicRef", "$ref", "allOf", "anyOf", "dependentSchemas", "if", "not", "oneOf"))
"""Keywords whose subschemas see the same value."""

_REMARKS = frozenset(("$comment", "default", "deprecated", "description", "examples", "readOnly", "title", "writeOnly"))

_LOOK_AROUND = re.compile(r"\(\?<?[=!]")


@dataclass(slots=True)
class Enforceable:
    """`schema` for llguidance. `dropped`: keywords that asked for something that is not enforced."""

    schema: Any
    dropped: list[str] = field(default_factory=list)


def enforceable(schema: Any) -> Enforceable:
    """Rewrites a schema. RecursionError where it nests deeper than Python can follow."""
    rewriter = _Rewriter(schema)
    return Enforceable(rewriter.rewritten(schema), sorted(rewriter.dropped))


class _Rewriter:
    def __init__(self, root: Any) -> None:
        self.root = root
        self.dropped: set[str] = set()

    def rewritten(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        new = {key: self._within(key, value) for key, value in schema.items()}
        for rule in (_counts, _remarks, _numbers_or_text, _unevaluated, _format, self._names, _keys, self._unique):
            rule(new)
        return new

    def _within(self, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            if key in _MAPS:
                return {name: self.rewritten(one) for name, one in value.items()}
            return self.rewritten(value) if key in _ONE or key in _UNEVALUATED else value
        if isinstance(value, list) and key in _LISTS:
            return [self.rewritten(one) for one in value]
        return value

    def _names(self, schema: Schema) -> None:
        """`propertyNames`: each name of an enumeration as a property, or one pattern of them all."""
        names, given = self._target(schema.get("propertyNames")), schema.get("properties", {})
        if names is None or "patternProperties" in schema or not isinstance(given, dict):
            return
        rest = schema.get("additionalProperties", True)
        if (listed := _enumerated(names)) is not None:
            known = [name for name in listed if isinstance(name, str) and (name in given or rest is not False)]
            schema |= {"properties": {name: given.get(name, rest) for name in known}, "additionalProperties": False}
        elif names and not given and (pattern := _name_pattern(names)) is not None:
            schema |= {"patternProperties": {pattern: rest}, "additionalProperties": False}
        elif names:
            return
        del schema["propertyNames"]

    def _unique(self, schema: Schema) -> None:
        """`uniqueItems` of an enumeration: every choice of its values as a tuple. Elsewhere it is dropped."""
        if "uniqueItems" not in schema:
            return
        if schema.pop("uniqueItems") is not True or schema.get("maxItems", 2) in (0, 1):
            return
        items = self._target(schema.get("items"))
        values = None if items is None or "prefixItems" in schema else _enumerated(items)
        if values is None or len(values) > MAX_LISTED:
            self.dropped.add("uniqueItems")
            return
        # The bounds on the number of items stay where they are, and choose among the tuples.
        del schema["items"]
        _also(schema, {"anyOf": [_tuple(chosen) for chosen in _choices(values)]})

    def _target(self, schema: Any) -> Schema | None:
        """The schema without remarks, behind a reference into this document; None where that is not one object."""
        for _ in range(8):
            if schema is True:
                return {}
            if not isinstance(schema, dict):
                return None
            bare = {key: value for key, value in schema.items() if key not in _REMARKS}
            if set(bare) != {"$ref"}:
                return bare
            schema = self._referenced(bare["$ref"])
        return None

    def _referenced(self, pointer: Any) -> Any:
        if not isinstance(pointer, str) or not pointer.startswith("#/"):
            return None
        found = self.root
        for part in pointer[2:].split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or name not in found:
                return None
            found = found[name]
        return found


def _counts(schema: Schema) -> None:
    """2.0 is a count, too."""
    for key in _COUNTS:
        if isinstance(value := schema.get(key), float) and value.is_integer():
            schema[key] = int(value)


def _remarks(schema: Schema) -> None:
    """Keywords that ask for nothing without another one."""
    if "if" not in schema:
        schema.pop("then", None)
        schema.pop("else", None)
    elif "then" not in schema and "else" not in schema:
        del schema["if"]
    if "contains" not in schema:
        schema.pop("minContains", None)
        schema.pop("maxContains", None)


def _keys(schema: Schema) -> None:
    """Patterns alone are those of a dictionary's keys, as pydantic writes one: other keys are not its own."""
    if "patternProperties" in schema and "properties" not in schema:
        schema.setdefault("additionalProperties", False)


def _numbers_or_text(schema: Schema) -> None:
    """Of a decimal number, as pydantic writes it, the number: the pattern of its text looks around."""
    branches = schema.get("anyOf")
    if not isinstance(branches, list):
        return
    if any(isinstance(one, dict) and one.get("type") in ("number", "integer") for one in branches):
        schema["anyOf"] = [one for one in branches if not _looks_around(one)]


def _looks_around(schema: Any) -> bool:
    return (
        isinstance(schema, dict) and isinstance(text := schema.get("pattern"), str) and bool(_LOOK_AROUND.search(text))
    )


def _unevaluated(schema: Schema) -> None:
    """`unevaluated…` is `additional…` where nothing else looks at the same value."""
    if not _APPLICATORS.isdisjoint(schema):
        return
    for key, plain in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if key in schema and "contains" not in schema:
            schema.setdefault(plain, schema[key])
            del schema[key]


def _format(schema: Schema) -> None:
    if "format" in schema and (followed := format_schema(schema.pop("format"))):
        _also(schema, followed)


def _also(schema: Schema, other: Schema) -> None:
    """`schema` asks for `other`, too."""
    both = schema.setdefault("allOf", [])
    if isinstance(both, list):  # otherwise llguidance says so
        both.append(other)


def _enumerated(schema: Schema) -> list[Any] | None:
    """The values that a schema lists, without repetition; None for one that lists none or says more."""
    says = set(schema) - {"type"}
    if says == {"enum"} and isinstance(schema["enum"], list):
        values = schema["enum"]
    elif says == {"const"}:
        values = [schema["const"]]
    elif not says and schema.get("type") == "boolean":
        values = [False, True]
    else:
        return None
    return [value for index, value in enumerate(values) if value not in values[:index]]


def _name_pattern(names: Schema) -> str | None:
    """A regex for names that a schema describes by one keyword."""
    says = set(names) - {"type"}
    if names.get("type", "string") != "string":
        return None
    if not says:
        return ""
    if says == {"pattern"}:
        return str(names["pattern"])
    if says <= {"minLength", "maxLength"}:
        return f"^(?s:.){{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
    if len(says) == 1 and "allOf" in says:  # a format, rewritten
        allof = names["allOf"]
        return str(allof[0]["pattern"]) if len(allof) == 1 and set(allof[0]) == {"pattern"} else None
    return None


def _choices(values: list[Any]) -> Iterator[tuple[Any, ...]]:
    choose: Callable[[list[Any], int], Iterator[tuple[Any, ...]]]
    choose = permutations if len(values) <= MAX_PERMUTED else combinations
    for size in range(len(values) + 1):
        yield from choose(values, size)


def _tuple(values: tuple[Any, ...]) -> Schema:
    return {
        "type": "array",
        "prefixItems": [{"const": value} for value in values],
        "items": False,
        "minItems": len(values),
    }
