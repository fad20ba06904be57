"""A client's JSON schema in words that llguidance enforces.

llguidance refuses a schema with a keyword that it does not enforce. Many of those ask for nothing where they stand
(`"uniqueItems": false`, `then` without `if`, a format of the client's own), or can be said in another way (the names of
an object's properties, as a dictionary with keys of an enumeration has them). What it would take and not hold is said
in another way, too, or refused. The rewritten schema allows what the client's allows or less, never more. That items or
names differ from each other (`uniqueItems`, `minProperties`) no grammar can tell: such schemas get a mark, and `unique`
holds a reply to it. Where it cannot, the caller is told, and it is for the caller to refuse. What can be said in no
other way is left as it is, for llguidance to refuse.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prerope.server.structured.document import APPLICATORS, LISTS, MAPS, ONE, REMARKS, VALUES, Document, Schema
from prerope.server.structured.finite import check_finite
from prerope.server.structured.formats import format_schema
from prerope.server.structured.names import listed_patterns, name_pattern
from prerope.server.structured.numbers import check_numbers, narrow_bounds
from prerope.server.structured.sets import Disjoint, enumerated
from prerope.server.structured.unique.items import MANY, MARK, NAMES, Items, items_of
from prerope.server.structured.unique.places import Places
from prerope.server.structured.values import Unenforceable, distinct, holds_control, looks_around, unsigned_zeros
from prerope.server.structured.versions import as_drafted

LETTERS = 'nrbtf\\"'
"""Of the escapes in strings; `u`, for control characters that have no letter, is not among them. llguidance lets any
character of a name that is not listed be written by its number, and so a listed name, too."""

ONE_WRITING = {"whitespace_flexible": False, "json_allowed_escapes": LETTERS}
"""The options of a document that is one item: no value has two texts."""

WHITESPACE = ("whitespace_flexible", "whitespace_pattern")

_COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")
_TYPES = ("null", "boolean", "number", "string", "object", "array")
_OF_ITEMS = frozenset({"items", "maxItems", "minItems", "type"})
_DEFINITIONS = frozenset({"$defs", "definitions", "x-guidance", MARK})


@dataclass(slots=True)
class Enforceable:
    """`schema` for llguidance, with marks. `dropped`: keywords that are not enforced, each with the reason."""

    schema: Any
    dropped: dict[str, str] = field(default_factory=dict)


def enforceable(schema: Any) -> Enforceable:
    """Rewrites a schema. Unenforceable says why a reply could not be held to it; RecursionError where it nests deeper
    than Python can follow."""
    schema = {} if schema is True else as_drafted(schema)
    said = _rewritten(schema, "")
    try:
        if said.marked:
            Places(said.schema, lambda mark: mark)
    except Unenforceable as error:
        return _rewritten(schema, str(error)).enforceable
    return said.enforceable


@dataclass(slots=True)
class _Rewritten:
    schema: Any
    dropped: dict[str, str]
    marked: bool

    @property
    def enforceable(self) -> Enforceable:
        return Enforceable(self.schema, self.dropped)


def _rewritten(schema: Any, unheld: str) -> _Rewritten:
    """unheld: why nothing can be held to differ; empty where some may."""
    rewriter = _Rewriter(Document(schema), unheld)
    check_finite(schema, rewriter.document.referenced)
    new = rewriter.rewritten(schema)
    if not rewriter.document.ids <= rewriter.done:
        raise Unenforceable("a '$ref' names a listed value, which is no schema")
    if isinstance(new, dict):
        new.pop("$schema", None)  # all drafts are said in the words of the last one
        told = _whitespace(new.pop("x-guidance", None))
        if rewriter.document.has_one_writing:
            told["json_allowed_escapes"] = LETTERS
        if told:
            new["x-guidance"] = told
    return _Rewritten(new, rewriter.dropped, rewriter.marked)


def _whitespace(options: Any) -> dict[str, Any]:
    """Keep only the options of `json_options` for llguidance: others would turn its enforcement off."""
    return {name: options[name] for name in WHITESPACE if name in options} if isinstance(options, dict) else {}


class _Rewriter:
    def __init__(self, document: Document, unheld: str) -> None:
        self.document = document
        self.dropped: dict[str, str] = {}
        self.marked = False
        self.done: set[int] = set()
        self._unheld = unheld
        self._disjoint = Disjoint(document.referenced)

    def rewritten(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return self._elsewhere(schema)
        self.done.add(id(schema))
        if schema.get("not") in ({}, True) and schema.keys() - REMARKS == {"not"}:
            self.done.add(id(schema["not"]))
            return False  # as zod writes it
        new = {key: self._within(key, value) for key, value in schema.items() if key != MARK}
        if not self.document.one_of_is_named and self._disjoint.branches(schema):
            _one_of(new)
        exact = self.document.is_exact(schema)
        self._check_listed(new)
        narrow_bounds(new, met=self.document.is_met)
        for rule in (_counts, _items, _remarks, _unevaluated, _format):
            rule(new)
        listed_patterns(
            new, lambda key, name: isinstance(one := schema[key][name], dict) and self.document.is_named(one)
        )
        if not exact:
            _keys(new)
            _numbers_or_text(new)
        self._names(new, exact=exact)
        self._unique(new, schema, exact=exact)
        self._differing_names(new)
        return new

    def _within(self, key: str, value: Any) -> Any:
        if key in VALUES:
            return value
        if isinstance(value, dict) and key in MAPS:
            return {name: self.rewritten(one) for name, one in value.items()}
        if isinstance(value, list) and key in LISTS:
            return [self.rewritten(one) for one in value]
        return self.rewritten(value) if key in ONE else self._elsewhere(value)

    def _elsewhere(self, value: Any) -> Any:
        """Under a name that holds no schema (`components`) are schemas all the same where references name them."""
        if isinstance(value, list):
            return [self._elsewhere(one) for one in value]
        if not isinstance(value, dict):
            return value
        if id(value) in self.document.ids:
            return self.rewritten(value)
        return {name: self._elsewhere(one) for name, one in value.items()}

    def _check_listed(self, schema: Schema) -> None:
        """Unenforceable for a listed value that could not be written. -0.0 is written as 0, which is the same."""
        for key in schema.keys() & {"const", "enum"}:
            check_numbers(schema[key])
            schema[key] = unsigned_zeros(schema[key])
            if self.document.has_one_writing and holds_control(schema[key]):
                raise Unenforceable(
                    f"'{key}' lists a control character: with names beside those of 'properties', or 'uniqueItems', "
                    "none can be written; set 'additionalProperties' to false, or leave 'uniqueItems' out"
                )

    def _names(self, schema: Schema, *, exact: bool) -> None:
        """`propertyNames`: each name of an enumeration as a property, or one pattern of them all."""
        names, given = self._target(schema.get("propertyNames")), schema.get("properties", {})
        if names is None or "patternProperties" in schema or not isinstance(given, dict):
            return
        rest = schema.get("additionalProperties", True)
        if (listed := enumerated(names)) is not None:
            known = [name for name in listed if isinstance(name, str) and (name in given or rest is not False)]
            schema |= {"properties": {name: given.get(name, rest) for name in known}, "additionalProperties": False}
        elif names and not given and (pattern := name_pattern(names, exact=exact)) is not None:
            schema |= {"patternProperties": {pattern: rest}, "additionalProperties": False}
        elif names:
            return
        del schema["propertyNames"]

    def _unique(self, schema: Schema, given: Schema, *, exact: bool) -> None:
        """`uniqueItems`. given: the schema as the client has it."""
        may_be_array = "array" in _types(schema)
        if schema.pop("uniqueItems", None) is not True or not may_be_array or schema.get("maxItems", 2) in (0, 1):
            return
        try:
            if self._unheld:
                raise Unenforceable(self._unheld)
            if beside := sorted(schema.keys() - _OF_ITEMS - REMARKS - _DEFINITIONS):
                raise Unenforceable(f"'uniqueItems' is not held beside '{beside[0]}': leave one of the two out")
            if not all(type(schema.get(key, 0)) is int for key in ("maxItems", "minItems")):
                raise Unenforceable("'minItems' and 'maxItems' must be whole numbers beside 'uniqueItems'")
            items = self._items(given.get("items"), exact=exact)
            if schema.get("minItems", 0) > items.count:
                raise Unenforceable(
                    f"'uniqueItems' with 'minItems' {schema['minItems']}, and no more than {items.count} items are "
                    "known to differ: ask for fewer"
                )
        except Unenforceable as error:
            self.dropped["uniqueItems"] = str(error)
            return
        if items.count < MANY:
            schema["maxItems"] = min(schema.get("maxItems", items.count), items.count)
        own = _Rewriter(Document(items.schema), "").rewritten(items.schema)
        if not exact:
            schema["items"] = own
        self._mark(schema, "items", items.mark | {"schema": own | {"x-guidance": ONE_WRITING}})

    def _items(self, items: Any, *, exact: bool) -> Items:
        try:
            return items_of(items, self._target, exact=exact)
        except Unenforceable as error:
            raise Unenforceable(
                f"'uniqueItems' is not held for items {error}. It is for strings without a pattern, whole numbers, "
                "numbers without bounds, and what 'enum' lists: leave 'uniqueItems' out, or list the items"
            ) from None

    def _differing_names(self, schema: Schema) -> None:
        """More names than are listed may be one name twice: a grammar cannot tell."""
        least, required = schema.get("minProperties", 0), schema.get("required", [])
        patterns, is_object = schema.get("patternProperties", {}), "object" in _types(schema)
        if not (isinstance(least, int) and isinstance(required, list) and isinstance(patterns, dict) and is_object):
            return
        closed = schema.get("additionalProperties") is False and not patterns
        if closed or least <= len(distinct(required)) + 1:
            return
        if not self._unheld and "propertyNames" not in schema and not patterns.keys() - {""}:
            self._mark(schema, "names", NAMES)
            return
        self.dropped["minProperties"] = self._unheld or (
            f"'minProperties' {least} is not held for names that follow a pattern or 'propertyNames': leave it out, or "
            "list the names by 'properties'"
        )

    def _mark(self, schema: Schema, what: str, mark: dict[str, Any]) -> None:
        schema.setdefault(MARK, {})[what] = mark
        self.marked = True

    def _target(self, schema: Any) -> Schema | None:
        """The schema without remarks, behind a reference into this document; None where that is not one object."""
        for _ in range(8):
            if schema is True:
                return {}
            if not isinstance(schema, dict):
                return None
            bare = {key: value for key, value in schema.items() if key not in REMARKS}
            if set(bare) != {"$ref"}:
                return bare
            schema = self.document.referenced(bare["$ref"])
        return None


def _types(schema: Schema) -> list[Any]:
    types = schema.get("type", list(_TYPES))
    return types if isinstance(types, list) else [types]


def _counts(schema: Schema) -> None:
    """2.0 is a count, too."""
    for key in _COUNTS:
        if isinstance(value := schema.get(key), float) and value.is_integer():
            schema[key] = int(value)


def _items(schema: Schema) -> None:
    """A list of items, as older drafts have it, is `prefixItems`; `additionalItems` asks for nothing without one."""
    items, rest = schema.get("items"), schema.pop("additionalItems", None)
    if not isinstance(items, list):
        return
    if "prefixItems" in schema:
        raise Unenforceable("'items' is a list beside 'prefixItems'")
    del schema["items"]
    schema["prefixItems"] = items
    if rest is not None:
        schema["items"] = rest


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
    if "patternProperties" in schema and schema.keys().isdisjoint(("properties", "required")):
        schema.setdefault("additionalProperties", False)


def _numbers_or_text(schema: Schema) -> None:
    """Keep only the number of pydantic's decimal: the pattern of its text looks around."""
    branches = schema.get("anyOf")
    if not isinstance(branches, list):
        return
    if any(isinstance(one, dict) and one.get("type") in ("number", "integer") for one in branches):
        schema["anyOf"] = [False if looks_around(one) else one for one in branches]  # in place: references count


def _unevaluated(schema: Schema) -> None:
    """`unevaluated…` is `additional…` where nothing else looks at the same value."""
    if not APPLICATORS.isdisjoint(schema):
        return
    for key, plain in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if key in schema and "contains" not in schema:
            schema.setdefault(plain, schema[key])
            del schema[key]


def _one_of(schema: Schema) -> None:
    """`oneOf` is `anyOf` where no value is in two branches."""
    any_of = {"anyOf": schema.pop("oneOf")}
    if "anyOf" in schema:
        _also(schema, any_of)
    else:
        schema |= any_of


def _format(schema: Schema) -> None:
    if "format" in schema and (followed := format_schema(schema.pop("format"))):
        _also(schema, followed)


def _also(schema: Schema, other: Schema) -> None:
    """`schema` asks for `other`, too."""
    both = schema.setdefault("allOf", [])
    if isinstance(both, list):  # otherwise llguidance says so
        both.append(other)
