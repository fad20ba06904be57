"""Takes out of a grammar's mask what would write a value again, or begin one that has no other end.

Few tokens can do either: those that begin with a text that is closed, found in the vocabulary's order, and those that
hold the end of a value together with the beginning of another, or of a number, which are tried one by one.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from prerope.server.structured.unique.follow import ENDS, WHITESPACE, Follower, Part
from prerope.server.structured.unique.seen import Seen, is_begun_decimal

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_GOES_ON = re.compile(rb"[,\[{]\s*[^\s,\]}]", re.DOTALL)
"""A separator and the beginning of what it separates."""
_ENDS_AND_GOES_ON = re.compile(rb'".*[,\[{]\s*[^\s,\]}]', re.DOTALL)
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_END_OF_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+"', re.DOTALL)
_NUMBER = re.compile(rb"[-+.\deE]+")
_ENDED_NUMBER = re.compile(rb"[-+.\deE]+[\s,\]}]")

SPECIAL = b"\xff"
"""Before the name of a special token: no text has this byte."""

Ids = NDArray[np.int64]


class _InOrder:
    """Some tokens in the order of their bytes: those of much whitespace, which are long, apart from the others."""

    def __init__(self, texts: Sequence[bytes], tokens: list[int]) -> None:
        self._tokens, self._texts = tokens, [texts[token] for token in tokens]
        self._most = max(map(len, self._texts), default=0)

    def beginning_with(self, begin: bytes) -> Sequence[int]:
        """The last byte is not 255."""
        if len(begin) > self._most:
            return ()
        low = bisect_left(self._texts, begin)
        if low == len(self._texts) or not self._texts[low].startswith(begin):
            return ()
        return self._tokens[low : bisect_left(self._texts, begin[:-1] + bytes([begin[-1] + 1]), low)]


class Texts:
    """The bytes of a tokenizer's tokens, and the token of each byte that is one."""

    def __init__(self, tables: LLTokenizer) -> None:
        self.texts: list[bytes] = [
            SPECIAL * tables.is_special_token(token) + tables.decode_bytes([token])
            for token in range(tables.vocab_size)
        ]
        self.bytes = {text[0]: token for token, text in enumerate(self.texts) if len(text) == 1}

    @property
    def is_whole(self) -> bool:
        """Whether each byte that a value may need is a token."""
        return all(byte in self.bytes for byte in [*range(32, 127), *range(128, 192)])

    def spelled(self, pieces: Sequence[str | int]) -> bytes:
        """The bytes of texts and special tokens."""
        return b"".join(one.encode() if isinstance(one, str) else self.texts[one] for one in pieces)


class Vocabulary:
    """Which tokens matter where. It takes several times as long to make as their texts."""

    def __init__(self, known: Texts) -> None:
        self.texts, self.bytes = known.texts, known.bytes
        in_order = sorted((i for i, text in enumerate(self.texts) if text), key=self.texts.__getitem__)
        self._words = _InOrder(self.texts, [token for token in in_order if not self.texts[token].isspace()])
        self._spaces = _InOrder(self.texts, [token for token in in_order if self.texts[token].isspace()])
        self._quotes = _InOrder(self.texts, [token for token in in_order if b'"' in self.texts[token]])
        self._whole_strings = self._beginning(_STRING)
        self._ends_of_strings = self._beginning(_END_OF_STRING)
        self.plain = self._bits(self._matching(lambda text: text and not text.startswith(SPECIAL)))
        self.go_on = self._matching(_GOES_ON.search)
        self.end_and_go_on = self._matching(_ENDS_AND_GOES_ON.search)
        self.numbers = self._matching(_NUMBER.fullmatch)
        self.ended_numbers = self._matching(_ENDED_NUMBER.match)
        self.ends = self._bits(self._matching(lambda text: text[:1] in ENDS if text else None))
        self.apart = self._matching(lambda text: text[:1] in WHITESPACE and not text.isspace() if text else None)

    def beginning_with(self, begin: bytes) -> Sequence[int]:
        """The tokens that begin so, themselves included."""
        if begin.endswith(b'"'):
            return self._quotes.beginning_with(begin)  # few
        found = self._words.beginning_with(begin)
        return [*found, *self._spaces.beginning_with(begin)] if begin.isspace() else found

    def ending(self, begun: bytes) -> list[tuple[int, bytes]]:
        """The tokens that end a string which is begun, or not yet, with their bytes as far as its end."""
        return self._ends_of_strings if begun else self._whole_strings

    def _beginning(self, pattern: re.Pattern[bytes]) -> list[tuple[int, bytes]]:
        found = ((token, pattern.match(text)) for token, text in enumerate(self.texts))
        return [(token, match[0]) for token, match in found if match is not None]

    def _bits(self, tokens: Ids) -> NDArray[np.uint8]:
        """A mask of these token ids in the layout of llguidance's masks."""
        bits = np.zeros(len(self.texts), dtype=np.bool_)
        bits[tokens] = True
        return np.packbits(bits, bitorder="little")

    def _matching(self, matches: object) -> Ids:
        assert callable(matches)
        return np.array([token for token, text in enumerate(self.texts) if matches(text)], dtype=np.int64)


@lru_cache(maxsize=1)
def token_texts(tables: LLTokenizer) -> Texts:
    """Of the one tokenizer of a process."""
    return Texts(tables)


@lru_cache(maxsize=1)
def vocabulary(tables: LLTokenizer) -> Vocabulary:
    """Of the one tokenizer of a process."""
    return Vocabulary(token_texts(tables))


class Differing:
    """One sequence's reply so far, and what may come next."""

    def __init__(self, parts: Sequence[Part], vocabulary: Vocabulary) -> None:
        self._follower, self._vocabulary = Follower(parts), vocabulary
        self._accepted: list[int] = []

    def accept(self, token_id: int) -> None:
        self._accepted.append(token_id)

    def allowed(self, inner: LLMatcher, mask: bytes) -> bytes:
        """The tokens that may come, among those that the grammar allows next (`LLMatcher.compute_bitmask`).

        Where the grammar leaves one way alone, its mask has only the one token that llguidance would write it with.
        Where that ends a value and begins the next, it is written byte by byte.
        """
        for token_id in self._accepted:
            if not self._follower.read(self._vocabulary.texts[token_id]):
                raise RuntimeError("a token was drawn that writes a value again")
        self._accepted.clear()
        if not self._follower.is_near:
            return mask
        packed = self._without(mask)
        if self._has_text(np.frombuffer(mask, np.uint8)) and not self._has_text(packed):
            forced = inner.compute_ff_bytes()
            token = self._vocabulary.bytes[forced[0]]
            packed[token >> 3] |= 1 << (token & 7)
        return packed.tobytes()

    def _has_text(self, packed: NDArray[np.uint8]) -> bool:
        plain = self._vocabulary.plain
        return bool((packed[: len(plain)] & plain).any())

    def _without(self, mask: bytes) -> NDArray[np.uint8]:
        packed, words, at = np.frombuffer(mask, np.uint8).copy(), self._vocabulary, self._follower
        text, seen = at.text or b"", at.begun or at.expected
        tried = [words.end_and_go_on] if at.in_string else [words.go_on]
        if not at.in_string and seen is not None:
            tried.append(words.ended_numbers)
            if at.begun is None:
                tried.append(words.apart)
        banned = [] if seen is None else self._leading_to(seen, text)
        if at.begun is not None and not at.in_string and at.begun.is_over(text):
            packed[: len(words.ends)] &= ~words.ends
        if seen is not None and seen.language.decimals and not at.in_string and not text[:1].isalpha():
            more = _of(packed, words.numbers)
            banned += [token for token in more if not is_begun_decimal(text + words.texts[token])]
        for some in tried:
            banned += [token for token in _of(packed, some) if not at.goes_on_by(words.texts[token])]
        for token in banned:
            packed[token >> 3] &= 0xFF ^ (1 << (token & 7))
        return packed

    def _leading_to(self, seen: Seen, begin: bytes) -> list[int]:
        """The tokens by which a closed text is begun.

        Strings that can always go on are closed as a whole alone, so few tokens matter, however many were written.
        """
        escapes = len(begin) - len(begin.rstrip(b"\\"))
        if seen.language.endless and escapes % 2 == 0:
            return [token for token, end in self._vocabulary.ending(begin) if begin + end in seen]
        rests = (closed[len(begin) :] for closed in seen.closed_behind(begin))
        return [token for rest in rests for token in self._vocabulary.beginning_with(rest)]


def _of(packed: NDArray[np.uint8], tokens: Ids) -> list[int]:
    """Those that a mask allows."""
    allowed: list[int] = tokens[(packed[tokens >> 3] >> (tokens & 7)) & 1 == 1].tolist()
    return allowed
