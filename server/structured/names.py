"""Names of an object's members: those that a pattern lists, and the pattern of those that a schema describes."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from re import _parser as parser  # type: ignore[attr-defined]  # the one reader of patterns that Python has
from typing import Any

from prerope.server.structured.document import Schema
from prerope.server.structured.values import Unenforceable

_SET_NOTATION = re.compile(r"&&|--|~~|\[[^]]*\[")
"""What Rust reads as sets of characters, and Python as characters."""

_CLASSES = {"CATEGORY_DIGIT": string.digits, "CATEGORY_WORD": string.ascii_letters + string.digits + "_"}
_ANCHORS = {"AT_BEGINNING": "^", "AT_END": "$"}

MAX_PATTERN = 4_096
"""Characters of a pattern that is looked into."""

MAX_WORK = 16
"""Characters that are put together to tell what a pattern lists, for each one of its own and of the names."""


def listed_patterns(schema: Schema, is_named: Callable[[str, str], bool]) -> None:
    """A pattern that lists nothing but names of `properties` says more of these: llguidance would wait for another.

    is_named: whether a reference may name what the schema has under a keyword and a name. Unenforceable where that is
    one of the properties or the pattern: a reference to it means it as it stands.
    """
    given, patterns = schema.get("properties"), schema.get("patternProperties")
    if not isinstance(given, dict) or not isinstance(patterns, dict):
        return
    known = {pattern: listed_names(pattern, given) for pattern in patterns}
    listed = {pattern: names for pattern, names in known.items() if names is not None}
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


def listed_names(pattern: str, given: Iterable[str]) -> set[str] | None:
    """The names that match a pattern, as a and aa do `^a{1,2}$`. None where they may be others than the given."""
    names = frozenset(given)
    if len(pattern) > MAX_PATTERN or _SET_NOTATION.search(pattern):
        return None
    work = MAX_WORK * (len(pattern) + sum(len(name) + 1 for name in names))
    known = _Known(names, max(map(len, names), default=0) + len(_ANCHORS), work)
    try:
        tree = parser.parse(pattern)
        return None if tree.state.flags != re.UNICODE.value else known.whole(known.sequence(tree))
    except (_Other, re.error, RecursionError, OverflowError):
        return None


class _Other(Exception):
    """A pattern matches a name that is not known, or it is too much work to tell."""


_Text = tuple[str, ...]
"""Characters, and the anchors, each written twice."""


@dataclass(slots=True)
class _Known:
    """Reads parts of a parsed pattern as the sets of texts that they match, no more and no longer than `names`."""

    names: frozenset[str]
    longest: int
    """Of the names, with both anchors."""
    work: int
    """What is left of it."""

    def whole(self, texts: set[_Text]) -> set[str]:
        """The names among texts that are anchored at both ends."""
        found = {"".join(text[1:-1]) for text in texts if text[:1] == ("^^",) and text[-1:] == ("$$",)}
        if len(found) < len(texts) or not found <= self.names:
            raise _Other
        return found

    def sequence(self, tree: Iterable[tuple[Any, Any]]) -> set[_Text]:
        texts: set[_Text] = {()}
        for kind, value in tree:
            texts = self._joined(texts, self._part(str(kind), value))
        return texts

    def _part(self, kind: str, value: Any) -> set[_Text]:
        match kind, value:
            case "LITERAL", code:
                return {(chr(code),)}
            case "IN", choices:
                return {(char,) for choice in choices for char in self._chars(*choice)}
            case "BRANCH", (_, branches):
                return set().union(*map(self.sequence, branches))
            case "SUBPATTERN", (_, 0, 0, inner):
                return self.sequence(inner)
            case "MAX_REPEAT" | "MIN_REPEAT", (least, most, inner):
                return self._repeated(self.sequence(inner), int(least), int(most))
            case "AT", anchor if str(anchor) in _ANCHORS:
                return {(_ANCHORS[str(anchor)] * 2,)}
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
