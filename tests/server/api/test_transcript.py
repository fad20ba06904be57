"""Text and tokens of a reply are released together, whole or in pieces, and cut together at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prerope.server.api.stream.generation import Token, Transcript
from prerope.server.engine.outputs import TokenLogprobs
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(smollm2: Checkpoint) -> Tokenizer:
    return Tokenizer.load(smollm2)


def read(
    tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str], sizes: Sequence[int] = ()
) -> tuple[str, list[Token], bool]:
    """Push the ids in groups of the given sizes (the rest one by one), and finish."""
    transcript = Transcript(tokenizer, stop)
    text, tokens, rest = "", [], list(token_ids)
    for size in [*sizes, *[1] * len(rest)]:
        group, rest = rest[:size], rest[size:]
        logprobs = [TokenLogprobs(token_id, -float(token_id)) for token_id in group]
        new_text, new_tokens = transcript.push(group, logprobs)
        text, tokens = text + new_text, tokens + new_tokens
        if transcript.stopped:
            break
    new_text, new_tokens = transcript.finish()
    return text + new_text, tokens + new_tokens, transcript.stopped


def test_tokens_and_their_offsets(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello, world of naïve 🙂 text")
    text, tokens, stopped = read(tokenizer, ids, [])
    assert text == "Hello, world of naïve 🙂 text"
    assert not stopped
    assert [token.token_id for token in tokens] == ids
    for token in tokens:
        piece = tokenizer.token_text(token.token_id)
        if "\ufffd" not in piece:
            assert text[token.start :].startswith(piece)


def test_a_stop_string_across_tokens_cuts_text_and_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello, world STOP here")
    assert tokenizer.encode(" STOP") != tokenizer.encode(" S") + tokenizer.encode("TOP"), "the stop spans tokens"
    text, tokens, stopped = read(tokenizer, ids, ["STOP"])
    assert stopped
    assert text == "Hello, world "
    kept = [tokenizer.token_text(token.token_id) for token in tokens]
    assert kept == ["Hello", ",", " world", " ST"]  # the last began before the cut
    assert all(token.logprobs is not None and token.logprobs.token_id == token.token_id for token in tokens)


def test_a_stop_string_that_never_completes_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two STO")
    text, tokens, stopped = read(tokenizer, ids, ["STOP"])
    assert (text, stopped) == ("one two STO", False)
    assert [token.token_id for token in tokens] == ids


def test_held_back_text_holds_its_tokens_back(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer, ["world peace"])
    assert transcript.push(tokenizer.encode("Hello"))[0] == "Hello"
    text, tokens = transcript.push(tokenizer.encode(" world"))
    assert text == " "
    assert [token.start for token in tokens] == [5]  # the token began in what was released
    text, tokens = transcript.push(tokenizer.encode(" peace"))
    assert (text, tokens) == ("", [])
    assert transcript.stopped


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(alphabet="ab \n🙂é日", min_size=1, max_size=30),
    stop=st.lists(st.text(alphabet="ab 🙂é", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 5), max_size=8),
)
def test_grouping_changes_nothing(tokenizer: Tokenizer, text: str, stop: list[str], sizes: list[int]) -> None:
    ids = tokenizer.encode(text)
    one_by_one, grouped = read(tokenizer, ids, stop), read(tokenizer, ids, stop, sizes)
    assert grouped == one_by_one
    whole, tokens, stopped = one_by_one
    decoded = tokenizer.decode(ids)
    assert stopped == any(string in decoded for string in stop)
    assert decoded.startswith(whole)
    assert not stopped or all(token.start < len(whole) for token in tokens)
    assert [token.token_id for token in tokens] == ids[: len(tokens)]
