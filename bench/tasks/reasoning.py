"""What takes more than finding: RULER's variable tracking, common words and frequent words (Hsieh 2024, arXiv
2404.06654), and bAbI's facts in filler (Weston 2015, arXiv 1502.05698; Kuratov 2024, arXiv 2406.10149)."""

from __future__ import annotations

import string
from collections import Counter

from bench.tasks.needles import in_prose
from bench.tasks.sheets import Question, Room, Sheet, planted
from bench.tasks.words import NOUNS, numbers, repeated

CHAIN = 5
PEOPLE = ("Mary", "John", "Daniel", "Sandra", "Bill", "Fred", "Julie", "Emma", "Peter", "Laura", "Frank", "Susan")
PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom", "school", "cinema", "park")
THINGS = ("apple", "football", "milk", "book", "lamp", "ring", "cup", "key")
MOVES = ("moved to", "went to", "travelled to", "journeyed to")


def variable_tracking(room: Room) -> list[Sheet]:
    """A number that is handed from variable to variable; all that hold it are asked for."""
    draw = room.draw("variable_tracking")
    variables = ["".join(draw.choices(string.ascii_uppercase, k=3)) + str(i) for i in range(1, CHAIN + 1)]
    (value,) = numbers(draw, 1)
    sources = [value, *(f"VAR {name}" for name in variables[:-1])]
    facts = [
        ((hop + draw.random()) / CHAIN, f"VAR {name} = {source}.")
        for hop, (name, source) in enumerate(zip(variables, sources, strict=True))
    ]
    intro = "Memorize and track the chain of variable assignments hidden in the following text.\n"
    text = f"\nQuestion: Find all variables that are assigned the value {value}.\nAnswer: The variables are"
    question = Question(text, tuple(variables))

    def sheet(filler: int) -> Sheet:
        return Sheet(intro + planted(repeated(filler), facts), (question,))

    return [room.fill(sheet, 8 * CHAIN)]


def common_words(room: Room) -> list[Sheet]:
    """A numbered list of words, five of which come up ten times as often as the others."""
    draw = room.draw("common_words")
    words = draw.sample(NOUNS, len(NOUNS))
    common, others = words[:5], words[5:]
    text = "\n\nQuestion: What are the 5 most common words in the list above?\nAnswer: The most common words are"
    question = Question(text, tuple(common))

    def sheet(filler: int) -> Sheet:
        repeats = 1 + filler // 10
        rest = [others[i % len(others)] for i in range(filler)]
        # However long the list is, no other word may come up half as often.
        ahead = max(10 * repeats // 5, 2 * max(Counter(rest).values(), default=1))
        listed = [*rest, *(word for word in common for _ in range(ahead))]
        room.draw("order").shuffle(listed)
        return Sheet(" ".join(f"{n}. {word}" for n, word in enumerate(listed, 1)), (question,))

    return [room.fill(sheet, 30)]


def frequent_words(room: Room) -> list[Sheet]:
    """Coded words whose frequency falls as 1/rank²; the three most frequent are asked for."""
    draw = room.draw("frequent_words")
    codes = list(dict.fromkeys("".join(draw.choices(string.ascii_lowercase, k=4)) for _ in range(300)))
    text = (
        "\n\nQuestion: Dots aside, what are the 3 most frequent coded words in the text above?\n"
        "Answer: The most frequent words are"
    )
    question = Question(text, tuple(codes[:3]))

    def sheet(filler: int) -> Sheet:
        total = 10 + filler
        weights = [1 / rank**2 for rank in range(1, len(codes) + 1)]
        scale = total / sum(weights)
        counts = [int(scale * weight) for weight in weights]
        listed = [code for code, number in zip(codes, counts, strict=True) for _ in range(number)]
        listed += ["..."] * (total - len(listed))
        room.draw("order").shuffle(listed)
        return Sheet(" ".join(listed), (question,))

    return [room.fill(sheet, 30)]


def where_is(room: Room) -> list[Sheet]:
    """bAbI's first task: people move, the fact at each depth is a person's last move, and each is asked for."""
    draw = room.draw("where_is")
    people = draw.sample(PEOPLE, min(len(room.depths), len(PEOPLE)))
    facts: list[tuple[float, str]] = []
    questions = []
    for person, depth in zip(people, room.depths, strict=False):
        before, place = draw.sample(PLACES, 2)
        facts.append((depth * draw.random(), f"{person} {draw.choice(MOVES)} the {before}."))
        facts.append((depth, f"{person} {draw.choice(MOVES)} the {place}."))
        text = f"\nQuestion: Where is {person} now?\nAnswer: {person} is now in the"
        questions.append(Question(text, (place,), depth))
    return [in_prose(room, facts, questions, 8, intro="")]


def where_is_thing(room: Room) -> list[Sheet]:
    """bAbI's second task: a thing is where the person moved last who took it. Two facts, the second at the depth."""
    draw = room.draw("where_is_thing")
    people = draw.sample(PEOPLE, min(len(room.depths), len(THINGS)))
    things = draw.sample(THINGS, len(people))
    facts: list[tuple[float, str]] = []
    questions = []
    for person, thing, depth in zip(people, things, room.depths, strict=False):
        facts.append((depth * draw.random(), f"{person} took the {thing}."))
        place = draw.choice(PLACES)
        facts.append((depth, f"{person} {draw.choice(MOVES)} the {place}."))
        text = f"\nQuestion: Where is the {thing} now?\nAnswer: The {thing} is now in the"
        questions.append(Question(text, (place,), depth))
    return [in_prose(room, facts, questions, 8, intro="")]
