"""Holds a reply to what a grammar cannot: that items, or names, differ from each other.

    a mask of the grammar ─ less the tokens that complete a value which is there already
                          ─ less those behind which nothing else could be completed

The second are found by trying: a token that leaves a value such that it may still become one of those before is taken
into a copy of the grammar, and its mask looked at. So where the grammar leaves a reply a way, some way is left. Most
tokens need no look: what differs from all values before it cannot repeat them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from prerope.server.structured.follow import WHITESPACE, Follower, Part

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_TRIES = 128
"""Masks that are computed for one, some 20 µs each. Tokens that were not tried are banned unless no other is left."""

MAX_LAST_TRIES = 8192
"""Where none is left so far: as many as there are bytes in all that was written there would be."""

STRUCTURE = b'"[]{},:.eE' + WHITESPACE
"""What ends or begins a value, or makes a number another one."""

Bits = NDArray[np.bool_]


class Vocabulary:
    """The bytes of a tokenizer's tokens, and which hold what matters here."""

    def __init__(self, tables: LLTokenizer) -> None:
        self.texts: list[bytes] = [tables.decode_bytes([token]) for token in range(tables.vocab_size)]
        self.ids: dict[bytes, list[int]] = {}
        for token, text in enumerate(self.texts):
            self.ids.setdefault(text, []).append(token)
        self.most = max(map(len, self.texts), default=0)
        self._in_order = sorted(range(len(self.texts)), key=self.texts.__getitem__)
        quotes = np.array([text.count(b'"') for text in self.texts])
        self.quotes, self.three_quotes = quotes > 0, quotes > 2
        self.begins_apart: Bits = np.array([text[:1].isspace() for text in self.texts])
        self.apart: Bits = np.array([text.isspace() for text in self.texts])
        self.structure: Bits = np.array([any(one in STRUCTURE for one in text) for text in self.texts])

    def beginnings(self, text: bytes) -> Iterator[int]:
        """Tokens with which a text may begin."""
        for length in range(1, min(len(text), self.most) + 1):
            yield from self.ids.get(text[:length], ())

    def that_begin(self, text: bytes) -> Iterator[int]:
        """Tokens that begin with a text."""
        begin = bisect_left(self._in_order, text, key=self.texts.__getitem__)
        for token in islice(self._in_order, begin, None):
            if not self.texts[token].startswith(text):
                return
            yield token


@lru_cache(maxsize=1)
def vocabulary(tables: LLTokenizer) -> Vocabulary:
    """Of the one tokenizer of a process."""
    return Vocabulary(tables)


class Differing:
    """One sequence's reply so far, and what may come next."""

    def __init__(self, parts: Sequence[Part], vocabulary: Vocabulary) -> None:
        self._follower = Follower(parts)
        self._vocabulary = vocabulary

    def accept(self, token_id: int) -> None:
        self._follower.read(self._vocabulary.texts[token_id])

    def allowed(self, inner: LLMatcher, mask: bytes) -> bytes:
        """Of the tokens that the grammar allows next (`LLMatcher.compute_bitmask`), those that may come."""
        if not self._follower.concerns:
            return mask
        size = len(self._vocabulary.texts)
        packed = np.frombuffer(mask, dtype=np.uint8).copy()
        bits = np.unpackbits(packed, bitorder="little").astype(np.bool_)
        search = _Search(self._vocabulary, inner)
        bits[:size] &= ~search.banned(self._follower, bits[:size])
        return np.packbits(bits, bitorder="little").tobytes()


class _TooMany(Exception):
    """No more tries."""


class _Search:
    """Of one mask: what is banned."""

    def __init__(self, vocabulary: Vocabulary, inner: LLMatcher) -> None:
        self._vocabulary, self._inner, self._left = vocabulary, inner, MAX_TRIES
        self._copy: LLMatcher | None = None
        self._known: dict[object, bool] = {}

    def banned(self, follower: Follower, allowed: Bits) -> Bits:
        """Tokens that must not come, of those that the grammar allows."""
        banned = np.zeros_like(allowed)
        untried = []
        for token, after in self._sorted(follower, allowed):
            if after is None:
                banned[token] = True
            elif after.may_repeat():
                banned[token] = True
                untried.append((token, after))
        if not self._free(untried, banned) and not (allowed & ~banned).any():
            self._left = MAX_LAST_TRIES
            self._free(untried, banned)
        return banned

    def _free(self, untried: list[tuple[int, Follower]], banned: Bits) -> bool:
        """Ban no more the tokens behind which something goes on, while there are tries; whether there was one."""
        freed = False
        try:
            for token, after in untried:
                if self._goes_on(token, after):
                    banned[token], freed = False, True
        except _TooMany:
            pass
        return freed

    def _sorted(self, follower: Follower, allowed: Bits) -> Iterator[tuple[int, Follower | None]]:
        """The tokens that are to be looked at, and where each leads; None where it repeats something."""
        found = np.flatnonzero(self._candidates(follower) & allowed).tolist()
        for token in sorted(found, key=self._vocabulary.begins_apart.__getitem__):
            after = follower.copy()
            yield token, after if after.read(self._vocabulary.texts[token]) else None

    def _candidates(self, follower: Follower) -> Bits:
        """All tokens that may repeat something, or may leave something from which there is no way, and others."""
        words = self._vocabulary
        if follower.in_fraction:
            return np.ones_like(words.quotes)
        found = (words.three_quotes if follower.in_string else words.structure).copy()
        if follower.is_between:  # whitespace leaves all ways open
            found &= ~words.apart
        for text, frame, is_plain in follower.begun():
            rests = [one[len(text) :] for one in frame.texts if one.startswith(text)]
            if follower.in_string and is_plain and frame.is_free:
                for rest in rests:
                    found[list(words.that_begin(rest))] = True
                continue
            if follower.in_string and (rests or not is_plain):
                found |= words.quotes
            for rest in rests:
                found[list(words.beginnings(rest))] = True
        return found

    def _goes_on(self, token: int, after: Follower) -> bool:
        """Whether a value that was not there before can be completed behind a token."""
        if (known := self._known.get(state := after.state)) is not None:
            return known
        if self._left <= 0:
            raise _TooMany
        self._left -= 1
        matcher = self._copy = self._copy or self._inner.deep_copy()
        if not matcher.consume_token(token):
            self._copy = None
            return False
        try:
            found = matcher.is_stopped() or self._has_way(after, matcher)
        finally:
            if matcher.is_error() or not matcher.rollback(1):
                self._copy = None
        self._known[state] = found
        return found

    def _has_way(self, follower: Follower, matcher: LLMatcher) -> bool:
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(mask, bitorder="little")[: len(self._vocabulary.texts)].astype(np.bool_)
        if not follower.in_string:  # whitespace opens no way that is not there without it
            allowed &= ~self._vocabulary.begins_apart
        if (allowed & ~self._candidates(follower)).any():
            return True
        untried = []
        for token, after in self._sorted(follower, allowed):
            if after is not None and not after.may_repeat():
                return True
            if after is not None:
                untried.append((token, after))
        return any(self._goes_on(token, after) for token, after in untried)
