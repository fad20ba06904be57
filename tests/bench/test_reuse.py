"""Documents read on their own: losses are those of the engine, and figures that are kept are not measured again."""

from __future__ import annotations

import random
import re
from argparse import Namespace
from pathlib import Path

import pytest
from prerope.server.config import EngineConfig
from prerope.server.engine.loading import load_engine
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.tokenizer import Tokenizer

from bench import BenchError
from bench.reuse.__main__ import quality_table
from bench.reuse.quality import (
    FULL,
    LOSS,
    NONE,
    NUM_DOCUMENTS,
    TASKS,
    Case,
    Measured,
    cases,
    loss_cases,
    prompt_of,
    quality,
)
from bench.shared.kept import Kept


def test_a_small_run(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(str(tiny_checkpoint), "tiny")
    tokenizer = Tokenizer.load(checkpoint)
    measured = Measured(load_engine(checkpoint, EngineConfig(kv_cache_memory=2**23)), tokenizer)
    text = " ".join(str(number) for number in range(400))
    loss = next(iter(loss_cases(tokenizer, text, 1, 3, 20, 10)))
    key = TASKS["keys, one asked for"](tokenizer, random.Random(0), 2, 20)
    tests = [(LOSS.format("text"), loss), ("keys, one asked for", key)]
    figures = quality(measured, [0, 64], tests, Kept(tmp_path / "kept"))
    assert {name: {measure: len(values) for measure, values in found.items()} for name, found in figures.items()} == {
        **{name: {measure: 1 for measure, _ in tests} for name in (FULL, "r = 0", "r = 64")},
        NONE: {LOSS.format("text"): 1},
    }
    losses = {name: found[LOSS.format("text")][0] for name, found in figures.items()}
    assert losses["r = 64"] == pytest.approx(losses[FULL], abs=1e-4), "all of a document read again is full attention"
    assert losses["r = 0"] != losses[FULL] != losses[NONE]
    monkeypatch.setattr(measured, "figure", lambda *_: pytest.fail("measured again"))
    assert quality(measured, [0, 64], tests, Kept(tmp_path / "kept")) == figures
    other = Measured(measured.engine, tokenizer, "another model")
    monkeypatch.setattr(other, "figure", lambda *_: 7.0)
    assert quality(other, [0], tests, Kept(tmp_path / "kept"))[FULL]["keys, one asked for"] == [7.0]
    table = quality_table(figures, Namespace(documents=3, length=20))
    assert [row[0] for row in table.rows] == [*figures]


@pytest.mark.parametrize("apart", [False, True])
def test_pieces_of_a_text(tiny_checkpoint: Path, apart: bool) -> None:
    tokenizer = Tokenizer.load(Checkpoint(str(tiny_checkpoint), "tiny"))
    text = " ".join(str(number) for number in range(2000))
    ids = tokenizer.encode(text)
    for place, case in enumerate(loss_cases(tokenizer, text, 2, 3, 20, 10, apart=apart)):
        whole = ids[place * (len(ids) // 2) :][: 16 + 3 * 20 + 10]
        assert (case.prefix, case.documents[-1], case.rest) == (whole[:16], whole[56:76], whole[76:])
        first, second = case.documents[:2]
        if apart:
            shown = " ".join(map(str, whole))
            assert not any(" ".join(map(str, document)) in shown for document in (first, second))
        else:
            assert [*first, *second] == whole[16:56]


@pytest.mark.parametrize("documents", [1, 3, 5, 12])
def test_tasks_of_another_number_of_documents_are_refused(tiny_checkpoint: Path, documents: int) -> None:
    tokenizer = Tokenizer.load(Checkpoint(str(tiny_checkpoint), "tiny"))
    with pytest.raises(BenchError, match=f"4, 6, 8, 10 documents, and --documents is {documents}"):
        cases(tokenizer, Namespace(only="tasks", documents=documents, length=30, cases=1))


@pytest.mark.parametrize("count", NUM_DOCUMENTS)
def test_tasks_of_any_other_number_of_documents_are_made(tiny_checkpoint: Path, count: int) -> None:
    tokenizer = Tokenizer.load(Checkpoint(str(tiny_checkpoint), "tiny"))
    made = cases(tokenizer, Namespace(only="tasks", documents=count, length=30, cases=3))
    assert [len(case.documents) for _, case in made] == [count] * 3 * len(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_tasks_can_be_answered_from_the_documents(tiny_checkpoint: Path, task: str) -> None:
    tokenizer = Tokenizer.load(Checkpoint(str(tiny_checkpoint), "tiny"))
    for seed in range(5):
        case = TASKS[task](tokenizer, random.Random(seed), 4, 30)
        assert case.answer is not None
        documents = [tokenizer.decode(list(document)) for document in case.documents]
        for fact in case.answer.split(". "):
            told = re.sub(r" \(\d\)$", "", fact.removesuffix("."))
            assert told.startswith("So ") or any(told in document for document in documents)
        assert case.answer not in tokenizer.decode(list(case.rest))


def test_the_first_document_and_what_is_read_again_are_in_the_spans() -> None:
    ids, spans = prompt_of([1], Case([[2, 3], [4, 5, 6]], [7]), 2)
    assert ids == [1, 2, 3, 4, 5, 6, 7]
    assert [(span.start, span.stop, span.reread) for span in spans] == [(1, 3, 2), (3, 6, 2)]
    assert prompt_of([1], Case([[2, 3]], [7]), None)[1] == ()
