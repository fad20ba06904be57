"""The families of tasks by name, what each is, and the prompts that they make: examples, sheet, question."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.tasks import needles, reasoning
from bench.tasks.sheets import Count, NoRoom, Question, Room, Sheet

Family = Callable[[Room], list[Sheet]]

FAMILIES: dict[str, Family] = {
    "passkey": needles.passkey,
    "secret_number": needles.secret_number,
    "single": needles.single,
    "multikey": needles.multikey,
    "multivalue": needles.multivalue,
    "multiquery": needles.multiquery,
    "key_value": needles.key_value,
    "variable_tracking": reasoning.variable_tracking,
    "common_words": reasoning.common_words,
    "frequent_words": reasoning.frequent_words,
    "where_is": reasoning.where_is,
    "where_is_thing": reasoning.where_is_thing,
}

ENDS_WITHOUT_EXAMPLE = ("passkey", "secret_number")
"""Families whose question tells any model how to go on: they get no few-shot examples."""

EXAMPLE_TOKENS = 350
EXAMPLE_DEPTHS = (0.2, 0.5, 0.8)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question of one sheet.

    Attributes:
        beginning: what all questions of the sheet have before them.
        seed: of the sheet: prompts of one sheet are not independent of one another.
    """

    family: str
    length: int
    seed: int
    beginning: str
    question: Question

    @property
    def text(self) -> str:
        return self.beginning + self.question.text


def prompts(family: str, count: Count, length: int, depths: Sequence[float], seed: int, shots: int) -> list[Prompt]:
    """All questions of one family at one length and seed, those next to one another that share the most text.

    Raises:
        NoRoom: the length has no room for the examples and the shortest sheet.
    """
    before = examples(family, count, shots)
    room = Room(count, length, depths, seed, before)
    try:
        sheets = FAMILIES[family](room)
    except NoRoom as error:
        raise NoRoom(f"{family} at {length} tokens with {shots} examples: {error}") from None
    return [
        Prompt(family, length, seed, before + sheet.text, question) for sheet in sheets for question in sheet.questions
    ]


def examples(family: str, count: Count, shots: int) -> str:
    """Short sheets of the family with a question answered: the same before every prompt, and none of any seed's."""
    room = Room(count, EXAMPLE_TOKENS, EXAMPLE_DEPTHS, 0)
    texts = []
    for shot in range(shots):
        sheet = FAMILIES[family](dataclasses.replace(room, seed=-1 - shot))[0]
        texts.append(sheet.text + sheet.questions[shot % len(sheet.questions)].worked)
    return "".join(texts)
