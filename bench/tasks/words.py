"""Words that tasks are made of, and what lies between the facts: sentences that repeat, or English prose."""

from __future__ import annotations

import functools
import itertools
import random
import re

from bench.shared.text import is_prose, paragraphs

_ADJECTIVES = (
    "amber ancient bitter brave bright bronze calm clever cold crimson curious dusty eager early empty gentle golden "
    "grand green hollow humble icy ivory kind large late lively lonely loud lucky merry narrow noble pale plain proud "
    "quick quiet rapid red rough round royal rusty sharp shy silent silver simple slow small smooth soft sour steep "
    "strong sweet tall tame tiny warm weary white wide wild wise wooden young"
)

_NOUNS = (
    "anchor apple arrow badger barrel basket beacon beaver bell bench blanket boat bottle branch bridge bucket button "
    "cabin camel candle canyon carpet castle cattle chapel cherry circle cloud comet copper corner cotton crane dagger "
    "desert dragon eagle engine falcon farmer feather fence ferry fiddle forest fountain garden giant glacier hammer "
    "harbour hazel helmet heron island jacket jungle kettle kitten ladder lantern lemon lizard magnet maple marble "
    "market meadow mirror monkey mountain needle orchard otter oyster paddle palace parrot pebble pencil pepper piano "
    "pigeon pillow planet pocket rabbit ribbon river rocket saddle sailor salmon scarf shadow shovel spider spoon "
    "spring stable statue stone summer table temple thunder ticket tiger timber tower trumpet tulip tunnel turtle "
    "valley velvet violin wagon walnut willow window winter wolf"
)

ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()

REPEATED = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


def names(draw: random.Random, number: int) -> list[str]:
    """Different names of two words, or of three where there are more than two words can tell apart."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    drawn = draw.sample(range(pairs if number <= pairs else pairs * len(ADJECTIVES)), number)
    return [_name(i) for i in drawn]


def _name(number: int) -> str:
    pair, third = number % (len(ADJECTIVES) * len(NOUNS)), number // (len(ADJECTIVES) * len(NOUNS))
    before = f"{ADJECTIVES[third]} " if third else ""
    return f"{before}{ADJECTIVES[pair // len(NOUNS)]} {NOUNS[pair % len(NOUNS)]}"


def numbers(draw: random.Random, number: int) -> list[str]:
    """Different numbers of five digits."""
    return [str(found) for found in draw.sample(range(10_000, 100_000), number)]


def repeated(number: int) -> list[str]:
    """The same five sentences over and over: every prompt of them begins alike."""
    return list(itertools.islice(itertools.cycle(REPEATED), number))


def prose(draw: random.Random, number: int) -> list[str]:
    """Consecutive sentences of Python's language reference, from a drawn place on; its end meets its beginning."""
    found = _sentences()
    start = draw.randrange(len(found))
    return [found[(start + i) % len(found)] for i in range(number)]


@functools.cache
def _sentences() -> list[str]:
    whole = (" ".join(paragraph.split()) for paragraph in filter(is_prose, paragraphs()))
    found = dict.fromkeys(sentence for paragraph in whole for sentence in re.split(r"(?<=[.!?]) ", paragraph))
    return [sentence for sentence in found if 30 <= len(sentence) <= 300 and sentence.endswith(".")]
