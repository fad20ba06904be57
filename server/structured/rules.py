"""Refuses Lark grammars with a rule that never ends, as `list: item list` is without another choice.

Rules alone are read, and of them what says which rules a rule needs: alternatives, groups, and what may be left out.
Terminals end always: llguidance has no recursion in them. A grammar with anything that is not known here is left to
llguidance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from prerope.server.structured.document import pointed
from prerope.server.structured.finite import check_finite
from prerope.server.structured.productive import Needs
from prerope.server.structured.values import Unenforceable

SHOWN = 64

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]++|//[^\n]*+|\#[^\n]*+)|(?P<line>\n)|(?P<name>[?!]?[A-Za-z_][A-Za-z0-9_-]*+)
    |(?P<text>"(?:[^"\\\n]|\\.)*+"i?|/(?:[^/\\\n]|\\.)++/[imslux]*+|<[^>\s]*+>|%regex\s*+\{[^{}]*+\})
    |(?P<json>%json\s*+(?=\{))|(?P<directive>%[a-z]++[^\n]*+)|(?P<attributes>\[[^\[\]]*+\](?=[ \t]*+:))
    |(?P<count>\{\s*+\d*+\s*+,?+\s*+\d*+\s*+\}|~\s*+\d++(?:\s*+\.\.\s*+\d++)?)|(?P<alias>->\s*+\w++)
    |(?P<mark>[|()\[\]?*+:])""",
    re.VERBOSE,
)
"""Nothing in it goes back, and no token that fails had looked past the place where another one begins: the text is read
in time that grows as its length does."""


class _Token(NamedTuple):
    kind: str
    text: str


class _Unknown(Exception):
    """Something that is not read here."""


def check_rules(grammar: str) -> None:
    """Unenforceable for a rule in use that no finite text matches, and for such a schema within the grammar."""
    try:
        rules = {name: _Rule(tokens) for name, tokens in _rules([*_tokens(grammar)])}
        reader = _Reader(rules)
        reader.number("start")
    except (_Unknown, RecursionError):
        return
    endless = reader.needs.endless()
    for name, number in reader.numbers.items():
        if number in endless:
            raise Unenforceable(f"no finite text matches the rule '{name[:SHOWN]}': each of its choices needs itself")


def _tokens(grammar: str) -> Iterator[_Token]:
    place = 0
    while place < len(grammar):
        found = _TOKEN.match(grammar, place)
        if found is None:
            raise _Unknown
        kind, place = str(found.lastgroup), found.end()
        if kind == "json":
            try:
                schema, place = json.JSONDecoder().raw_decode(grammar, place)
            except ValueError:
                raise _Unknown from None
            _check_schema(schema)
            kind = "text"
        if kind != "space":
            yield _Token(kind, found[0])


def _check_schema(schema: Any) -> None:
    check_finite(schema, lambda reference: pointed(schema, reference))


@dataclass(slots=True)
class _Rule:
    tokens: list[_Token]
    place: int = 0

    def next(self) -> _Token | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def takes(self, text: str) -> bool:
        token = self.next()
        found = token is not None and token.kind == "mark" and token.text == text
        self.place += found
        return found


def _rules(tokens: list[_Token]) -> Iterator[tuple[str, list[_Token]]]:
    """Each rule and terminal with what follows its colon. A line that begins with a name and a colon begins one."""
    name, held, place, begins = "", list[_Token](), 0, True
    while place < len(tokens):
        token, after = tokens[place], place + 1
        if begins and token.kind == "name":
            after += after < len(tokens) and tokens[after].kind == "attributes"
            if after < len(tokens) and tokens[after] == _Token("mark", ":"):
                if name:
                    yield name, held
                name, held, place, begins = token.text.lstrip("?!"), [], after + 1, False
                continue
        begins = token.kind in ("line", "directive")
        if not begins:
            held.append(token)
        place += 1
    if name:
        yield name, held


class _Reader:
    """The rules in use as `Needs`."""

    def __init__(self, rules: dict[str, _Rule]) -> None:
        self.needs = Needs()
        self.numbers: dict[str, int] = {}
        self._rules = rules
        self._left: list[str] = []

    def number(self, name: str) -> int:
        """The number of a rule; the rules that it needs are written, too."""
        number = self._known(name)
        while self._left:
            rule = self._rules[one := self._left.pop()]
            self.needs.settle(self.numbers[one], 1, [self._choices(rule)])
            if rule.next() is not None:
                raise _Unknown
        return number

    def _known(self, name: str) -> int:
        if name not in self._rules or name.lstrip("_")[:1].isupper():
            return self.needs.always
        if name not in self.numbers:
            self.numbers[name] = self.needs.add()
            self._left.append(name)
        return self.numbers[name]

    def _choices(self, rule: _Rule) -> int:
        choices = [self._sequence(rule)]
        while rule.takes("|"):
            choices.append(self._sequence(rule))
        return self.needs.any_of(choices)

    def _sequence(self, rule: _Rule) -> int:
        needed = []
        while (token := rule.next()) is not None and token.text not in ("|", ")", "]"):
            if token.kind == "alias":
                rule.place += 1
            else:
                needed.append(self._item(rule))
        return self.needs.all_of(needed)

    def _item(self, rule: _Rule) -> int:
        known, left = len(self.numbers), len(self._left)
        if rule.takes("("):
            number = self._choices(rule)
            if not rule.takes(")"):
                raise _Unknown
        elif rule.takes("["):
            self._choices(rule)
            number = self.needs.always
            if not rule.takes("]"):
                raise _Unknown
        else:
            number = self._symbol(rule)
        missing, never = _times(rule)
        if never:  # then what it names is not in use by it
            del self._left[left:]
            for name in [*self.numbers][known:]:
                del self.numbers[name]
        return self.needs.always if missing else number

    def _symbol(self, rule: _Rule) -> int:
        token = rule.next()
        if token is None or token.kind not in ("name", "text"):
            raise _Unknown
        rule.place += 1
        return self._known(token.text) if token.kind == "name" else self.needs.always


def _times(rule: _Rule) -> tuple[bool, bool]:
    """Past what says how often something comes: whether that may be never, and whether it is."""
    missing = never = False
    while (token := rule.next()) is not None and (token.kind == "count" or token.text in ("?", "*", "+")):
        rule.place += 1
        missing |= token.text in ("?", "*")
        if token.kind == "count":
            bounds = [one.strip("{}~").strip() for one in re.split(r",|\.\.", token.text)]
            missing |= not bounds[0].strip("0")
            never |= bounds[-1] != "" and not bounds[-1].strip("0")
    return missing, never
