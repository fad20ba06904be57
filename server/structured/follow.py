"""Follows JSON as it is written, byte by byte, and tells where a value comes that was there before.

The bytes are valid: a grammar sees to that. What is read here is where containers, names and values begin and end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from prerope.server.structured.places import Place
from prerope.server.structured.values import identity

WHITESPACE = b" \t\r\n"
_APART = re.compile(rb'("(?:[^"\\]|\\.)*"?)|[ \t\r\n]+', re.DOTALL)
_QUOTE, _ESCAPE = b'"\\'
_OPEN, _CLOSE, _ENDS = frozenset(b"[{"), frozenset(b"]}"), frozenset(WHITESPACE + b",]}")
_NONE = -1


class Part(NamedTuple):
    """A JSON document within a reply. head: the bytes behind which it begins, none where it is the whole reply."""

    head: bytes
    root: Place


class Frame(NamedTuple):
    """A container that is being written.

    Attributes:
        start: where it begins.
        seen: what stands in it that must not come again, by identity. texts: the same as it was written.
        item: its number. name: of the value.
    """

    place: Place | None
    is_array: bool
    start: int
    seen: frozenset[object] = frozenset()
    texts: tuple[bytes, ...] = ()
    item: int = 0
    name: str = ""

    @property
    def is_free(self) -> bool:
        """Whether a text that has begun in it can always become another one."""
        return self.place is not None and (self.place.has_free_items if self.is_array else self.place.has_free_names)

    @property
    def differs(self) -> bool:
        place = self.place
        return place is not None and (place.items_differ if self.is_array else place.names_differ)


class Begun(NamedTuple):
    """A value, or name, that is not complete, and must not be one of those before it."""

    text: bytes
    frame: Frame
    is_plain: bool


class Follower:
    """Where a reply stands. `read` takes in more of it."""

    __slots__ = (
        "_begin",
        "_data",
        "_escaped",
        "_frames",
        "_longest",
        "_parts",
        "_place",
        "_reading",
        "_wants",
        "in_string",
    )

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._longest = max((len(part.head) for part in parts), default=0)
        self._data = b""
        self._frames: list[Frame] = []
        self._begin = _NONE  # where the string, number or word begins that is being written
        self.in_string = self._escaped = False
        self._wants = "value"  # or "name", or "end": a comma or the container's end
        self._place: Place | None = None
        self._reading = any(not part.head for part in parts)
        if self._reading:
            self._place = parts[0].root

    def copy(self) -> Follower:
        new = Follower.__new__(Follower)
        for name in self.__slots__:
            setattr(new, name, getattr(self, name))
        new._frames = self._frames.copy()
        return new

    def read(self, text: bytes) -> bool:
        """Whether what these bytes complete was not there before. If it was, this is of no use any more."""
        if not self._reading:
            self._data = self._data[-self._longest :] if self._longest else b""
        at = len(self._data)
        self._data += text
        for byte in text:
            at += 1
            if not self._reading:
                self._open(at)
            elif not self._step(byte, at):
                return False
        return True

    @property
    def state(self) -> object:
        """The same where the same may come next, and repeat what was there."""
        texts = tuple(one.text for one in self.begun())
        items = tuple((frame.item, frame.name, len(frame.texts)) for frame in self._frames)
        return texts, items, self._wants, self.in_string, self._data[self._begin :] if self._begin != _NONE else None

    @property
    def is_between(self) -> bool:
        """Whether no name, text, number or word has begun."""
        return self._begin == _NONE

    @property
    def is_near(self) -> bool:
        """Whether values may have to differ where this stands, or within."""
        return self._reading and (self._place if not self._frames else self._frames[-1].place) is not None

    @property
    def concerns(self) -> bool:
        """Whether anything that is being written may have to differ from something."""
        return self._reading and (any(one.differs for one in self._frames) or self.is_near)

    @property
    def in_fraction(self) -> bool:
        """Whether a number is being written that is not whole, and so may be another in other digits."""
        return not self.in_string and self._begin != _NONE and any(one in b".eE" for one in self._data[self._begin :])

    def begun(self) -> Iterator[Begun]:
        """What is not complete yet in containers that have something to differ from, the outermost first."""
        for depth, frame in enumerate(self._frames):
            if not frame.differs or not frame.texts:
                continue
            inner = self._frames[depth + 1] if depth + 1 < len(self._frames) else None
            if not frame.is_array and (inner is not None or self._wants != "name"):
                continue  # a value behind a name
            if inner is not None:
                yield Begun(_bare(self._data[inner.start :]), frame, is_plain=False)
            elif self._begin != _NONE:
                yield Begun(_bare(self._data[self._begin :]), frame, is_plain=True)
            elif self._wants != "end":
                yield Begun(b"", frame, is_plain=False)

    def may_repeat(self) -> bool:
        """Whether what is being written may yet have no end but as something that is there already."""
        for text, frame, is_plain in self.begun():
            if is_plain and self.in_string and frame.is_free:
                continue
            if any(one.startswith(text) for one in frame.texts) or _equals(text, frame.seen):
                return True
        return False

    def _open(self, at: int) -> None:
        """Begin to read where a part begins at this place."""
        fitting = [part for part in self._parts if part.head and self._data.endswith(part.head, 0, at)]
        if fitting:
            self._place = max(fitting, key=lambda part: len(part.head)).root
            self._reading, self._wants, self._begin = True, "value", _NONE

    def _step(self, byte: int, end: int) -> bool:
        if self.in_string:
            if self._escaped or byte == _ESCAPE:
                self._escaped = not self._escaped
                return True
            if byte != _QUOTE:
                return True
            self.in_string = False
            return self._named(end) if self._wants == "name" else self._ended(self._begin, end)
        if self._begin != _NONE and byte in _ENDS and not self._ended(self._begin, end - 1):
            return False
        if byte in _OPEN:
            self._frames.append(Frame(self._inner(), byte == b"["[0], end - 1))
            self._wants = "value" if byte == b"["[0] else "name"
        elif byte in _CLOSE and self._reading:
            if not self._frames:
                self._reading = False
                return True
            return self._ended(self._frames.pop().start, end)
        elif byte == b","[0]:
            self._next()
        elif byte == b":"[0]:
            self._wants = "value"
        elif self._begin == _NONE and byte not in WHITESPACE:
            self._begin, self.in_string = end - 1, byte == _QUOTE
        return True

    def _inner(self) -> Place | None:
        """The place of the value that begins."""
        if not self._frames:
            return self._place
        place, is_array, *_, item, name = self._frames[-1]
        return None if place is None else place.item(item) if is_array else place.value(name)

    def _next(self) -> None:
        if self._frames:
            frame = self._frames[-1]
            self._frames[-1] = frame._replace(item=frame.item + 1)
            self._wants = "value" if frame.is_array else "name"

    def _named(self, end: int) -> bool:
        text, self._begin = self._data[self._begin : end], _NONE
        self._wants = "colon"
        if not self._frames or (frame := self._frames[-1]).place is None:
            return True
        self._frames[-1] = frame._replace(name=str(_value(text)))
        return not frame.differs or self._noted(text)

    def _ended(self, begin: int, end: int) -> bool:
        """A value is complete."""
        self._begin, self._wants = _NONE, "end"
        if not self._frames:
            self._reading = False
            return True
        frame = self._frames[-1]
        return not (frame.is_array and frame.differs) or self._noted(self._data[begin:end])

    def _noted(self, text: bytes) -> bool:
        frame = self._frames[-1]
        known = identity(_value(text))
        if known in frame.seen:
            return False
        self._frames[-1] = frame._replace(seen=frame.seen | {known}, texts=(*frame.texts, _bare(text)))
        return True


def _value(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:  # a number of more digits than Python reads
        return text.decode(errors="replace")


def _bare(text: bytes) -> bytes:
    """Without whitespace between what is written."""
    return _APART.sub(lambda found: found[1] or b"", text)


def _equals(text: bytes, seen: frozenset[object]) -> bool:
    """Whether a number, so far, is one of those that were there: more digits may make no difference."""
    if b"." not in text and b"e" not in text.lower():
        return False
    try:
        return identity(json.loads(text.rstrip(b".eE+-"))) in seen
    except ValueError:
        return False
