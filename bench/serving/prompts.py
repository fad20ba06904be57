"""Prompts of an exact number of tokens, in real English, no two of which share a beginning.

Every prompt starts with a random label: no server's prefix cache can help it. Tokens are counted between measurements,
never during one.
"""

from __future__ import annotations

import bisect
import random
import uuid

from bench import BenchError
from bench.shared.counting import Counter
from bench.shared.text import reference_words

FILLER = " a"  # one token in every common vocabulary: closes the gap that a word of several tokens leaves


class PromptWriter:
    """Writes prompts of a wanted length. The same seed starts at the same places in the text."""

    def __init__(self, count: Counter, seed: int = 0) -> None:
        self._count, self._words, self._random = count, reference_words(), random.Random(seed)

    def write(self, num_tokens: int) -> str:
        """A prompt of exactly `num_tokens` tokens that no other prompt begins like."""
        label = f"Note {uuid.uuid4().hex[:12]}."
        start = self._random.randrange(len(self._words))
        around = self._words[start:] + self._words * (1 + num_tokens // len(self._words))

        def text(num_words: int) -> str:
            return " ".join([label, *around[:num_words]])

        words = bisect.bisect_right(range(num_tokens + 1), num_tokens, key=lambda n: self._count(text(n))) - 1
        if words < 0:
            raise BenchError(f"a prompt of {num_tokens} tokens is too short: its label alone takes more")
        prompt = text(words)
        prompt += FILLER * (num_tokens - self._count(prompt))
        if (found := self._count(prompt)) != num_tokens:
            raise BenchError(f"no prompt of {num_tokens} tokens found: the nearest has {found}")
        return prompt
