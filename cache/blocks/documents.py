"""Documents inside a prompt that are read on their own, so that their keys and values serve any prompt that holds them.

    │ prefix │ document 0 │ document 1 │ … │ rest │

A document is read as if it were all that follows the prefix, the tokens before the first document: its rows attend to
the prefix and to the document itself, as in a prompt of just these two. What its K and V are depends on the prefix,
its own tokens and the position method, never on its neighbours, its place or what was cached. Keys are raw, so they
are then *copied* to wherever the document stands, with nothing to rotate. The first `reread` tokens of a document are
read a second time at their place, attending to everything before them, like all rows that belong to no document. Rows
of the document itself saw the first reading of those tokens, rows behind it see the second.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple


class DocumentSpan(NamedTuple):
    """The tokens `start` … `stop` − 1 of a prompt. Spans of a prompt are in order and disjoint."""

    start: int
    stop: int
    reread: int = 0

    @property
    def copied(self) -> int:
        """The first token whose K and V are copied; `stop` where the whole document is read at its place."""
        return min(self.start + self.reread, self.stop)

    def within(self, num_tokens: int) -> int:
        """How many of its tokens are among the first `num_tokens` of the prompt."""
        return min(max(num_tokens - self.start, 0), self.stop - self.start)


STOP, COPIED = attrgetter("stop"), attrgetter("copied")
"""Both grow from span to span, so where a position stands among them is found by halves: a request may have a thousand
documents, and these functions are asked in every step, `layout` for every block."""


def span_at(spans: Sequence[DocumentSpan], position: int) -> DocumentSpan | None:
    """The document whose copied tokens include this position."""
    place = bisect_right(spans, position, key=STOP)
    return spans[place] if place < len(spans) and spans[place].copied <= position else None


def next_copied(spans: Sequence[DocumentSpan], position: int, num_tokens: int) -> int:
    """The first copied token from `position` on; `num_tokens` where there is none."""
    places = range(bisect_left(spans, position, key=COPIED), len(spans))
    return next((spans[place].copied for place in places if spans[place].copied < spans[place].stop), num_tokens)


def longest_readings(spans: Sequence[DocumentSpan]) -> list[int]:
    """Of each document, and of their end, tokens of the longest prompt, prefix and one document, that is to be read
    from it on; 0: none is."""
    longest = [0]
    for span in reversed(spans):
        reading = spans[0].start + span.stop - span.start if span.copied < span.stop else 0
        longest.append(max(longest[-1], reading))
    return longest[::-1]


def filled_from(spans: Sequence[DocumentSpan], position: int) -> int:
    """Where the copied tokens begin that end right before `position`; `position` where none do."""
    place = bisect_left(spans, position, key=STOP)
    while 0 <= place < len(spans) and spans[place].stop == position and spans[place].copied < position:
        position, place = spans[place].copied, place - 1
    return position


def layout(spans: Sequence[DocumentSpan], first: int, stop: int) -> bytes:
    """What tokens do not say of the K and V at positions `first` … `stop` − 1: which are copied, and from where.

    Empty where all of them attend to everything before them.
    """
    some = spans[bisect_right(spans, first, key=STOP) : bisect_left(spans, stop, key=COPIED)]
    inside = [span for span in some if span.copied < span.stop]
    if not inside:
        return b""
    return repr((spans[0].start, [(span.start, span.copied, min(span.stop, stop)) for span in inside])).encode()
