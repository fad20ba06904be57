"""Where a chat template writes documents, so that each can be read on its own.

A template is a program: it numbers, trims and escapes what it is given as it likes. So a chat with documents is
rendered twice, as it is and with marks around every document, and where the two differ in the marks alone, the marks
say what of the prompt is a document. They hold a number that is drawn after the client's text has come, and were it in
there all the same, the two would differ in more.
"""

from __future__ import annotations

import re
import secrets
from typing import Any, NamedTuple

from prerope.server.api.chat.documents import Content


class Span(NamedTuple):
    """The characters `start` … `stop` − 1 of a rendered chat: one document."""

    start: int
    stop: int


class Marks:
    """Marks around documents, which nothing in a text can be taken for."""

    def __init__(self) -> None:
        self._number = secrets.token_hex(16)

    def around(self, text: str, index: int) -> str:
        return f"{self._number}{index:05d}b{text}{self._number}{index:05d}e" if text else text

    def in_content(self, content: Content, first: int) -> str:
        """A message's text with its documents marked as number `first`, `first` + 1, …"""
        pieces, position = [], 0
        for index, (start, stop) in enumerate(content.documents, first):
            pieces += [content[position:start], self.around(content[start:stop], index)]
            position = stop
        return "".join([*pieces, content[position:]])

    def in_fields(self, value: Any, index: int, *, strip: bool) -> Any:
        """A document's fields with every text of them marked."""
        if isinstance(value, str):
            return self.around(value.strip() if strip else value, index)
        if isinstance(value, dict):
            return {key: self.in_fields(one, index, strip=strip) for key, one in value.items()}
        if isinstance(value, list):
            return [self.in_fields(one, index, strip=strip) for one in value]
        return value

    def spans(self, marked: str, plain: str, count: int) -> list[Span] | None:
        """Where documents 0 … `count` − 1 are in `plain`; None where marks are not all that tells it from `marked`."""
        pieces = re.split(rf"{self._number}(\d{{5}})([be])", marked)
        if "".join(pieces[::3]) != plain:
            return None
        longest, position = dict[int, Span](), len(pieces[0])
        open_index, start, end = None, 0, 0  # the stretch of one document, from its first mark to its last
        for place in range(1, len(pieces), 3):
            index = int(pieces[place])
            if pieces[place + 1] == "b" and index != open_index:
                _keep(longest, open_index, Span(start, end))
                open_index, start = index, position
            end = position
            position += len(pieces[place + 2])
        _keep(longest, open_index, Span(start, end))
        if len(longest) < count:
            return None
        return sorted(longest.values())


def _keep(longest: dict[int, Span], index: int | None, span: Span) -> None:
    """A template may write a title here and the text there: the document is where most of it is."""
    known = Span(0, 0) if index is None else longest.get(index, Span(0, 0))
    if index is not None and span.stop - span.start > known.stop - known.start:
        longest[index] = span
