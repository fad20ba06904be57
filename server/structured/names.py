"""Names of an object's members: those that a pattern lists, and the pattern of those that a schema describes."""

from __future__ import annotations

import itertools
import math
import re

from prerope.server.structured.document import Schema

_GROUPED = re.compile(r"\^\((?:\?:)?([^()]*)\)\$")
_ATOM = re.compile(r"\[(?P<class>[^]^\\[-]+)]|\\(?P<escaped>[^A-Za-z0-9])|(?P<plain>[^]\\^$.|?*+()[{}])")
MAX_LISTED = 256


def listed_patterns(schema: Schema) -> None:
    """A pattern that lists nothing but names of `properties` says more of these: llguidance would wait for another."""
    given, patterns = schema.get("properties"), schema.get("patternProperties")
    if not isinstance(given, dict) or not isinstance(patterns, dict):
        return
    for pattern in list(patterns):
        names = _listed(pattern)
        if names is not None and names <= given.keys():
            rest = patterns[pattern]
            patterns = {other: one for other, one in patterns.items() if other != pattern}
            given = given | {name: {"allOf": [given[name], rest]} for name in names}
    schema |= {"properties": given, "patternProperties": patterns}
    if not patterns:
        del schema["patternProperties"]


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


def _listed(pattern: str) -> set[str] | None:
    """The names that a pattern lists, as ^(a|b)$, ^a$|^b$ and ^[ab]$ do; None for one that does not, or lists many."""
    grouped = _GROUPED.fullmatch(pattern)
    if grouped is None and not (pattern.startswith("^") and pattern.endswith("$")):
        return None
    alternatives = grouped[1].split("|") if grouped else pattern[1:-1].split("$|^")
    listed: set[str] = set()
    for one in alternatives:
        atoms = list(_ATOM.finditer(one))
        choices = [atom["class"] or atom["escaped"] or atom["plain"] for atom in atoms]
        if "".join(atom[0] for atom in atoms) != one or math.prod(map(len, choices)) > MAX_LISTED:
            return None
        listed |= {"".join(name) for name in itertools.product(*choices)}
    return listed
