"""Quality of documents read on their own, beside full attention: loss on what follows them, and tasks that need them.

Loss: pieces of a text are a prefix, its first 16 tokens, then documents; the loss is of the tokens that follow (nats a
token). `apart` takes all documents but the last from elsewhere in the text, as documents of their own are. `none` has
the prefix and the rest alone. Tasks: facts are planted in documents of filler, one of them is told as an example, and a
greedy reply must begin with the right sentence.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from prerope.cache.blocks.documents import DocumentSpan
from prerope.server.api.requests.documents import DEFAULT_PREFIX
from prerope.server.engine.engine import Engine
from prerope.server.engine.sequence import EngineRequest, SamplingParams
from prerope.server.tokenizer import Tokenizer
from tqdm import tqdm

from bench import BenchError
from bench.shared.engines import mean_loss, outputs, prompt_logprobs
from bench.shared.kept import Kept, key_of
from bench.shared.text import default_texts, docstring_text, file_text

Figures = dict[str, dict[str, list[float]]]
"""Variant → measure → one figure a case."""
FULL = "full attention"
NONE = "no documents"
LOSS, LOSS_APART = "loss on {}", "loss on {}, documents from elsewhere"
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "purple", "orange", "brown", "grey")
PEOPLE = ("Tom", "Ann", "Bob", "Eve", "Max", "Kim", "Leo", "Amy", "Dan", "Joe", "Sue", "Ray")
NUM_DOCUMENTS = range(4, len(COLOURS) + 1, 2)
"""Of a task: two facts in two documents each, and no colour twice."""
MOST_CHARACTERS = 2_000_000
"""Of a text, which are read."""
PREFIX_TOKENS = 16
"""Of a piece of text, which stand before its documents."""


@dataclass(frozen=True, slots=True)
class Case:
    """Documents, what follows them, and the text that the reply has to begin with (loss: None).

    prefix: what stands before them; None: what requests get that say nothing of it.
    """

    documents: Sequence[Sequence[int]]
    rest: Sequence[int]
    answer: str | None = None
    prefix: Sequence[int] | None = None


def prompt_of(prefix: Sequence[int], case: Case, reread: int | None) -> tuple[list[int], tuple[DocumentSpan, ...]]:
    """Token ids and spans; reread None is full attention."""
    ids, spans = list(prefix), list[DocumentSpan]()
    for document in case.documents:
        spans.append(DocumentSpan(len(ids), len(ids) + len(document), len(document) if not spans else reread or 0))
        ids += document
    return [*ids, *case.rest], () if reread is None else tuple(spans)


def variants(rereads: Sequence[int]) -> dict[str, int | None]:
    return {FULL: None, **{f"r = {reread}": reread for reread in rereads}}


class Measured:
    """Runs cases through an engine, one at a time."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, model: str = "") -> None:
        """model: which one it is, for figures that are kept."""
        self.engine, self.tokenizer = engine, tokenizer
        self.prefix = tokenizer.encode(DEFAULT_PREFIX)
        self.about = [model, engine.info.dtype, self.prefix]

    def figure(self, case: Case, reread: int | None) -> float:
        """The loss, or whether the reply is right."""
        ids, spans = prompt_of(self.prefix if case.prefix is None else case.prefix, case, reread)
        if case.answer is None:
            num_scored = len(case.rest) - 1
            logprobs = prompt_logprobs(self.engine, ids, len(ids) - num_scored, documents=spans)
            return mean_loss(logprobs, len(ids), num_scored)
        sampling = SamplingParams(max_tokens=len(self.tokenizer.encode(case.answer)) + 3, temperature=0.0)
        self.engine.add(EngineRequest("case", ids, sampling, documents=spans))
        reply = [token for _, output in outputs(self.engine) for token in output.token_ids]
        return float(self.tokenizer.decode(reply).strip().startswith(case.answer))


def texts() -> Iterator[tuple[str, str]]:
    """Three kinds of text: prose, short descriptions, and code."""
    yield "prose", next(default_texts())[1]
    stdlib = Path(sysconfig.get_path("stdlib"))
    yield "docstrings", docstring_text(stdlib)
    yield (
        "code",
        "\n".join(file_text(stdlib / f"{name}.py")[1] for name in ("argparse", "tarfile", "inspect", "typing")),
    )


def loss_cases(
    tokenizer: Tokenizer, text: str, count: int, num_documents: int, length: int, rest: int, *, apart: bool = False
) -> Iterator[Case]:
    """Pieces of a text, evenly spread over it, cut into documents at arbitrary tokens.

    apart: all documents but the last are cut out of the rest of the text; the last goes on in what follows.
    """
    size = PREFIX_TOKENS + num_documents * length + rest
    ids = tokenizer.encode(text[:MOST_CHARACTERS])
    if count * size + length > len(ids):
        raise BenchError(f"{count} pieces of {size} tokens and some beside them are wanted, and a text has {len(ids)}")
    for place in range(count):
        start = place * (len(ids) // count)
        piece = ids[start : start + size]
        documents = [piece[cut : cut + length] for cut in range(PREFIX_TOKENS, size - rest, length)]
        if apart:
            dice, others = random.Random(place), ids[:start] + ids[start + size :]
            starts = [dice.randrange(len(others) - length + 1) for _ in documents[:-1]]
            documents[:-1] = [others[first : first + length] for first in starts]
        yield Case(documents, piece[size - rest :], prefix=piece[:PREFIX_TOKENS])


def filler(dice: random.Random, tokenizer: Tokenizer, length: int) -> str:
    """Sentences that say nothing of the question, about `length` tokens of them."""
    subjects = ("The grass", "The river", "The old man", "A quiet street", "The garden", "The train", "A small bird")
    verbs = ("is seen from", "leads to", "waits near", "passes", "lies behind", "belongs to", "looks like")
    objects = ("the hill", "the station", "the village", "the harbour", "the wall", "the market", "the bridge")
    sentences: list[str] = []
    while len(tokenizer.encode(" ".join(sentences))) < length:
        sentences += [f"{dice.choice(subjects)} {dice.choice(verbs)} {dice.choice(objects)}." for _ in range(8)]
    return " ".join(sentences)


def planted(text: str, fact: str, dice: random.Random) -> str:
    sentences = text.split(". ")
    sentences.insert(dice.randrange(1, len(sentences)), fact.removesuffix("."))
    return ". ".join(sentences)


def planted_in_filler(
    tokenizer: Tokenizer, dice: random.Random, facts: Sequence[str], length: int
) -> list[Sequence[int]]:
    """A document for each fact, the fact somewhere in it."""
    return [tokenizer.encode(planted(filler(dice, tokenizer, length), fact, dice) + "\n\n") for fact in facts]


def codes(dice: random.Random, count: int) -> list[str]:
    return [str(dice.randrange(1_000, 10_000)) for _ in range(count)]


def key_case(tokenizer: Tokenizer, dice: random.Random, num_documents: int, length: int) -> Case:
    """A key in every document; one of them is asked for, after another has been told."""
    names, keys = dice.sample(COLOURS, num_documents), codes(dice, num_documents)
    facts = [f"The code of the {name} box is {key}." for name, key in zip(names, keys, strict=True)]
    told, asked = dice.sample(range(num_documents), 2)
    rest = "".join(
        f"Question: What is the code of the {names[n]} box?\nAnswer:{answer}"
        for n, answer in ((told, f" {facts[told]}\n\n"), (asked, ""))
    )
    return Case(planted_in_filler(tokenizer, dice, facts, length), tokenizer.encode(rest), facts[asked])


def chain_case(tokenizer: Tokenizer, dice: random.Random, num_documents: int, length: int) -> Case:
    """Who has which box stands in one document, what its code is in another; one such pair is told, one asked for."""
    pairs = num_documents // 2
    people, names, keys = dice.sample(PEOPLE, pairs), dice.sample(COLOURS, pairs), codes(dice, pairs)
    owners = [f"{person} has the {name} box." for person, name in zip(people, names, strict=True)]
    values = [f"The code of the {name} box is {key}." for name, key in zip(names, keys, strict=True)]
    facts = dice.sample([*owners, *values], 2 * pairs)
    told, asked = dice.sample(range(pairs), 2)
    rest = "".join(
        f"Question: What is the code of the box that {people[n]} has?\nAnswer:{answer}"
        for n, answer in ((told, f" {owners[told]} {values[told]}\n\n"), (asked, ""))
    )
    documents = planted_in_filler(tokenizer, dice, facts, length)
    return Case(documents, tokenizer.encode(rest), f"{owners[asked]} {values[asked]}")


def count_case(tokenizer: Tokenizer, dice: random.Random, num_documents: int, length: int) -> Case:
    """Some people found a coin, one a document: they are to be named and counted, as in an example that is told."""
    people = dice.sample(PEOPLE, num_documents)
    lucky = sorted(dice.sample(range(num_documents), dice.randrange(1, num_documents + 1)))
    facts = [f"{person} found a {'coin' if n in lucky else 'shell'}." for n, person in enumerate(people)]
    rest = (
        "Question: Jim found a coin. Pat found a shell. Liz found a coin. How many found a coin?\n"
        "Answer: Jim found a coin (1). Liz found a coin (2). So 2.\n\n"
        "Question: How many of the people in the documents found a coin?\nAnswer:"
    )
    named = " ".join(f"{people[n]} found a coin ({place})." for place, n in enumerate(lucky, start=1))
    documents = planted_in_filler(tokenizer, dice, facts, length)
    return Case(documents, tokenizer.encode(rest), f"{named} So {len(lucky)}.")


TASKS: dict[str, Callable[[Tokenizer, random.Random, int, int], Case]] = {
    "keys, one asked for": key_case,
    "a value by way of another document": chain_case,
    "what documents say, counted": count_case,
}


def quality(measured: Measured, rereads: Sequence[int], tests: Sequence[tuple[str, Case]], kept: Kept) -> Figures:
    """One figure a case, of every variant; what is kept is not measured again."""
    figures = {name: defaultdict[str, list[float]](list) for name in (*variants(rereads), NONE)}
    for measure, case in tqdm(tests, unit="case"):
        asked = {**variants(rereads), **({NONE: None} if case.answer is None else {})}
        for name, reread in asked.items():
            given = replace(case, documents=[]) if name == NONE else case
            key, about = key_of(measured.about, measure, name, asdict(given)), {"measure": measure, "variant": name}
            found = kept.get(key) or kept.add(key, about | {"figure": measured.figure(given, reread)})
            figures[name][measure].append(found["figure"])
    return {name: dict(found) for name, found in figures.items()}


def cases(tokenizer: Tokenizer, asked: argparse.Namespace) -> list[tuple[str, Case]]:
    """Of all measures in turn, so that a run that was ended has some of each."""
    tests: dict[str, list[Case]] = {}
    if asked.only != "loss":
        if asked.documents not in NUM_DOCUMENTS:
            numbers = ", ".join(map(str, NUM_DOCUMENTS))
            raise BenchError(f"tasks take {numbers} documents, and --documents is {asked.documents}")
        for name, make in TASKS.items():
            made = (make(tokenizer, random.Random(seed), asked.documents, asked.length) for seed in range(asked.cases))
            tests[name] = list(made)
    if asked.only != "tasks":
        given = texts() if asked.text is None else map(file_text, asked.text)
        shape = (max(2, asked.cases // 4), asked.documents, asked.length, asked.tokens_after)
        for name, text in given:
            tests[LOSS.format(name)] = list(loss_cases(tokenizer, text, *shape))
            tests[LOSS_APART.format(name)] = list(loss_cases(tokenizer, text, *shape, apart=True))
    placed = [(place / len(group), name, case) for name, group in tests.items() for place, case in enumerate(group)]
    return [(name, case) for _, name, case in sorted(placed, key=lambda one: one[0])]
