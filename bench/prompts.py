"""Prompts of an exact number of tokens, in real English, no two of which share a beginning.

The text is the language reference that the Python standard library carries for `help()`, so that it is on every
machine. Every prompt starts with a random label: no server's prefix cache can help it. This module knows no
server; a `Counter` tells it how many tokens a text has.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable

Counter = Callable[[str], int]

FILLER = " a"  # one token in every common vocabulary: closes the gap that a word of several tokens leaves
TOKENS_PER_WORD = 1.35  # a first guess, corrected by counting
MAX_COUNTS = 24


def reference_words() -> list[str]:
    """Words of the reference, in a fixed order; tables and code listings are left out, they are not prose."""
    from pydoc_data.topics import topics

    paragraphs = (p for name in sorted(topics) for p in topics[name].split("\n\n"))
    return [word for p in paragraphs if is_prose(p) for word in p.split()]


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as sentences: long enough, mostly letters and spaces, no table rule."""
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    drawn = "+--" in paragraph or "===" in paragraph
    return len(paragraph) >= 80 and letters >= 0.9 * len(paragraph) and not drawn


class PromptWriter:
    """Writes prompts of a wanted length. One random generator: the same seed starts at the same places in the text."""

    def __init__(self, count: Counter, seed: int = 0) -> None:
        self._count = count
        self._words = reference_words()
        self._random = random.Random(seed)

    def write(self, num_tokens: int, tolerance: int = 0) -> str:
        """A prompt of `num_tokens` tokens, up to `tolerance` off, that no other prompt begins like.

        A tolerance above 0 is for counters that cost a request each.
        """
        label = f"Note {uuid.uuid4().hex[:12]}."
        start = self._random.randrange(len(self._words))
        return fit(lambda num_words: f"{label} {self._take(start, num_words)}", self._count, num_tokens, tolerance)

    def _take(self, start: int, num_words: int) -> str:
        """`num_words` words from `start`, going round at the end of the text."""
        end = start + num_words
        taken = self._words[start:end]
        while len(taken) < num_words:
            taken += self._words[: num_words - len(taken)]
        return " ".join(taken)


def fit(text_of: Callable[[int], str], count: Counter, num_tokens: int, tolerance: int = 0) -> str:
    """The text of most words that has at most `num_tokens` tokens, filled up to exactly that many.

    `text_of(n)` is a text of n words, longer with n. Steps by proportion and keeps a bracket, so that a few counts
    are enough even for long texts.

    Raises:
        ValueError: not even the text of no words fits, or no number of counts allowed here gets within tolerance.
    """
    low, high = 0, None  # text_of(low) fits, text_of(high) does not
    low_tokens, guess = count(text_of(0)), max(1, int(num_tokens / TOKENS_PER_WORD))
    if low_tokens > num_tokens:
        raise ValueError(f"a prompt of {num_tokens} tokens is too short: its label alone takes {low_tokens}")
    for _ in range(MAX_COUNTS):
        if num_tokens - low_tokens <= tolerance or (high is not None and high - low <= 1):
            break
        tokens = count(text_of(guess))
        if tokens <= num_tokens:
            low, low_tokens = guess, tokens
        else:
            high = guess
        guess = _next_guess(low, high, guess, tokens, num_tokens)
    return _fill(text_of(low), count, num_tokens, low_tokens, tolerance)


def _next_guess(low: int, high: int | None, guess: int, tokens: int, num_tokens: int) -> int:
    """The number of words that the last count suggests by proportion, kept strictly between the bounds."""
    step = round((num_tokens - tokens) * guess / tokens)
    guess += step if step else (1 if tokens < num_tokens else -1)
    upper = guess if high is None else high - 1
    return max(low + 1, min(guess, upper))


def _fill(text: str, count: Counter, num_tokens: int, tokens: int, tolerance: int) -> str:
    """`text` with filler words up to `num_tokens`."""
    if tokens < num_tokens - tolerance:
        text += FILLER * (num_tokens - tokens)
        tokens = count(text)
    if abs(tokens - num_tokens) > tolerance:
        raise ValueError(f"no prompt of {num_tokens} tokens found (tolerance {tolerance}): the nearest has {tokens}")
    return text
