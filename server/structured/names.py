"""Names of an object's members: those that a pattern lists, and the pattern of those that a schema describes."""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from re import _parser as parser  # type: ignore[attr-defined]  # the one reader of patterns that Python has
from typing import Any

from prerope.server.structured.document import Schema
from prerope.server.structured.values import Unenforceable

_ESCAPE = r"\\(?:[dwtnrfv]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[^A-Za-z0-9])"
_READ_ALIKE = re.compile(
    rf"(?:[^\\[\](){{}}]|{_ESCAPE}|\((?:\?:|(?!\?))|\)|\{{[0-9]+(?:,[0-9]*)?\}}"
    rf"|\[(?:(?!&&|--|~~)[^\\[\]^]|{_ESCAPE})+\])*+"
)
"""Patterns that ECMA, Rust and Python read alike: nested classes, comments, names and flags are not among them."""

_CLASSES = {"CATEGORY_DIGIT": string.digits, "CATEGORY_WORD": string.ascii_letters + string.digits + "_"}
_ANCHORS = {"AT_BEGINNING": "^^", "AT_END": "$$"}
"""As they stand among characters: of two letters, so that they are none."""

MAX_WORK = 8
"""Characters that are put together to tell what an object's patterns list, for each one of theirs and of the names."""


def listed_patterns(schema: Schema, is_named: Callable[[str, str], bool]) -> None:
    """A pattern that lists nothing but names of `properties`, or required ones, says more of these: llguidance would
    wait for another.

    is_named: whether a reference may name what the schema has under a keyword and a name. Unenforceable where that is
    one of the properties or the pattern: a reference to it means it as it stands.
    """
    given, patterns = schema.get("properties", {}), schema.get("patternProperties")
    if not isinstance(given, dict) or not isinstance(patterns, dict):
        return
    required = schema.get("required")
    known = given.keys() | {name for name in required if isinstance(name, str)} if isinstance(required, list) else given
    listed = {pattern: names for pattern, names in listed_names(patterns, known).items() if names is not None}
    more: dict[str, list[Any]] = {}
    for pattern, names in listed.items():
        for name in names:
            if (name in given and is_named("properties", name)) or is_named("patternProperties", pattern):
                raise Unenforceable(
                    "a pattern in 'patternProperties' lists only names of 'properties', and a '$ref' names one of the "
                    "two: put what the reference is for into '$defs'"
                )
            more.setdefault(name, []).append(patterns[pattern])
    if listed:
        schema["properties"] = given | {name: _both(given.get(name, {}), rest) for name, rest in more.items()}
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


def listed_names(patterns: Iterable[str], given: Iterable[str]) -> dict[str, set[str] | None]:
    """The names that match each pattern, as a and aa do `^a{1,2}$`. None where they may be others than the given."""
    names, patterns = frozenset(given), list(patterns)
    work = MAX_WORK * sum(len(text) + 1 for text in (*patterns, *names))
    known = _Known(names, max(map(len, names), default=0) + len(_ANCHORS), work)
    return {pattern: _listed(pattern, known) for pattern in patterns}


def _listed(pattern: str, known: _Known) -> set[str] | None:
    known.work -= len(pattern)
    if known.work < 0 or _READ_ALIKE.fullmatch(pattern) is None:
        return None
    try:
        return known.whole(known.sequence(parser.parse(pattern)))
    except (_Other, re.error, RecursionError, OverflowError):
        return None


class _Other(Exception):
    """A pattern matches a name that is not known, or it is too much work to tell."""


_Text = tuple[str, ...]
"""Characters and anchors."""


@dataclass(slots=True)
class _Known:
    """Reads parts of a parsed pattern as the sets of texts that they match, no more and no longer than `names`."""

    names: frozenset[str]
    longest: int
    """Of the names, with both anchors."""
    work: int
    """What is left of MAX_WORK's, for all that is still to be read."""

    def whole(self, texts: set[_Text]) -> set[str]:
        """The names among texts that are anchored at both ends, and nowhere else."""
        first, last = _ANCHORS.values()
        found = {"".join(text[1:-1]) for text in texts if text[:1] == (first,) and text[-1:] == (last,)}
        if len(found) < len(texts) or any(first in text[1:] or last in text[:-1] for text in texts):
            raise _Other
        if not found <= self.names:
            raise _Other
        return found

    def sequence(self, tree: Iterable[tuple[Any, Any]]) -> set[_Text]:
        texts: set[_Text] = {()}
        for is_literal, parts in itertools.groupby(tree, key=lambda part: str(part[0]) == "LITERAL"):
            if is_literal:  # at once, since texts are built anew for each part
                texts = self._joined(texts, {tuple(chr(code) for _, code in parts)})
                continue
            for kind, value in parts:
                texts = self._joined(texts, self._part(str(kind), value))
        return texts

    def _part(self, kind: str, value: Any) -> set[_Text]:
        match kind, value:
            case "IN", choices:
                return self._bounded((char,) for choice in choices for char in self._chars(*choice))
            case "BRANCH", (_, branches):
                return self._bounded(text for branch in branches for text in self.sequence(branch))
            case "SUBPATTERN", (_, 0, 0, inner):
                return self.sequence(inner)
            case "MAX_REPEAT" | "MIN_REPEAT", (least, most, inner):
                return self._repeated(self.sequence(inner), int(least), int(most))
            case "AT", anchor if str(anchor) in _ANCHORS:
                return {(_ANCHORS[str(anchor)],)}
        raise _Other

    def _chars(self, kind: Any, value: Any) -> Iterable[str]:
        match str(kind), value:
            case "LITERAL", code:
                return chr(code)
            case "RANGE", (first, last) if last - first <= len(self.names):
                return map(chr, range(first, last + 1))
            case "CATEGORY", name if str(name) in _CLASSES:
                return _CLASSES[str(name)]
        raise _Other

    def _repeated(self, once: set[_Text], least: int, most: int) -> set[_Text]:
        texts: set[_Text] = {()}
        found = set(texts) if least == 0 else set()
        for count in range(1, most + 1):
            longer = self._joined(texts, once)
            is_last = longer == texts  # and so are all that follow
            texts = longer
            if is_last or count >= least:
                found = self._bounded(found | texts)
            if is_last:
                break
        return found

    def _joined(self, firsts: set[_Text], seconds: set[_Text]) -> set[_Text]:
        return self._bounded(first + second for first in firsts for second in seconds)

    def _bounded(self, texts: Iterable[_Text]) -> set[_Text]:
        found: set[_Text] = set()
        for text in texts:
            found.add(text)
            self.work -= len(text) + 1
            if len(found) > len(self.names) or len(text) > self.longest or self.work < 0:
                raise _Other
        return found
