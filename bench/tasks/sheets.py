"""Sheets: a long text with questions about it, of at most a wanted number of tokens, and how a reply is scored.

A family of tasks is a function from a `Room` to sheets. Everything is drawn from the room's seed, so that the same
seed, length and tokenizer give the same prompts. Nothing here knows a server.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Count = Callable[[str], int]
"""How many tokens a text has, those included that the server puts before any text."""

REPLY_ENDS = ("\n\n", "Question:")
"""What follows one of these is no part of a reply."""


class NoRoom(ValueError):
    """A family's sheet does not fit the wanted length, or needs depths that it was not given."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked behind a sheet.

    Attributes:
        text: ends where the reply begins.
        answers: all of them are wanted.
        depth: where in the sheet the fact is that it asks for: 0 the beginning, 1 the end; None: all over it.
    """

    text: str
    answers: tuple[str, ...]
    depth: float | None = None

    def score(self, reply: str) -> float:
        """The share of the answers that the reply has as whole words. A single one must be its first word, or where it
        is a number its first number: `is the 12345` has found it."""
        for end in REPLY_ENDS:
            reply = reply.split(end)[0]
        if len(self.answers) == 1:
            skipped = r"\D*(?<!\w)" if self.answers[0].isdecimal() else r"\W*"
            return float(re.match(rf"{skipped}{re.escape(self.answers[0])}(?!\w)", reply) is not None)
        found = [re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply) is not None for answer in self.answers]
        return sum(found) / len(found)

    @property
    def worked(self) -> str:
        """The question with its reply, as an example shows it."""
        return f"{self.text} {', '.join(self.answers)}.\n\n"


@dataclass(frozen=True, slots=True)
class Sheet:
    """A text, and the questions that are asked of it, each alone: what they have in common is read once."""

    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Room:
    """What a family's function is given.

    Attributes:
        num_tokens: of a sheet with a question and its reply, at most.
        depths: where facts are to lie; a family with one fact a sheet makes a sheet for each.
    """

    count: Count
    num_tokens: int
    depths: Sequence[float]
    seed: int
    before: str = ""

    def draw(self, *purpose: object) -> random.Random:
        """Numbers for one purpose: drawing more of them for one changes no other."""
        return random.Random(repr((self.seed, *purpose)))

    def fill(self, sheet: Callable[[int], Sheet], reply_tokens: int) -> Sheet:
        """The largest of `sheet(0)`, `sheet(1)`, … that fits together with its longest question and reply."""

        def size(n: int) -> int:
            made = sheet(n)
            longest = max(made.questions, key=lambda question: len(question.text))
            return self.count(self.before + made.text + longest.text) + reply_tokens

        smallest, next_one = size(0), size(1)
        if smallest > self.num_tokens:
            raise NoRoom(f"{self.num_tokens} tokens are too few: the shortest sheet has {smallest}")
        low, high = 0, 2 + 2 * (self.num_tokens - smallest) // max(1, next_one - smallest)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if size(middle) <= self.num_tokens else (low, middle)
        return sheet(low)


def planted(filler: Sequence[str], facts: Sequence[tuple[float, str]]) -> str:
    """Sentences with facts between them, each (depth, sentence) at its share of the filler."""
    pieces: list[str] = []
    done = 0
    for depth, fact in sorted(facts):
        place = round(depth * len(filler))
        pieces += [*filler[done:place], fact]
        done = place
    return " ".join([*pieces, *filler[done:]])
