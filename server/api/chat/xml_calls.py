"""Finds calls that are written as tags, as Qwen3-Coder and Qwen3.5 write them:

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Rome
    </parameter>
    </function>
    </tool_call>

Values stand as they are, without quotes, so the function's schema says whether `7` is a number or a text. The name goes
out once it is known, and each argument once it is complete. A function that was not offered is text, tags included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from prerope.server.api.chat.parts import Part, PartsWriter, overlap

MARKS = ("<tool_call>", "<function=")
"""What a call begins with; models leave the first out at times."""

HEAD = re.compile(r"(?:<tool_call>\s*)?<function=([A-Za-z0-9_.-]{1,128})>")
MAX_BEFORE_NAME = 256
TAG = re.compile(r"<parameter=([^>\n]{1,256})>|</function>|</tool_call>")
END_OF_VALUE = "</parameter>"
AFTER = re.compile(r"\s*</tool_call>")


class XmlCallReader:
    """Reads one reply. `num_calls` counts the calls so far."""

    def __init__(self, types: Mapping[str, Types], new_id: Callable[[], str], *, parallel: bool = True) -> None:
        """types: of the arguments of each function that was offered."""
        self._types = types
        self._out = PartsWriter(new_id, parallel=parallel)
        self._step = self._text
        self._buffer = ""
        self._name = ""
        self._num_arguments = 0

    @property
    def num_calls(self) -> int:
        return self._out.num_calls

    def push(self, text: str) -> list[Part]:
        """The parts that this text makes certain."""
        self._buffer += text
        while self._buffer and self._step():
            pass
        return self._out.take()

    def finish(self, *, cut: bool = False) -> list[Part]:
        """What was held back. A call that was cut short stays as it is."""
        if self._step == self._text:
            rest = self._out.before_cut(_before_mark(self._buffer), *MARKS) if cut else self._buffer
            self._out.text(rest.rstrip() if self._out.num_calls else rest)
        self._buffer = ""
        return self._out.take()

    # Each step returns whether to go on with what is left in the buffer.

    def _text(self) -> bool:
        buffer = self._buffer
        place = min((found for mark in MARKS if (found := buffer.find(mark)) >= 0), default=-1)
        if place < 0:
            held = max(overlap(buffer, mark) for mark in MARKS)
            self._keep(buffer[: len(buffer) - held].rstrip())
            return False
        head = HEAD.match(buffer, place)
        if head is None and _may_go_on(buffer[place:]):
            self._keep(buffer[:place].rstrip())
            return False
        if head is None or head[1] not in self._types:
            end = place + next(len(mark) for mark in MARKS if buffer.startswith(mark, place))
            self._keep(buffer[:end])
            return True
        self._out.text(buffer[:place].rstrip())
        self._buffer = buffer[head.end() :]
        self._start(head[1])
        return True

    def _arguments(self) -> bool:
        """Read one argument, or the end of the call. Text between tags, line breaks as a rule, is dropped."""
        tag = TAG.search(self._buffer)
        if tag is None:
            return False
        if tag[1] is None:
            self._out.arguments("{}" if self._num_arguments == 0 else "}")
            self._buffer, self._step = self._buffer[tag.end() :], self._after
            if tag[0] == "</tool_call>":
                self._step = self._text
            return True
        value, end, rest = self._buffer[tag.end() :].partition(END_OF_VALUE)
        if not end:
            return False
        value = value.removeprefix("\n").removesuffix("\n")
        typed = _value(value, self._types[self._name].get(tag[1], frozenset()))
        written = f"{json.dumps(tag[1], ensure_ascii=False)}: {json.dumps(typed, ensure_ascii=False)}"
        self._out.arguments((", " if self._num_arguments else "{") + written)
        self._num_arguments += 1
        self._buffer = rest
        return True

    def _after(self) -> bool:
        """Skip the mark that ends a call."""
        start = self._buffer.lstrip()
        if end := AFTER.match(self._buffer):
            self._buffer = self._buffer[end.end() :]
        elif "</tool_call>".startswith(start):
            return False
        self._step = self._text
        return True

    def _start(self, name: str) -> None:
        self._name, self._num_arguments, self._step = name, 0, self._arguments
        self._out.start_call(name)

    def _keep(self, certain: str) -> None:
        """Send what begins the buffer as text."""
        self._out.text(certain)
        self._buffer = self._buffer[len(certain) :]


def _before_mark(buffer: str) -> str:
    """The text before the mark that begins a call; all of it where there is no mark."""
    place = min((found for mark in MARKS if (found := buffer.find(mark)) >= 0), default=len(buffer))
    return buffer[:place].rstrip() if place < len(buffer) else buffer


def _may_go_on(start: str) -> bool:
    """Whether more text could make a head of this, which begins with a mark."""
    rest = start.removeprefix(MARKS[0]).lstrip()
    if rest.startswith(MARKS[1]):
        return ">" not in rest and "\n" not in rest and len(rest) < MAX_BEFORE_NAME
    return MARKS[1].startswith(rest) and len(start) < MAX_BEFORE_NAME


Types = Mapping[str, frozenset[str]]
"""A function's arguments and the JSON types that each may have: an empty set where the schema does not say."""


def types_of(schema: Mapping[str, Any]) -> Types:
    """What a function's parameters say of its arguments."""
    properties = schema.get("properties")
    return {name: _types(one, schema) for name, one in properties.items()} if isinstance(properties, dict) else {}


def _types(schema: Any, root: Mapping[str, Any], depth: int = 4) -> frozenset[str]:
    """Through unions and references within the document, a few deep: they may go in a circle."""
    if not isinstance(schema, dict) or not depth:
        return frozenset()
    if isinstance(reference := schema.get("$ref"), str):
        return _types(_referred(reference, root), root, depth - 1)
    named = schema.get("type")
    if isinstance(named, str | list):
        return frozenset([named] if isinstance(named, str) else (one for one in named if isinstance(one, str)))
    if isinstance(choices := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
        return frozenset("string" if isinstance(one, str) else "null" if one is None else "other" for one in choices)
    unions = [one for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list) for one in schema[key]]
    return frozenset[str]().union(*(_types(one, root, depth - 1) for one in unions))


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    target: Any = root if reference.startswith("#/") else None
    for step in reference[2:].split("/"):
        target = target.get(step) if isinstance(target, dict) else None
    return target


def _value(text: str, types: frozenset[str]) -> Any:
    """What a text stands for. Where the schema admits a text it is one, but for a null that it admits as well."""
    if "string" in types and not ("null" in types and text.strip() == "null"):
        return text
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # nor may it be half a surrogate pair
        return value
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)
