"""Finds tool calls in a reply as it comes.

One reader serves streams and whole replies, so both say the same. Text before a call goes out as it comes, but for a
tail that may begin a call's mark, and for whitespace that a call would swallow. A call's name goes out once it is
known, and its arguments as they are written. What looked like a call and is none (no JSON, a function that was not
offered) is text, mark included. What begins a call where the reply was cut, before the name was whole, is neither.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterable
from enum import Enum, auto
from typing import Any, Protocol

from prerope.server.api.chat.parts import Part, PartsWriter, TextPart, overlap
from prerope.server.api.chat.tools import ToolFormat, ToolUse
from prerope.server.api.chat.xml_calls import XmlCallReader

HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
"""A call up to its arguments, as models write it."""

BEGUN = re.compile(r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)$')
"""A call within its name."""

NAME = re.compile(r"\s*([A-Za-z0-9_.-]{1,128})(?:\[CALL_ID\][A-Za-z0-9]{0,64})?")
"""Before the mark of a format with `args`."""

FIRST_KEY = re.compile(r'\{\s*(?:"((?:[^"\\]|\\.)*)"\s*:|[^\s"])', re.DOTALL)
MAX_BEFORE_ARGS = 256
"""Characters of a name and a call id."""

KEYS = frozenset({"name", "arguments", "parameters", "type", "function", "id"})

_ALPHABET = string.ascii_letters + string.digits
_SEPARATORS = " \t\r\n,;[]"


class _State(Enum):
    BEGIN = auto()  # of a reply in a format without marks
    TEXT = auto()
    CALLS = auto()  # between calls, after a mark
    ARGUMENTS = auto()
    REST = auto()  # of a call, after its arguments


class ChatReader(Protocol):
    """Reads one reply of a chat: its text goes in as it comes, and parts come out."""

    @property
    def num_calls(self) -> int:
        """Calls so far."""

    def push(self, text: str) -> list[Part]:
        """The parts that this text makes certain."""

    def finish(self, *, cut: bool = False) -> list[Part]:
        """What was held back, once no more text comes. cut: the reply had not ended, so that a call that has begun is
        none of its text."""


class TextReader:
    """Replies of a chat without tools: text is text."""

    num_calls = 0

    def push(self, text: str) -> list[Part]:
        return [TextPart(text)] if text else []

    def finish(self, *, cut: bool = False) -> list[Part]:  # noqa: ARG002 - text is text
        return []


class ToolCallReader:
    """`num_calls` counts the calls so far."""

    def __init__(self, form: ToolFormat, names: Iterable[str], *, parallel: bool = True) -> None:
        self._out = PartsWriter(lambda: new_call_id(form), parallel=parallel)
        self._form = form
        self._names = frozenset(names)
        self._state = _State.TEXT if form.begin else _State.BEGIN
        self._buffer = ""
        self._mark = ""  # the section's mark and the whitespace before it, until the section has a call
        self._in_string = self._escaped = False
        self._depth = 0

    @property
    def num_calls(self) -> int:
        return self._out.num_calls

    def push(self, text: str) -> list[Part]:
        """The parts that this text makes certain."""
        self._buffer += text
        steps = {
            _State.BEGIN: self._begin,
            _State.TEXT: self._text,
            _State.CALLS: self._calls,
            _State.ARGUMENTS: self._scan,
            _State.REST: self._scan,
        }
        while self._buffer and steps[self._state]():
            pass
        return self._out.take()

    def finish(self, *, cut: bool = False) -> list[Part]:
        """What was held back. A call that was cut short stays as it is."""
        if self._state is _State.TEXT or self._mark or not self._out.num_calls:
            rest, self._buffer = self._text_held(cut=cut), ""
            self._out.text(rest.rstrip() if self._out.num_calls else rest)
        return self._out.take()

    def _text_held(self, *, cut: bool) -> str:
        if not cut:
            return self._mark + self._buffer
        if self._state is _State.TEXT:
            return self._out.before_cut(self._buffer, self._form.begin)
        named = BEGUN.match(self._buffer.lstrip(_SEPARATORS))
        may_be_call = named is None or any(name.startswith(named[1]) for name in self._names)
        return "" if may_be_call and self._state is not _State.BEGIN else self._mark + self._buffer

    # Each step returns whether to go on with what is left in the buffer.

    def _begin(self) -> bool:
        start = self._buffer.lstrip()
        if start:
            self._state = _State.CALLS if start[0] == "{" else _State.TEXT
        return bool(start)

    def _text(self) -> bool:
        mark, buffer = self._form.begin, self._buffer
        place = buffer.find(mark) if mark else -1
        if place >= 0:
            text, end = buffer[:place].rstrip(), place + len(mark)
            self._out.text(text)
            self._buffer, self._mark, self._state = buffer[end:], buffer[len(text) : end], _State.CALLS
            return True
        certain = buffer[: len(buffer) - overlap(buffer, mark)]
        if mark or self._out.num_calls:
            certain = certain.rstrip()
        self._out.text(certain)
        self._buffer = buffer[len(certain) :]
        return False

    def _calls(self) -> bool:
        form = self._form
        if form.args:
            return self._named_call()
        start = self._buffer.lstrip(_SEPARATORS)
        if form.end and start.startswith(form.end) and not self._mark:
            self._buffer, self._state = start[len(form.end) :], _State.TEXT
            return True
        if not start or (form.end and form.end.startswith(start)):
            return False
        if start[0] != "{":
            return self._no_call()
        if head := HEAD.match(start):
            if head[1] not in self._names:
                return self._no_call()
            self._start_call(head[1])
            self._buffer = start[head.end() :]
            self._state, self._depth = _State.ARGUMENTS, 1
            return True
        return self._whole_call(start)

    def _named_call(self) -> bool:
        """A name, a mark, and arguments up to their closing brace."""
        before, mark, after = self._buffer.partition(self._form.args)
        start = after.lstrip()
        if not mark and len(before) < MAX_BEFORE_ARGS and "{" not in before:
            return False
        name = NAME.fullmatch(before)
        if not mark or name is None or name[1] not in self._names or (start and start[0] != "{"):
            return self._no_call()
        if not start:
            return False
        self._start_call(name[1])
        self._buffer, self._state, self._depth = start, _State.ARGUMENTS, 1
        return True

    def _whole_call(self, start: str) -> bool:
        """A call whose parts come in another order is read once it is complete."""
        first = FIRST_KEY.match(start)
        if first and first[1] not in KEYS:
            return self._no_call()
        if "}" not in start:
            return False
        try:
            value, end = json.JSONDecoder().raw_decode(start)
        except (ValueError, RecursionError):
            return False
        named = value.get("function") if isinstance(value.get("function"), dict) else value
        name, arguments = named.get("name"), named.get("arguments", named.get("parameters"))
        if isinstance(arguments, str):
            arguments = _loads(arguments)
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return self._no_call()
        self._start_call(name)
        self._out.arguments(json.dumps(arguments, ensure_ascii=False))
        self._buffer = start[end:]
        return True

    def _scan(self) -> bool:
        """Through the arguments, to the end of the call: brackets are counted, those in strings left out."""
        arguments = self._state is _State.ARGUMENTS
        for place, character in enumerate(self._buffer):
            if self._in_string:
                self._escaped, escaped = character == "\\" and not self._escaped, self._escaped
                self._in_string = escaped or character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if arguments and self._depth == 1:
                    self._out.arguments(self._buffer[: place + 1])
                    self._buffer = self._buffer[place + 1 :]
                    self._state = _State.TEXT if self._form.args else _State.REST
                    return True
                if self._depth == 0:
                    self._buffer, self._state = self._buffer[place + 1 :], _State.CALLS
                    return True
        if arguments:
            self._out.arguments(self._buffer)
        self._buffer = ""
        return False

    def _no_call(self) -> bool:
        self._out.text(self._mark)
        self._mark, self._state = "", _State.TEXT
        return True

    def _start_call(self, name: str) -> None:
        self._mark = ""
        self._out.start_call(name)


def reader_of(use: ToolUse) -> ChatReader:
    """A new reader of a reply that may call these tools."""
    if use.form.tags:
        return XmlCallReader(use.types, lambda: new_call_id(use.form), parallel=use.parallel)
    return ToolCallReader(use.form, use.names, parallel=use.parallel)


def new_call_id(form: ToolFormat) -> str:
    size, prefix = (9, "") if form.short_ids else (24, "call_")
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(size))


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
