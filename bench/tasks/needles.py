"""Needles: facts in a long text that says nothing of them. RULER's four kinds (Hsieh 2024, arXiv 2404.06654), the
passkey (Mohtashami 2023, arXiv 2305.16300) and key-value retrieval (Liu 2023, arXiv 2307.03172)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from bench.tasks.sheets import Question, Room, Sheet, planted
from bench.tasks.words import names, numbers, prose, repeated

NUMBER_TOKENS = 10
"""Of a reply with one number and what may stand around it."""


def passkey(room: Room) -> list[Sheet]:
    """A five-digit key in sentences that repeat, and a sentence about it to go on with."""
    intro = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n"
    fact = "The pass key is {key}. Remember it. {key} is the pass key."
    return _in_repeated(room, "passkey", intro, fact, "\nWhat is the pass key? The pass key is")


def secret_number(room: Room) -> list[Sheet]:
    """The passkey said once and asked as a question with its answer begun: a number is all that can follow."""
    about = "The secret number of the vault is"
    question = f"\nQuestion: What is the secret number of the vault?\nAnswer: {about}"
    return _in_repeated(room, "secret_number", "", about + " {key}.", question)


def _in_repeated(room: Room, purpose: str, intro: str, fact: str, question: str) -> list[Sheet]:
    """A sheet a depth, the deepest first: what is before it is read once."""

    def made(depth: float) -> Sheet:
        (key,) = numbers(room.draw(purpose, depth), 1)
        facts, asked = [(depth, fact.format(key=key))], (Question(question, (key,), depth),)
        return room.fill(lambda filler: Sheet(intro + planted(repeated(filler), facts), asked), NUMBER_TOKENS)

    return [made(depth) for depth in sorted(room.depths, reverse=True)]


INTRO = "Some special magic numbers are hidden within the following text. Make sure to memorize them.\n"


def in_prose(
    room: Room, facts: list[tuple[float, str]], questions: Sequence[Question], reply_tokens: int, intro: str = INTRO
) -> Sheet:
    """Facts at their depths between sentences of prose."""

    def sheet(filler: int) -> Sheet:
        return Sheet(intro + planted(prose(room.draw("prose"), filler), facts), tuple(questions))

    return room.fill(sheet, reply_tokens)


def _needle(name: str, number: str) -> str:
    return f"The special magic number for {name} is {number}."


def _asked(name: str, number: str, depth: float) -> Question:
    text = f"\nQuestion: What is the special magic number for {name}?\nAnswer: The special magic number for {name} is"
    return Question(text, (number,), depth)


def single(room: Room) -> list[Sheet]:
    """One needle in prose; a sheet a depth, the deepest first."""

    def made(depth: float) -> Sheet:
        draw = room.draw("single", depth)
        (name,), (number,) = names(draw, 1), numbers(draw, 1)
        return in_prose(room, [(depth, _needle(name, number))], [_asked(name, number, depth)], NUMBER_TOKENS)

    return [made(depth) for depth in sorted(room.depths, reverse=True)]


def multikey(room: Room) -> list[Sheet]:
    """A needle at every depth, each of which is asked for: the others are there to be mistaken for it."""
    draw = room.draw("multikey")
    keys, values = names(draw, len(room.depths)), numbers(draw, len(room.depths))
    needles = list(zip(keys, values, room.depths, strict=True))
    facts = [(depth, _needle(key, value)) for key, value, depth in needles]
    return [in_prose(room, facts, [_asked(*needle) for needle in needles], NUMBER_TOKENS)]


def multivalue(room: Room) -> list[Sheet]:
    """One name that has four numbers, all asked for."""
    draw = room.draw("multivalue")
    (name,), values = names(draw, 1), numbers(draw, 4)
    text = f"\nQuestion: What are all the special magic numbers for {name}?\nAnswer: The numbers for {name} are"
    return [_four(room, draw, [name] * 4, values, text)]


def multiquery(room: Room) -> list[Sheet]:
    """Four names with a number each, all asked for at once."""
    draw = room.draw("multiquery")
    keys, values = names(draw, 4), numbers(draw, 4)
    asked = f"{', '.join(keys[:-1])} and {keys[-1]}"
    text = f"\nQuestion: What are the special magic numbers for {asked}, in this order?\nAnswer: They are"
    return [_four(room, draw, keys, values, text)]


def _four(room: Room, draw: random.Random, keys: list[str], values: list[str], text: str) -> Sheet:
    """A needle somewhere in each quarter."""
    pairs = enumerate(zip(keys, values, strict=True))
    facts = [((part + draw.random()) / 4, _needle(*pair)) for part, pair in pairs]
    return in_prose(room, facts, [Question(text, tuple(values))], 5 * NUMBER_TOKENS)


def key_value(room: Room) -> list[Sheet]:
    """A list of pairs from end to end; the pair at each depth is asked for."""

    def sheet(filler: int) -> Sheet:
        size = max(1, len(room.depths)) + filler
        draw = room.draw("key_value")
        keys, values = names(room.draw("keys"), size), [str(draw.randrange(10_000, 100_000)) for _ in range(size)]
        lines = "\n".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
        questions = []
        for depth in room.depths:
            place = min(size - 1, round(depth * size))
            text = f"\n\nQuestion: Which number stands beside {keys[place]}?\nAnswer: {keys[place]}:"
            questions.append(Question(text, (values[place],), depth))
        return Sheet(f"A list of names and their numbers.\n\n{lines}", tuple(questions))

    return [room.fill(sheet, NUMBER_TOKENS)]
