"""Token counting in completion streams: whatever the network and the server cut them into."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.shared.streams import StreamFailed, read_completion, split_events, tokens_per_event


def sse(*bodies: dict[str, Any] | str) -> bytes:
    return b"".join(f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n".encode() for body in bodies)


def chunk(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, **more}]}


def usage(completion: int, prompt: int = 5) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def test_events_arrive_when_their_last_byte_does() -> None:
    stream = b': keep-alive\n\ndata: {"a": 1}\n\ndata: [DONE]\n\n'
    cut = stream.index(b"1}")
    assert split_events([(1.0, stream[:cut]), (2.0, stream[cut:])]) == [(2.0, b'{"a": 1}'), (2.0, b"[DONE]")]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_any_cut_of_the_stream_gives_the_same_events(size: int) -> None:
    stream = sse(chunk("é\u2028x"), chunk(" two"), "[DONE]").replace(b"\n", b"\r\n")
    pieces = [(float(i), stream[i : i + size]) for i in range(0, len(stream), size)]
    assert [payload for _, payload in split_events(pieces)] == [payload for _, payload in split_events([(0.0, stream)])]
    assert len(split_events(pieces)) == 3


def test_a_line_separator_inside_a_text_does_not_end_the_event() -> None:
    stream = b'data: {"choices": [{"text": "a\xe2\x80\xa8b"}], "usage": {"completion_tokens": 1}}\n\n'
    assert len(read_completion(0.0, [(1.0, stream)]).token_times) == 1


def test_one_token_an_event() -> None:
    pieces = [(1.0, sse(chunk("a"))), (2.0, sse(chunk("b"))), (4.0, sse(chunk("", finish_reason="length"), usage(2)))]
    completion = read_completion(0.5, pieces)
    assert completion.token_times == (1.0, 2.0)
    assert completion.ttft == 0.5
    assert completion.gaps == [1.0]
    assert completion.time_per_token == 1.0
    assert completion.prompt_tokens == 5


def test_tokens_whose_text_a_stop_string_has_taken_come_with_the_end() -> None:
    end = {"id": "gen-1", "finish_reason": "stop", "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
    assert read_completion(0.0, [(1.0, b": keep-alive\n\n"), (3.0, sse(end, "[DONE]"))]).token_times == (3.0, 3.0)


def test_token_ids_say_how_many_tokens_an_event_has() -> None:
    pieces = [(1.0, sse(chunk("ab", token_ids=[1, 2, 3]))), (2.0, sse(chunk("c", token_ids=[4]), usage(4)))]
    completion = read_completion(0.0, pieces)
    assert completion.token_times == (1.0, 1.0, 1.0, 2.0)
    assert completion.gaps == [0.0, 0.0, 1.0]


def test_a_growing_usage_says_how_many_tokens_an_event_has() -> None:
    pieces = [
        (1.0, sse(chunk("ab") | {"usage": {"completion_tokens": 2, "prompt_tokens": 3}})),
        (2.0, sse(chunk("") | {"usage": {"completion_tokens": 3, "prompt_tokens": 3}})),
        (3.0, sse(usage(3, 3))),
    ]
    assert read_completion(0.0, pieces).token_times == (1.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("texts", "said", "total", "counts"),
    [
        (["a", "a long piece of text", "b"], [None] * 3, 6, [1, 4, 1]),
        (["a", "b", "c"], [None] * 3, 2, [1, 1, 0]),
        (["a", "b"], [1, None], 2, [1, 1]),
        (["a", "bc"], [2, 1], 3, [2, 1]),
        ([""], [None], 4, [4]),
    ],
)
def test_tokens_of_events(texts: list[str], said: list[int | None], total: int, counts: list[int]) -> None:
    """As the server says where that adds up; else one an event with text, a surplus by length, fewer the first."""
    assert tokens_per_event(texts, said, total) == counts


def test_chat_deltas_are_text() -> None:
    body = {"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {"content": "a"}}]}
    assert read_completion(0.0, [(1.0, sse(body[0])), (2.0, sse(body[1], usage(1)))]).token_times == (2.0,)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (sse({"error": {"message": "out of memory"}}), "out of memory"),
        (sse(chunk("a")), "without a usage"),
        (sse(usage(0)), "no token"),
        (b"data: {broken\n\n", "not JSON"),
        (b"", "without a usage"),
    ],
)
def test_a_stream_that_cannot_be_counted_fails(stream: bytes, message: str) -> None:
    with pytest.raises(StreamFailed, match=message):
        read_completion(0.0, [(1.0, stream)])
