"""Quality of documents read on their own, beside full attention: loss on what follows them, and tasks that need them.

Loss: pieces of a text are cut into documents; the loss is of the tokens that follow (nats a token). `none` reads the
rest alone. Tasks: facts are planted in documents of filler, and a greedy reply must begin with the right value.
"""

from __future__ import annotations

import random
import statistics
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prerope.cache.blocks.documents import DocumentSpan
from prerope.server.engine.engine import Engine
from prerope.server.engine.sequence import EngineRequest, SamplingParams
from prerope.server.tokenizer import Tokenizer

from bench.shared.text import default_texts, docstring_text, file_text

PREFIX = "Documents:\n\n"
FULL = "full attention"
NONE = "no documents"
LOSS = "loss on {}"
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "purple", "orange", "brown", "grey")


@dataclass(frozen=True, slots=True)
class Case:
    """Documents, what follows them, and the text that the reply has to begin with (loss: None)."""

    documents: Sequence[Sequence[int]]
    rest: Sequence[int]
    answer: str | None = None


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

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.prefix = tokenizer.encode(PREFIX)

    def loss(self, case: Case, reread: int | None) -> float:
        ids, spans = prompt_of(self.prefix, case, reread)
        start = len(ids) - len(case.rest) + 1
        sampling = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=start)
        (output,) = self._run(ids, spans, sampling)
        scored = output.prompt_logprobs or ()
        return -statistics.fmean(entry.logprob for entry in scored[start:] if entry is not None)

    def figure(self, case: Case, reread: int | None) -> float:
        return self.loss(case, reread) if case.answer is None else self.is_right(case, reread)

    def is_right(self, case: Case, reread: int | None) -> float:
        assert case.answer is not None
        ids, spans = prompt_of(self.prefix, case, reread)
        count = len(self.tokenizer.encode(case.answer)) + 3
        outputs = self._run(ids, spans, SamplingParams(max_tokens=count, temperature=0.0))
        text = self.tokenizer.decode([token for output in outputs for token in output.token_ids])
        return float(text.strip().startswith(case.answer))

    def _run(self, ids: list[int], spans: tuple[DocumentSpan, ...], sampling: SamplingParams) -> list:  # type: ignore[type-arg]
        self.engine.add(EngineRequest("case", ids, sampling, documents=spans))
        outputs = []
        while self.engine.has_work():
            outputs += [output for _, output in self.engine.step()]
        return [output for output in outputs if output.token_ids or output.finish_reason]


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
    tokenizer: Tokenizer, text: str, count: int, num_documents: int, length: int, rest: int
) -> Iterator[Case]:
    """Consecutive pieces of a text, cut into documents at arbitrary tokens."""
    ids = tokenizer.encode(text[: count * (num_documents * length + rest) * 8])
    size = num_documents * length + rest
    for start in range(0, count * size, size):
        piece = ids[start : start + size]
        cuts = range(0, num_documents * length, length)
        yield Case([piece[cut : cut + length] for cut in cuts], piece[num_documents * length :])


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


def key_case(tokenizer: Tokenizer, dice: random.Random, num_documents: int, length: int) -> Case:
    """A key in every document; one of them is asked for."""
    names = dice.sample(COLOURS, num_documents)
    keys = [str(dice.randrange(10_000, 100_000)) for _ in names]
    texts = [
        planted(filler(dice, tokenizer, length), f"The code of the {name} box is {key}.", dice) + "\n\n"
        for name, key in zip(names, keys, strict=True)
    ]
    asked = dice.randrange(num_documents)
    question = f"Question: What is the code of the {names[asked]} box?\nAnswer: The code of the {names[asked]} box is"
    return Case([tokenizer.encode(text) for text in texts], tokenizer.encode(question), keys[asked])


def chain_case(tokenizer: Tokenizer, dice: random.Random, num_documents: int, length: int) -> Case:
    """A value in one document, and a variable that takes it over in a later one."""
    names = dice.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", num_documents)
    values = [str(dice.randrange(10_000, 100_000)) for _ in names]
    facts = [f"VAR {name} = {value}." for name, value in zip(names[:-1], values, strict=False)]
    source = dice.randrange(num_documents - 1)
    facts.append(f"VAR {names[-1]} = VAR {names[source]}.")
    texts = [planted(filler(dice, tokenizer, length), fact, dice) + "\n\n" for fact in facts]
    question = f"Question: VAR {names[-1]} = VAR {names[source]}. What is its value?\nAnswer: VAR {names[source]} ="
    return Case([tokenizer.encode(text) for text in texts], tokenizer.encode(question), values[source])


def count_case(tokenizer: Tokenizer, dice: random.Random, num_documents: int, length: int) -> Case:
    """A letter is lost in some of the documents; how many was it lost in? An example of one is in the question."""
    lost = sorted(dice.sample(range(num_documents), dice.randrange(1, num_documents + 1)))
    texts = [
        planted(filler(dice, tokenizer, length), f"A letter was {'lost' if n in lost else 'found'} here.", dice)
        + "\n\n"
        for n in range(num_documents)
    ]
    question = (
        'Question: How many of these say "lost": lost, found?\nAnswer: 1\n\n'
        "Question: In how many of the documents was a letter lost?\nAnswer:"
    )
    return Case([tokenizer.encode(text) for text in texts], tokenizer.encode(question), str(len(lost)))


TASKS: dict[str, Callable[[Tokenizer, random.Random, int, int], Case]] = {
    "keys, one asked for": key_case,
    "a value taken over in another document": chain_case,
    "documents that say so, counted": count_case,
}
