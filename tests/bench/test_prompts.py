"""Prompts of an exact length that no cache can help."""

from __future__ import annotations

import re

import pytest

from bench.prompts import PromptWriter, fit, reference_words


def count(text: str) -> int:
    """A tokenizer of sorts: words and their longer parts, so that one more word is one to four tokens."""
    return len(re.findall(r"\w{1,6}|[^\w\s]", text))


def words(num_words: int) -> str:
    return " ".join(["label", *(["extraordinarily", "a", "configuration"] * num_words)[:num_words]])


@pytest.mark.parametrize("num_tokens", [2, 3, 4, 50, 51, 52, 53, 997, 7000])
def test_fits_exactly(num_tokens: int) -> None:
    assert count(fit(words, count, num_tokens)) == num_tokens


def test_few_counts_are_enough() -> None:
    calls = 0

    def counted(text: str) -> int:
        nonlocal calls
        calls += 1
        return count(text)

    fit(words, counted, 7000)
    assert calls <= 12


def test_a_tolerance_saves_counts() -> None:
    text = fit(words, count, 1000, tolerance=10)
    assert 990 <= count(text) <= 1010


def test_refuses_what_is_shorter_than_the_label() -> None:
    with pytest.raises(ValueError, match="too short"):
        fit(words, count, 0)


def test_refuses_a_tokenizer_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="no prompt of 101 tokens"):
        fit(words, lambda text: 2 * count(text), 101)


def test_no_two_prompts_begin_alike() -> None:
    one, two = PromptWriter(count, seed=1), PromptWriter(count, seed=1)
    prompts = [one.write(200), one.write(200), two.write(200)]
    assert len({prompt[:18] for prompt in prompts}) == 3
    assert [count(prompt) for prompt in prompts] == [200] * 3


def test_the_text_goes_round_at_its_end() -> None:
    num_words = len(reference_words())
    prompt = PromptWriter(lambda text: len(text.split()), seed=2).write(num_words + 500)
    assert len(prompt.split()) == num_words + 500


def test_the_text_is_prose() -> None:
    found = reference_words()
    assert len(found) > 30_000
    assert sum(word.isalpha() for word in found) > 0.7 * len(found)
