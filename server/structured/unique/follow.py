"""Where a reply stands in its document, read byte by byte, and whether what is written was there before.

The bytes are valid: the grammar sees to that. A container that is open is a `Frame` that knows the one around it, so a
copy of a follower costs nothing, however deep it stands.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from prerope.server.structured.unique.places import Place
from prerope.server.structured.unique.seen import Seen

WHITESPACE = b" \t\r\n"
ENDS = b",]}" + WHITESPACE
_QUOTE, _ESCAPE, _COMMA, _COLON = b'"\\,:'
_ARRAY = b"["[0]

VALUE, NAME, COLON, END = "value", "name", "colon", "end"


class Part(NamedTuple):
    """A JSON document within a reply.

    Attributes:
        head: the bytes behind which it begins; none where it is the whole reply.
        next_head: those by which it follows another document; none where it never does.
        root: what differs in it.
    """

    head: bytes
    next_head: bytes
    root: Place | None


class Frame(NamedTuple):
    """A container that is being written. place: None where nothing within has to differ. seen: its items or names that
    have to. number: of its item. name: of its value."""

    around: Frame | None
    place: Place | None
    is_array: bool
    seen: Seen | None
    number: int = 0
    name: str = ""

    @property
    def within(self) -> Place | None:
        """The place of the value that comes next."""
        if self.place is None:
            return None
        return self.place.item(self.number) if self.is_array else self.place.value(self.name)


class Follower:
    """One reply. `read` takes in more of it.

    Attributes:
        in_string: within a string, or a name.
        text: of the string, number or word that is being written, where it matters; None else.
        wants: what comes next: a value, a name, a colon, or a comma or the container's end.
    """

    __slots__ = (
        "_escaped",
        "_frame",
        "_parts",
        "_place",
        "_reading",
        "_since",
        "_written",
        "in_string",
        "text",
        "wants",
    )

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._frame: Frame | None = None
        self._written: list[tuple[Seen, bytes]] | None = None
        self.text: bytes | None = None
        self.in_string = self._escaped = False
        self.wants = VALUE
        self._since = b""  # the last bytes since the reply, or a document's end
        self._reading = any(not part.head for part in parts)
        self._place = parts[0].root if self._reading else None

    def goes_on_by(self, text: bytes) -> bool:
        """Whether these bytes may come next. Nothing changes."""
        trial = Follower.__new__(Follower)
        for name in self.__slots__:
            setattr(trial, name, getattr(self, name))
        trial._written = []
        return trial.read(text)

    def read(self, text: bytes) -> bool:
        """Whether these bytes may come; if not, this is of no use any more."""
        return all(self._step(byte) if self._reading else self._outside(byte) for byte in text)

    @property
    def is_near(self) -> bool:
        """Whether something may have to differ in the document that is being written, around here or within."""
        if not self._reading:
            return any(part.root is not None for part in self._parts)
        return self._place is not None if self._frame is None else self._frame.place is not None

    @property
    def begun(self) -> Seen | None:
        """What the text that is being written must differ from."""
        return None if self.text is None else self._differing

    @property
    def expected(self) -> Seen | None:
        """What the text that comes next must differ from."""
        return self._differing if self.text is None and not self.in_string and self.wants in (VALUE, NAME) else None

    @property
    def _differing(self) -> Seen | None:
        frame = self._frame
        return frame.seen if frame is not None and (frame.is_array or self.wants == NAME) else None

    def _outside(self, byte: int) -> bool:
        self._since += bytes([byte])
        for part in self._parts:
            if self._since.endswith(part.head) or (part.next_head and self._since == part.next_head):
                self._reading, self._place, self._frame, self.wants = True, part.root, None, VALUE
                self.text, self.in_string = None, False
        self._since = self._since[-MAX_HEAD:]
        return True

    def _step(self, byte: int) -> bool:
        if self.in_string:
            return self._in_string(byte)
        if self.text is not None or self.wants == "word":
            if byte not in ENDS:
                self.text = None if self.text is None else self.text + bytes([byte])
                return self._is_alive()
            if not self._ended():
                return False
        if byte in b"[{":
            self._open(is_array=byte == _ARRAY)
        elif byte in b"]}":
            self._close()
        elif byte == _COMMA:
            self._next()
        elif byte == _COLON:
            self.wants = VALUE
        elif byte not in WHITESPACE:
            return self._begin(byte)
        return True

    def _begin(self, byte: int) -> bool:
        seen = self._differing
        if seen is not None and not seen.language.endless and any(one is seen for one, _ in self._written or ()):
            return False  # in one token with what was written last, and what that closes is not known yet
        is_name = self.wants == NAME and self._frame is not None and self._frame.place is not None
        self.text = bytes([byte]) if seen is not None or is_name else None
        self.in_string, self._escaped = byte == _QUOTE, False
        if not self.in_string and self.text is None:
            self.wants = "word"
        return self._is_alive()

    def _in_string(self, byte: int) -> bool:
        if self.text is not None:
            self.text += bytes([byte])
        if self._escaped or byte == _ESCAPE:
            self._escaped = not self._escaped
        elif byte == _QUOTE:
            self.in_string = False
            return self._ended()
        return self._is_alive()

    def _is_alive(self) -> bool:
        seen = self.begun
        return seen is None or not seen.is_dead(self.text or b"")

    def _ended(self) -> bool:
        """A string, number or word, or a name, is complete."""
        text, seen, frame = self.text, self.begun, self._frame
        is_name = self.wants == NAME
        self.text, self.wants = None, COLON if is_name else END
        if is_name and text is not None and frame is not None:
            self._frame = frame._replace(name=str(json.loads(text)))
        if frame is None:
            self._leave()
        if seen is None or text is None:
            return True
        if seen.is_over(text) or any(one is seen and other == text for one, other in self._written or ()):
            return False
        if self._written is None:
            seen.add(text)
        else:
            self._written.append((seen, text))
        return True

    def _open(self, *, is_array: bool) -> None:
        place = self._place if self._frame is None else self._frame.within
        language = None if place is None else place.items if is_array else place.names
        self._frame = Frame(self._frame, place, is_array, None if language is None else language.seen())
        self.wants = VALUE if is_array else NAME

    def _close(self) -> None:
        if self._frame is not None:
            self._frame, self.wants = self._frame.around, END
        if self._frame is None:
            self._leave()

    def _next(self) -> None:
        frame = self._frame
        if frame is not None:
            self._frame, self.wants = frame._replace(number=frame.number + 1), VALUE if frame.is_array else NAME

    def _leave(self) -> None:
        """The document is complete."""
        if any(part.head for part in self._parts):
            self._reading, self._since = False, b""


MAX_HEAD = 1024
"""Of a part: the names of functions are short."""
