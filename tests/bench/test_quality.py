"""The pure parts of the quality measurement: which tokens count, which text is read, what a method is."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import pytest
from prerope.server.engine.outputs import TokenLogprobs

from bench.quality.__main__ import parse_arguments
from bench.quality.report import REFERENCE, Quality, report
from bench.shared.engines import mean_loss
from bench.shared.kept import Kept, key_of
from bench.shared.options import method_list
from bench.shared.text import (
    Document,
    TextTooShort,
    context,
    cut_documents,
    default_texts,
    docstring_text,
    ending_at,
    is_prose,
    reference_text,
    reference_words,
)


def logprobs(*values: float) -> list[TokenLogprobs | None]:
    return [None, *(TokenLogprobs(0, value) for value in values)]


def test_the_loss_is_of_the_tokens_before_a_position() -> None:
    assert mean_loss(logprobs(-100.0, -1.0, -3.0), 4, 2) == 2.0
    assert mean_loss(logprobs(-6.0, -1.0, -2.0), 4, 3) == 3.0
    assert mean_loss(logprobs(-6.0, -1.0, -2.0), 3, 1) == 1.0


@pytest.mark.parametrize(("stop", "last"), [(4, 4), (4, 5), (2, 2), (9, 8)])
def test_a_loss_of_tokens_that_have_none_is_refused(stop: int, last: int) -> None:
    with pytest.raises(ValueError, match=f"{last} tokens before {stop} are wanted"):
        mean_loss(logprobs(-1.0, -2.0, -3.0), stop, last)


def test_a_context_is_the_beginning_of_a_document_and_the_reference_reads_its_end() -> None:
    document = Document("numbers", tuple(range(100)))
    assert context(document, 10) == list(range(10))
    assert context(document, 10, beginning=[-1]) == [-1, *range(9)]
    assert ending_at(range(100), 50, 10) == list(range(40, 50))
    assert ending_at([-1, *range(99)], 50, 10, beginning=[-1]) == [-1, *range(40, 49)]


def test_figures_are_kept_between_runs_and_known_by_what_they_depend_on(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "kept"
    key = key_of({"positions": "rope"}, [1, 2])
    assert key != key_of({"positions": "yarn"}, [1, 2]) != key_of({"positions": "yarn"}, [1, 3])
    beside = Kept(file)
    assert beside.get(key) is None
    Kept(file).add(key, {"losses": [1.5, 2.5], "last": 4})
    with file.open("a") as other:  # a run that is writing its line
        other.write('{"key": "ab')
    assert beside.get("ab") is None
    assert beside.get(key) == Kept(file).get(key) == {"key": key, "losses": [1.5, 2.5], "last": 4}
    with file.open("a") as other:
        other.write('", "losses": []}\n')
    assert beside.get("ab") == {"key": "ab", "losses": []}


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_documents_are_consecutive_and_lie_within_one_text() -> None:
    texts = [("one", "abcdefgh"), ("two", "ABCDEF")]
    documents = cut_documents(iter(texts), characters, 4, 3)
    assert ["".join(map(chr, document.token_ids)) for document in documents] == ["abc", "def", "ABC", "DEF"]
    assert documents[1].name == "one, tokens 3 to 5"


def test_a_later_text_is_not_read_while_the_first_is_enough() -> None:
    texts = itertools.chain([("one", "abcdef")], (pytest.fail("read") for _ in range(1)))
    assert len(cut_documents(texts, characters, 2, 3)) == 2


def test_a_short_text_is_refused_with_what_there_is() -> None:
    with pytest.raises(TextTooShort, match=r"2 documents of 5 tokens are wanted and there are 1: one has 8 tokens"):
        cut_documents(iter([("one", "abcdefgh")]), characters, 2, 5)


def test_the_default_text_is_long_and_repeats_no_paragraph() -> None:
    paragraphs = [" ".join(paragraph.split()) for paragraph in reference_text().split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert len(reference_text()) > 300_000
    assert next(name for name, _ in default_texts()).startswith("the language reference")


def test_long_docstrings_are_taken_once_each_in_the_order_of_the_modules(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text(f'"""{"module b " * 9}"""\n\ndef f():\n    """{"shared " * 9}"""\n')
    (tmp_path / "a.py").write_text(
        f'class A:\n    """{"shared " * 9}"""\n\n    def short(self):\n        """Short."""\n'
    )
    text = docstring_text(tmp_path, shortest=20)
    assert [paragraph.split()[0] for paragraph in text.split("\n\n")] == ["shared", "module"]


def test_the_words_of_prompts_are_prose() -> None:
    assert len(reference_words()) > 30_000
    assert is_prose("A sentence of words, long enough to be read as prose by anybody who happens to see it here.")
    assert not is_prose("+--------+ a table with words in it that is long enough to be prose, were it not drawn so")


def test_a_method_may_bring_parameters() -> None:
    first, second = method_list("rerope:window=2048:logn,yarn:factor=2")
    assert (first.spec.method, first.spec.window, first.spec.logn) == ("rerope", 2048, True)
    assert first.label == "rerope:window=2048:logn"
    assert second.spec.factor == 2.0


@pytest.mark.parametrize("text", ["nonsense", "yarn:factor=two", "yarn:colour=1", "rerope:window=1.5", "rope,rope"])
def test_a_wrong_method_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        method_list(text)


def test_lengths_are_ascending_and_more_than_the_tokens_that_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_arguments(["--lengths", "16384,8192"]).lengths == [8192, 16384]
    with pytest.raises(SystemExit):
        parse_arguments(["--lengths", "512", "--last", "1024"])
    assert "below the shortest length, 512" in capsys.readouterr().err


def test_differences_are_taken_document_by_document(tmp_path: Path) -> None:
    about = {"model": "tiny", "dtype": "float32", "train_length": 8, "last": 4, "documents": ["one", "two"]}
    losses = {
        (REFERENCE, 8): [1.0, 3.0],
        (REFERENCE, 16): [2.0, 4.0],
        ("yarn", 8): [1.0, 3.0],
        ("yarn", 16): [2.1, 4.3],
    }
    found = Quality([REFERENCE, "yarn"], [8, 16], losses, about | {"date": "2020-01-01", "cpu": "a cpu"})
    assert found.differences("yarn", 16) == pytest.approx([0.1, 0.3])
    assert all(path.stat().st_size > 0 for path in report(found).save(tmp_path))
    row = "| yarn | 2.000 ± 1.414 | 3.200 ± 1.556 | +0.000 ± 0.000 | +0.200 ± 0.141 |"
    assert row in (tmp_path / "quality.md").read_text()
