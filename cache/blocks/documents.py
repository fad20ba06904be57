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

from collections.abc import Sequence
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


def span_at(spans: Sequence[DocumentSpan], position: int) -> DocumentSpan | None:
    """The document whose copied tokens include this position."""
    return next((span for span in spans if span.copied <= position < span.stop), None)


def next_copied(spans: Sequence[DocumentSpan], position: int, num_tokens: int) -> int:
    """The first copied token from `position` on; `num_tokens` where there is none."""
    return min((span.copied for span in spans if position <= span.copied < span.stop), default=num_tokens)


def largest_reading(spans: Sequence[DocumentSpan], position: int) -> int:
    """Tokens of the longest prompt, prefix and one document, that is to be read from `position` on; 0: none is."""
    lengths = (span.stop - span.start for span in spans if span.copied < span.stop and span.stop > position)
    longest = max(lengths, default=0)
    return longest and spans[0].start + longest


def filled_from(spans: Sequence[DocumentSpan], position: int) -> int:
    """Where the copied tokens begin that end right before `position`; `position` where none do."""
    for span in reversed(spans):
        if span.stop == position and span.copied < span.stop:
            position = span.copied
    return position


def layout(spans: Sequence[DocumentSpan], first: int, stop: int) -> bytes:
    """What tokens do not say of the K and V at positions `first` … `stop` − 1: which are copied, and from where.

    Empty where all of them attend to everything before them.
    """
    inside = [span for span in spans if span.copied < min(span.stop, stop) and span.stop > first]
    if not inside:
        return b""
    return repr((spans[0].start, [(span.start, span.copied, min(span.stop, stop)) for span in inside])).encode()
