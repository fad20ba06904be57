"""Which items can be held to differ from each other: those whose values have one text each, and are known to be so many
at least. Strings with a `pattern`, numbers between bounds, lists and objects are not among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prerope.server.structured.document import Schema
from prerope.server.structured.formats import format_schema
from prerope.server.structured.numbers import count_integers, is_number
from prerope.server.structured.values import Unenforceable, distinct, kind, looks_around, of_type

MARK = "x-differ"
"""The keyword of a rewritten schema by which `places` finds what must differ; llguidance does not read it."""

MANY = 2**18
"""More values than a reply has items."""

LARGEST = 10**15 - 1
"""Of whole numbers without a bound: a float has each of them exactly."""

_BOUNDS = frozenset({"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum"})
_KNOWN = frozenset({"type", "format", "maxLength", "minLength", "multipleOf", "pattern"}) | _BOUNDS

Target = Callable[[Any], Schema | None]
"""A schema without remarks, behind its references; None where it is none that can be read."""


@dataclass(frozen=True, slots=True)
class Items:
    """What may be an item.

    Attributes:
        schema: of one.
        count: at least so many differ.
        endless: it is a string that can always go on, whatever it is so far.
        decimals: it may be any number.
    """

    schema: Schema
    count: int
    endless: bool
    decimals: bool

    @property
    def mark(self) -> dict[str, Any]:
        return {"schema": self.schema, "endless": self.endless, "decimals": self.decimals}


NAMES: dict[str, Any] = {"schema": {"type": "string"}, "endless": True, "decimals": False}
"""The mark of names that no keyword limits."""


@dataclass(frozen=True, slots=True)
class _Part:
    schema: Schema
    counts: dict[str, int]
    endless: bool = False


def items_of(schema: Any, target: Target, *, exact: bool) -> Items:
    """Unenforceable where they cannot be held to differ, with what they are. Whole numbers without a bound get one, so
    that none goes on for ever where a model repeats itself; exact: none does."""
    parts = [*_parts(schema, target, 8, set[int](), exact=exact)]
    counts = dict[str, int]()
    for part in parts:
        counts |= {one: max(most, counts.get(one, 0)) for one, most in part.counts.items()}
    types = {one.schema.get("type") for one in parts}
    if types & {"integer"} and "fraction" in counts and "number" not in types:
        raise Unenforceable("whole numbers beside listed ones that are written with a point")
    schemas = [part.schema for part in parts]
    whole = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return Items(whole, sum(counts.values()), all(part.endless for part in parts), "number" in types)


def _parts(schema: Any, target: Target, depth: int, seen: set[int], *, exact: bool) -> Iterator[_Part]:
    """seen: the branches that were looked at, by id. References may lead to each of them by many ways."""
    bare = target(schema)
    if not bare or not depth:
        raise Unenforceable("of any kind")
    if set(bare) == {"anyOf"} and isinstance(bare["anyOf"], list):
        for branch in bare["anyOf"]:
            if branch is False or id(branch) in seen or looks_around(branch):  # the text of a decimal number
                continue
            seen.add(id(branch))
            yield from _parts(branch, target, depth - 1, seen, exact=exact)
        return
    if (listed := _listed(bare)) is not None:
        yield listed
        return
    if unknown := sorted(bare.keys() - _KNOWN):
        raise Unenforceable(f"with '{unknown[0]}'")
    types = bare.get("type", "any")
    for one in types if isinstance(types, list) else [types]:
        yield _of_type(one, bare, exact=exact)


def _listed(bare: Schema) -> _Part | None:
    keys = bare.keys() - {"type"}
    if keys not in ({"enum"}, {"const"}):
        return None
    given = bare["enum"] if "enum" in keys else [bare["const"]]
    values = distinct([one for one in given if of_type(one, bare.get("type"))]) if isinstance(given, list) else []
    counts = dict[str, int]()
    for one in map(kind, values):
        counts[one] = counts.get(one, 0) + 1
    if counts.keys() & {"array", "object"} or not values:
        raise Unenforceable("that are listed as lists or objects")
    return _Part({"enum": values}, counts)


def _of_type(name: Any, bare: Schema, *, exact: bool) -> _Part:
    match name:
        case "null":
            return _Part({"type": "null"}, {"null": 1})
        case "boolean":
            return _Part({"type": "boolean"}, {"boolean": 2})
        case "string":
            return _strings(bare)
        case "integer":
            return _integers(bare, exact=exact)
        case "number":
            if limits := sorted(bare.keys() & (_BOUNDS | {"multipleOf"})):
                raise Unenforceable(f"that are numbers with '{limits[0]}'")
            return _Part({"type": "number"}, {"integer": MANY, "fraction": MANY})
        case _:
            raise Unenforceable("that are lists or objects" if name in ("array", "object") else "of any kind")


def _integers(bare: Schema, *, exact: bool) -> _Part:
    if "multipleOf" in bare:
        raise Unenforceable("that are numbers with 'multipleOf'")
    schema = {"type": "integer", **{key: bare[key] for key in sorted(bare.keys() & _BOUNDS)}}
    for key, bound in (("minimum", -LARGEST), ("maximum", LARGEST)):
        if not exact and bare.keys().isdisjoint({key, f"exclusive{key.title()}"}):
            schema[key] = bound
    count = count_integers(schema, MANY)
    if not count:
        raise Unenforceable("that are whole numbers of which none lies between their bounds, or has at most 15 digits")
    return _Part(schema, {"integer": count})


def _strings(bare: Schema) -> _Part:
    least, most = (bare.get(key, default) for key, default in (("minLength", 0), ("maxLength", None)))
    form = bare.get("format")
    if "pattern" in bare:
        raise Unenforceable("that are strings with a 'pattern'")
    if format_schema(form):
        if most is not None or least:
            raise Unenforceable("that are strings with a 'format' and a length")
        return _Part({"type": "string", "format": form}, {"string": MANY})
    schema: Schema = {"type": "string", **({"minLength": least} if least else {})}
    if most is None:
        return _Part(schema, {"string": MANY}, endless=True)
    if not (is_number(most) and is_number(least) and least <= most < math.inf):
        raise Unenforceable("that are strings with lengths that no string has")
    return _Part(schema | {"maxLength": most}, {"string": min(64 ** min(int(most), 4), MANY)})
