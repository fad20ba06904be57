"""Names of an object's members: those that a pattern lists, and the pattern of those that a schema describes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

from prerope.server.structured.document import Schema
from prerope.server.structured.values import Unenforceable

_GROUPED = re.compile(r"\^\((?:\?:)?([^()]*)\)\$")
_ATOM = re.compile(r"\[(?P<class>[^]^\\[-]+)]|\\(?P<escaped>[^A-Za-z0-9])|(?P<plain>[^]\\^$.|?*+()[{}])")


def listed_patterns(schema: Schema, is_named: Callable[[str, str], bool]) -> None:
    """A pattern that lists nothing but names of `properties` says more of these: llguidance would wait for another.

    is_named: whether a reference may name what the schema has under a keyword and a name. Unenforceable where that is
    one of the properties or the pattern: a reference to it means it as it stands.
    """
    given, patterns = schema.get("properties"), schema.get("patternProperties")
    if not isinstance(given, dict) or not isinstance(patterns, dict):
        return
    known = {pattern: _listed(pattern, len(given)) for pattern in patterns}
    listed = {pattern: names for pattern, names in known.items() if names is not None and names <= given.keys()}
    more: dict[str, list[Any]] = {}
    for pattern, names in listed.items():
        for name in names:
            if is_named("properties", name) or is_named("patternProperties", pattern):
                raise Unenforceable(
                    "a pattern in 'patternProperties' lists only names of 'properties', and a '$ref' names one of the "
                    "two: put what the reference is for into '$defs'"
                )
            more.setdefault(name, []).append(patterns[pattern])
    if listed:
        schema["properties"] = given | {name: _both(given[name], rest) for name, rest in more.items()}
        schema["patternProperties"] = {one: value for one, value in patterns.items() if one not in listed}
        if not schema["patternProperties"]:
            del schema["patternProperties"]


def _both(given: Any, more: list[Any]) -> Schema:
    """What is within `given` stays where it is: references may name that."""
    if not isinstance(given, dict) or "$ref" in given or not isinstance(given.get("allOf", []), list):
        return {"allOf": [given, *more]}
    return {**given, "allOf": [*given.get("allOf", []), *more]}


def name_pattern(names: Schema, *, exact: bool) -> str | None:
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


def _listed(pattern: str, most: int) -> set[str] | None:
    """The names that a pattern lists, as ^(a|b)$, ^a$|^b$ and ^[ab]$ do; None for one that does not, or lists more."""
    grouped = _GROUPED.fullmatch(pattern)
    if grouped is None and not (pattern.startswith("^") and pattern.endswith("$")):
        return None
    alternatives = grouped[1].split("|") if grouped else pattern[1:-1].split("$|^")
    listed: set[str] = set()
    for one in alternatives:
        atoms = list(_ATOM.finditer(one))
        choices = [atom["class"] or atom["escaped"] or atom["plain"] for atom in atoms]
        if "".join(atom[0] for atom in atoms) != one or math.prod(map(len, choices)) > most:
            return None
        if len(listed) > most:
            return None
        listed |= {"".join(name) for name in itertools.product(*choices)}
    return listed
