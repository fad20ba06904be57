"""What was written in one array or object whose items or names must differ, and which beginnings have no other end."""

from __future__ import annotations

import re
import threading
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_DIGITS = 15
"""Of a number that may be any: so many are the same number again once it has been a float."""

_DECIMAL = re.compile(rb"0|-?[1-9]\d*+|-?(?:0|[1-9]\d*+)\.\d*[1-9]")
_BEGUN_DECIMAL = re.compile(rb"-?(?:(?:0|[1-9]\d*+)(?:\.\d*+)?)?")
_DIGITS = b"-0123456789"
_IN_DECIMALS = b"-.0123456789"


class Language:
    """The texts that one item may be, or one name.

    Attributes:
        endless: each is a string that can always go on.
        decimals: numbers among them are decimal fractions, and have no zeros at their ends.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        tokenizer: LLTokenizer,
        bytes_: Mapping[int, int],
        *,
        endless: bool = False,
        decimals: bool = False,
    ) -> None:
        """matcher: of the grammar of one item, at its beginning. bytes_: the token of each byte that has one."""
        self._matcher, self._tokenizer, self._bytes = matcher, tokenizer, bytes_
        self._lock = threading.Lock()  # llguidance's objects may be used by one thread at a time
        self.endless, self.decimals = endless, decimals
        self._first = Seen(self)
        if not (endless or decimals):
            self._first.close(b"-0")

    def seen(self) -> Seen:
        """Nothing yet. No number is -0, which is 0."""
        return self._first.copy()

    def next(self, begin: bytes) -> tuple[list[int], bool]:
        """The bytes that may follow a beginning of a text, and whether it is one itself."""
        if self.decimals and begin and begin[0] in _DIGITS:
            following = [one for one in _IN_DECIMALS if is_begun_decimal(begin + bytes([one]))]
            return following, _DECIMAL.fullmatch(begin) is not None
        tokens = self._tokens(begin)
        with self._lock:
            matcher = self._matcher.deep_copy()
        if matcher.try_consume_tokens(tokens) < len(tokens):
            return [], False
        if forced := matcher.compute_ff_bytes():
            return [forced[0]], matcher.is_accepting()
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        following = [one for one, token in self._bytes.items() if mask[token >> 3] >> (token & 7) & 1]
        return following, matcher.is_accepting()

    def _tokens(self, text: bytes) -> list[int]:
        if all(one in self._bytes for one in text):
            return [self._bytes[one] for one in text]
        return self._tokenizer.tokenize_bytes(text)


class Seen:
    """The texts of one array or object. `closed` are beginnings of which every text was written, in order."""

    __slots__ = ("_texts", "closed", "language")

    def __init__(self, language: Language) -> None:
        self.language = language
        self._texts = set[bytes]()
        self.closed: list[bytes] = []

    def copy(self) -> Seen:
        new = Seen(self.language)
        new._texts, new.closed = self._texts.copy(), self.closed.copy()
        return new

    def __contains__(self, text: bytes) -> bool:
        return text in self._texts

    def add(self, text: bytes) -> None:
        self._texts.add(text)
        if self.language.endless:
            insort(self.closed, text)
        else:
            self.close(text)

    def close(self, begin: bytes) -> None:
        """Note that a text was written, or never is (-0), and what that leaves without another end."""
        following, _ = self.language.next(begin)
        while all(self.is_closed(begin + bytes([one])) for one in following):
            within = bisect_left(self.closed, begin)
            del self.closed[within : within + len(following)]
            self.closed.insert(within, begin)
            if not begin:
                return
            begin = begin[:-1]
            following, is_text = self.language.next(begin)
            if is_text and begin not in self._texts:
                return

    def is_closed(self, begin: bytes) -> bool:
        """Whether no text that begins so is left. What lies behind a closed beginning is not looked at."""
        at = bisect_left(self.closed, begin)
        return at < len(self.closed) and self.closed[at] == begin

    def is_dead(self, begin: bytes) -> bool:
        """Whether a beginning must not be written: it is closed, or none of this language."""
        if self.language.decimals and begin[0] in _DIGITS and not is_begun_decimal(begin):
            return True
        return self.is_closed(begin)

    def is_over(self, text: bytes) -> bool:
        """Whether a text must not end so."""
        if self.language.decimals and text[0] in _DIGITS and _DECIMAL.fullmatch(text) is None:
            return True
        return text in self._texts

    def closed_behind(self, begin: bytes) -> Iterator[bytes]:
        """The closed beginnings that begin so."""
        for at in range(bisect_left(self.closed, begin), len(self.closed)):
            if not self.closed[at].startswith(begin):
                return
            yield self.closed[at]


def is_begun_decimal(begin: bytes) -> bool:
    """Whether some number begins so that is written without zeros at its end, in so many digits."""
    if _BEGUN_DECIMAL.fullmatch(begin) is None:
        return False
    num_digits = len(begin) - (b"-" in begin) - (b"." in begin)
    return num_digits < MAX_DIGITS or (num_digits == MAX_DIGITS and _DECIMAL.fullmatch(begin) is not None)
