"""A client's JSON schema in words that llguidance enforces.

llguidance refuses a schema with a keyword that it does not enforce. Many of those ask for nothing where they stand
(`"uniqueItems": false`, `then` without `if`, a format of the client's own), or can be said in another way (the names of
an object's properties, as a dictionary with keys of an enumeration has them). What it would take and not hold is said
in another way, too, or refused. The rewritten schema allows what the client's allows or less, never more, with one
exception that the caller is told of by name: that items or names differ from each other (`uniqueItems`,
`minProperties`) where they cannot be listed. What can be said in no other way is left as it is, for llguidance to
refuse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from prerope.server.structured.document import APPLICATORS, LISTS, MAPS, ONE, REMARKS, VALUES, Document, Schema
from prerope.server.structured.drafts import as_drafted
from prerope.server.structured.finite import check_finite
from prerope.server.structured.formats import format_schema
from prerope.server.structured.numbers import check_numbers, narrow_bounds
from prerope.server.structured.sets import MAX_CHOICES, MAX_LISTED, MAX_PERMUTED, Disjoint, choices, enumerated
from prerope.server.structured.values import Unenforceable, distinct, holds_control

LETTERS = 'nrbtf\\"'
"""Of the escapes in strings; `u`, for control characters that have no letter, is not among them. llguidance lets any
character of a name that is not listed be written by its number, and so a listed name, too."""

WHITESPACE = ("whitespace_flexible", "whitespace_pattern")

_COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")
_TYPES = ("null", "boolean", "number", "string", "object", "array")
_LOOK_AROUND = re.compile(r"\(\?<?[=!]")


@dataclass(slots=True)
class Enforceable:
    """`schema` for llguidance. `dropped`: keywords that asked for something that is not enforced."""

    schema: Any
    dropped: list[str] = field(default_factory=list)


def enforceable(schema: Any) -> Enforceable:
    """Rewrites a schema. Unenforceable says why a reply could not be held to it; RecursionError where it nests deeper
    than Python can follow."""
    schema = {} if schema is True else as_drafted(schema)
    rewriter = _Rewriter(Document(schema))
    check_finite(schema, rewriter.document.referenced)
    new = rewriter.rewritten(schema)
    if not rewriter.document.ids <= rewriter.done:
        raise Unenforceable("a '$ref' names a listed value, which is no schema")
    if isinstance(new, dict):
        new.pop("$schema", None)  # all drafts are said in the words of the last one
        told = _whitespace(new.pop("x-guidance", None))
        if rewriter.document.names_are_open:
            told["json_allowed_escapes"] = LETTERS
        if told:
            new["x-guidance"] = told
    return Enforceable(new, sorted(rewriter.dropped))


def _whitespace(options: Any) -> dict[str, Any]:
    """Of a schema's options for llguidance those of `json_options`. Others would turn its enforcement off."""
    return {name: options[name] for name in WHITESPACE if name in options} if isinstance(options, dict) else {}


class _Rewriter:
    def __init__(self, document: Document) -> None:
        self.document = document
        self.dropped: set[str] = set()
        self.done: set[int] = set()
        self._choices_left = MAX_CHOICES
        self._disjoint = Disjoint(document.referenced)

    def rewritten(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return self._elsewhere(schema)
        self.done.add(id(schema))
        if schema.get("not") in ({}, True) and schema.keys() - REMARKS == {"not"}:
            self.done.add(id(schema["not"]))
            return False  # as zod writes it
        new = {key: self._within(key, value) for key, value in schema.items()}
        if not self.document.one_of_is_named and self._disjoint.branches(schema):
            _one_of(new)
        exact = self.document.is_exact(schema)
        self._check_listed(new)
        narrow_bounds(new, met=self.document.is_met)
        for rule in (_counts, _items, _remarks, _unevaluated, _format):
            rule(new)
        if not exact:
            _keys(new)
            _numbers_or_text(new)
        self._names(new, exact=exact)
        self._unique(new, exact=exact)
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
        """Unenforceable for a listed value that could not be written."""
        for key in schema.keys() & {"const", "enum"}:
            check_numbers(schema[key])
            if self.document.names_are_open and holds_control(schema[key]):
                raise Unenforceable(
                    f"'{key}' lists a control character: with names beside those of 'properties' none can be written; "
                    "set 'additionalProperties' to false"
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
        elif names and not given and (pattern := _name_pattern(names, exact=exact)) is not None:
            schema |= {"patternProperties": {pattern: rest}, "additionalProperties": False}
        elif names:
            return
        del schema["propertyNames"]

    def _unique(self, schema: Schema, *, exact: bool) -> None:
        """`uniqueItems` of items that can be listed: every choice of them as a tuple. Elsewhere it is dropped."""
        if "uniqueItems" not in schema:
            return
        if schema.pop("uniqueItems") is not True or schema.get("maxItems", 2) in (0, 1):
            return
        values = None if "prefixItems" in schema else self._enumerated(schema.get("items"))
        if values is None or len(values) > (MAX_PERMUTED if exact else MAX_LISTED):
            self.dropped.add("uniqueItems")
            return
        tuples = [*choices(values)]
        if len(tuples) > self._choices_left:
            self.dropped.add("uniqueItems")
            return
        self._choices_left -= len(tuples)
        # The bounds on the number of items stay where they are, and choose among the tuples.
        del schema["items"]
        others: list[Schema] = [] if schema.get("type") == "array" else [{"type": list(_TYPES[:-1])}]
        _also(schema, {"anyOf": [*tuples, *others]})

    def _enumerated(self, items: Any) -> list[Any] | None:
        """The values that a schema lists, itself or by references and choices, without repetition."""
        schema = self._target(items)
        if schema is None or set(schema) != {"anyOf"} or not isinstance(schema["anyOf"], list):
            return None if schema is None else enumerated(schema)
        listed = [None if (one := self._target(branch)) is None else enumerated(one) for branch in schema["anyOf"]]
        return None if None in listed else distinct([value for values in listed for value in values or ()])

    def _differing_names(self, schema: Schema) -> None:
        """More names than are listed may be one name twice: a grammar cannot tell."""
        least, required = schema.get("minProperties", 0), schema.get("required", [])
        if not isinstance(least, int) or not isinstance(required, list):
            return
        closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
        if not closed and least > len(distinct(required)) + 1:
            self.dropped.add("minProperties")

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
    """Of a decimal number, as pydantic writes it, the number: the pattern of its text looks around."""
    branches = schema.get("anyOf")
    if not isinstance(branches, list):
        return
    if any(isinstance(one, dict) and one.get("type") in ("number", "integer") for one in branches):
        schema["anyOf"] = [False if _looks_around(one) else one for one in branches]  # in place: references count


def _looks_around(schema: Any) -> bool:
    return (
        isinstance(schema, dict) and isinstance(text := schema.get("pattern"), str) and bool(_LOOK_AROUND.search(text))
    )


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


def _name_pattern(names: Schema, *, exact: bool) -> str | None:
    """A regex for names that a schema describes by one keyword."""
    says = set(names) - {"type"}
    if names.get("type", "string") != "string":
        return None
    if not says:
        return ""
    if says == {"pattern"}:
        return str(names["pattern"])
    if says <= {"minLength", "maxLength"}:
        least, most = names.get("minLength", 0), names.get("maxLength", "")
        return f"^(?s:.){{{least},{most}}}$" if all(type(one) in (int, str) for one in (least, most)) else None
    if says == {"allOf"} and not exact:  # a format, rewritten
        match names["allOf"]:
            case [{"pattern": str(pattern), **more}] if not more:
                return pattern
    return None
