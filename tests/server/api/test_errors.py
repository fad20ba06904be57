"""The error table over HTTP: status, type, param and words of each refusal. None of them begins a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults import Faults


@pytest.fixture(scope="module")
def http(serve_module: Any, tiny_checkpoint: Path) -> Iterator[httpx.Client]:
    url = serve_module(model_id=str(tiny_checkpoint), max_model_len=512)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def max_model_len(http: httpx.Client) -> int:
    return int(http.get("/v1/models").json()["data"][0]["max_model_len"])


GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
RENDER = f"{COMPLETIONS}/render"
USER = {"messages": [{"role": "user", "content": "hi"}]}

BAD_VALUES: list[tuple[str, dict[str, Any], str, list[str]]] = [
    # endpoint, body, param, what the message must say
    (
        GENERATE,
        {"prompt": "a", "max_token": 3},
        "max_token",
        ["unknown field", "max_token", "did you mean 'max_tokens'"],
    ),
    (GENERATE, {}, "prompt", ["prompt"]),
    (GENERATE, {"prompt": None}, "prompt", ["prompt"]),
    (GENERATE, {"prompt": 5}, "prompt", ["text or a list of token ids", "a number"]),
    (GENERATE, {"prompt": ""}, "prompt", ["empty"]),
    (GENERATE, {"prompt": []}, "prompt", ["empty"]),
    (GENERATE, {"prompt": [1, True]}, "prompt", ["prompt[1]", "a boolean"]),
    (GENERATE, {"prompt": [1, -1]}, "prompt", ["prompt[1]", "-1", "0 to"]),
    (GENERATE, {"prompt": [10**30]}, "prompt", ["prompt[0]", "0 to"]),
    (GENERATE, {"prompt": "a", "temperature": -1}, "temperature", ["temperature", "0", "-1"]),
    (GENERATE, {"prompt": "a", "temperature": 11}, "temperature", ["temperature", "10", "11"]),
    (GENERATE, {"prompt": "a", "temperature": "hot"}, "temperature", ["temperature", "number"]),
    (GENERATE, {"prompt": "a", "top_p": 1.5}, "top_p", ["top_p", "1.5"]),
    (GENERATE, {"prompt": "a", "top_p": 1.5}, "top_p", ["top_p", "1"]),
    (GENERATE, {"prompt": "a", "top_k": -2}, "top_k", ["top_k", "-1", "-2"]),
    (GENERATE, {"prompt": "a", "min_p": 2}, "min_p", ["min_p", "1", "2"]),
    (GENERATE, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", ["repetition_penalty", "0"]),
    (GENERATE, {"prompt": "a", "presence_penalty": 3}, "presence_penalty", ["presence_penalty", "2", "3"]),
    (GENERATE, {"prompt": "a", "frequency_penalty": -3}, "frequency_penalty", ["frequency_penalty", "-2", "-3"]),
    (GENERATE, {"prompt": "a", "max_tokens": -2}, "max_tokens", ["max_tokens", "-2"]),
    (GENERATE, {"prompt": "a", "max_tokens": 0}, "max_tokens", ["max_tokens", "1", "0"]),
    (GENERATE, {"prompt": "a", "max_tokens": 2.5}, "max_tokens", ["max_tokens", "integer"]),
    (GENERATE, {"prompt": "a", "max_tokens": 2, "min_tokens": 3}, "min_tokens", ["min_tokens", "3", "2", "max_tokens"]),
    (GENERATE, {"prompt": "a", "seed": 2**64}, "seed", ["seed"]),
    (GENERATE, {"prompt": "a", "logprobs": 21}, "logprobs", ["logprobs", "20", "21"]),
    (GENERATE, {"prompt": "a", "stop": ["x"] * 257}, "stop", ["256", "257"]),
    (GENERATE, {"prompt": "a", "stop": [3]}, "stop[0]", ["stop[0]", "string"]),
    (GENERATE, {"prompt": "a", "stop_token_ids": [10**6]}, "stop_token_ids", ["stop_token_ids[0]", "1000000"]),
    (GENERATE, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", ["'x'", "token ids"]),
    (GENERATE, {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", ["logit_bias[1]", "100", "101"]),
    (GENERATE, {"prompt": "a", "logit_bias": {"999999": 1}}, "logit_bias", ["999999"]),
    (GENERATE, {"prompt": "a", "cache_salt": "s" * 300}, "cache_salt", ["cache_salt", "256"]),
    (GENERATE, {"prompt": "a", "rope": {"method": "spiral"}}, "rope.method", ["spiral", "rerope"]),
    (GENERATE, {"prompt": "a", "rope": {"method": "yarn", "scale": 2}}, "rope.scale", ["unknown field", "rope.scale"]),
    (GENERATE, {"prompt": "a", "rope": {"method": "yarn", "factor": 0.5}}, "rope.factor", ["factor", "1", "0.5"]),
    (GENERATE, {"prompt": "a", "rope": {"method": "rerope", "window": 10**6}}, "rope", ["window"]),
    (COMPLETIONS, {"prompt": []}, "prompt", ["empty"]),
    (COMPLETIONS, {"prompt": ["a", 3]}, "prompt[1]", ["prompt[1]", "string"]),
    (COMPLETIONS, {"prompt": ["a", ""]}, "prompt[1]", ["prompt[1]", "empty"]),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", ["suffix", "not supported"]),
    (COMPLETIONS, {"prompt": "a", "best_of": 2, "n": 3}, "best_of", ["best_of", "2", "n"]),
    (COMPLETIONS, {"prompt": ["a"] * 100, "n": 20}, "n", ["100 prompts", "2000", "1024"]),
    (COMPLETIONS, {"prompt": ["a"] * 1025}, "prompt", ["1024", "1025"]),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n", ["n", "1", "0"]),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", ["echo"]),
    (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", ["stream"]),
    (COMPLETIONS, {"prompt": "a", "use_beam_search": True, "n": 33}, "n", ["33 beams", "at most 32"]),
    (COMPLETIONS, {"prompt": "a", "use_beam_search": True, "stop": "x"}, "stop", ["log-probabilities", "leave out"]),
    (COMPLETIONS, {"prompt": "a", "use_beam_search": True, "guided_regex": "a"}, "use_beam_search", ["constrains"]),
    (RENDER, {"prompt": "a", "use_beam_search": True, "guided_regex": "a"}, "use_beam_search", ["constrains"]),
    (CHAT, {**USER, "use_beam_search": True, "repetition_penalty": 1.5}, "repetition_penalty", ["leave out"]),
    (COMPLETIONS, {"prompt": "a", "use_beam_search": True, "echo": True, "max_tokens": 0}, "echo", ["leave out"]),
    (COMPLETIONS, {"prompt": "a", "use_beam_search": True, "echo": True, "logprobs": 1}, "echo", ["leave out"]),
    (COMPLETIONS, {"prompt": "a", "n_predict": 3, "max_new_tokens": 4}, "max_new_tokens", ["n_predict", "the same"]),
    (CHAT, {**USER, "max_completion_tokens": 0}, "max_completion_tokens", ["max_completion_tokens", "-1"]),
    (COMPLETIONS, {"prompt": "a", "grammar": "a", "grammar_lazy": True}, "grammar_lazy", ["from the beginning"]),
    (COMPLETIONS, {"prompt": "a", "return_progres": True}, "return_progres", ["unknown field"]),
    (CHAT, {"messages": []}, "messages", ["messages", "1"]),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages", ["wizard", "developer"]),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", ["content"]),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", ["image_url", "text"]),
    (CHAT, {**USER, "tool_choice": "required"}, "tool_choice", ["tool_choice", "tools"]),
    (CHAT, {**USER, "response_format": {"type": "yaml"}}, "response_format", ["yaml", "json_schema"]),
    (CHAT, {**USER, "top_logprobs": 2}, "top_logprobs", ["logprobs"]),
    (CHAT, {**USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs", ["20", "21"]),
    (CHAT, {**USER, "max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", ["max_completion_tokens", "2", "3"]),
    (CHAT, {**USER, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", ["tokenize"]),
    (CHAT, {**USER, "chat_template": "x"}, "chat_template", ["not supported"]),
    ("/tokenize", {}, "prompt", ["prompt", "messages"]),
    ("/tokenize", {"prompt": "a", **USER}, "prompt", ["one of the two"]),
    ("/detokenize", {"tokens": [10**6]}, "tokens", ["tokens[0]", "1000000"]),
    ("/detokenize", {"tokens": "abc"}, "tokens", ["list of token ids", "a string"]),
]


@pytest.mark.parametrize(("path", "body", "param", "words"), BAD_VALUES, ids=lambda value: str(value)[:60])
def test_bad_values(http: httpx.Client, path: str, body: dict[str, Any], param: str, words: list[str]) -> None:
    streamed = {**body, "stream": True} if path in (GENERATE, CHAT) else body  # a refusal comes before a stream begins
    for sent in (body, streamed):
        response = http.post(path, json=sent)
        error = refusal(response, 400, "invalid_request_error")
        assert error["param"] == param
        for word in words:
            assert word in error["message"], error["message"]


def refusal(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"].startswith("application/json")
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == kind
    return dict(body["error"])


@pytest.mark.parametrize("raw", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_numbers_must_be_finite(http: httpx.Client, raw: bytes) -> None:
    content = b'{"prompt": "a", "temperature": %s}' % raw
    response = http.post(GENERATE, content=content, headers={"content-type": "application/json"})
    error = refusal(response, 400, "invalid_request_error")
    assert "temperature" in error["message"] or "JSON" in error["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"a"', b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "cut", "list", "text", "bytes", "deep"],
)
def test_a_body_that_is_no_object(http: httpx.Client, content: bytes) -> None:
    response = http.post(GENERATE, content=content, headers={"content-type": "application/json"})
    refusal(response, 400, "invalid_request_error")


def test_half_a_surrogate_pair(http: httpx.Client) -> None:
    """In a value or a key, whatever an error or a template would make of it."""
    for content in (
        rb'{"prompt": "a\ud800"}',
        rb'{"prompt": "a", "stop": ["\udfff"]}',
        rb'{"prompt": "a", "cache_salt": "\ud800"}',
        rb'{"prompt": "a", "\ud800": 1}',
        rb'{"prompt": "a", "rope": {"method": "\uD800"}}',
        rb'{"prompt": "a", "logit_bias": {"\ud800": 1}}',
        rb'{"prompt": "a", "json_schema": {"description": "\ud83d"}}',
    ):
        response = http.post(GENERATE, content=content, headers={"content-type": "application/json"})
        assert "surrogate" in refusal(response, 400, "invalid_request_error")["message"]


def test_a_prompt_that_does_not_fit(http: httpx.Client, max_model_len: int) -> None:
    response = http.post(GENERATE, json={"prompt": [1] * max_model_len})
    error = refusal(response, 400, "invalid_request_error")
    assert error["param"] == "prompt"
    assert error["code"] == "context_length_exceeded"
    assert f"{max_model_len} tokens" in error["message"]
    assert "MAX_MODEL_LEN" in error["message"]


def test_max_tokens_that_do_not_fit(http: httpx.Client, max_model_len: int) -> None:
    for path, extra in ((GENERATE, {}), (COMPLETIONS, {})):
        response = http.post(path, json={"prompt": [1] * 10, "max_tokens": max_model_len - 9, **extra})
        error = refusal(response, 400, "invalid_request_error")
        assert error["param"] == "max_tokens"
        for word in ("10 tokens", str(max_model_len - 9), str(max_model_len), "MAX_MODEL_LEN"):
            assert word in error["message"]


def test_over_long_text_is_refused_by_its_characters(http: httpx.Client) -> None:
    response = http.post(GENERATE, json={"prompt": "x" * 2_000_000})
    error = refusal(response, 400, "invalid_request_error")
    assert "2000000 characters" in error["message"]
    assert "MAX_MODEL_LEN" in error["message"]
    assert "xxx" not in error["message"]
    assert response.elapsed.total_seconds() < 2


def test_another_model(serve: Any, tiny_checkpoint: Path) -> None:
    """Once names are given; without any the only model takes all names."""
    url = serve(model_id=str(tiny_checkpoint), served_model_name="one, two", max_model_len=64)
    bodies: dict[str, dict[str, Any]] = {
        COMPLETIONS: {"prompt": "a"},
        CHAT: USER,
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [1]},
    }
    for path, body in bodies.items():
        response = httpx.post(url + path, json={**body, "model": "gpt-7"})
        error = refusal(response, 404, "not_found_error")
        assert (error["param"], error["code"]) == ("model", "model_not_found"), path
        assert "gpt-7" in error["message"]


def test_an_unknown_path_has_the_same_shape(http: httpx.Client) -> None:
    assert http.get("/v1/models/another").json()["error"]["code"] == "model_not_found"
    response = http.get("/nowhere")
    assert response.status_code == 404
    assert "error" in response.json()


def test_nulls_mean_the_default(http: httpx.Client) -> None:
    fields = ("temperature", "max_tokens", "stop", "seed", "rope", "logit_bias", "logprobs", "user", "suffix")
    response = http.post(COMPLETIONS, json={"prompt": "a", **dict.fromkeys(fields)})
    assert response.status_code == 200, response.text


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + within_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_full_queue(serve: Any, tiny_checkpoint: Path, stream: bool) -> None:
    """More choices than the queue takes beside what waits: 429 with Retry-After, and none of them is begun."""
    url = serve(model_id=str(tiny_checkpoint), max_num_seqs=1, max_queued_requests=8)
    engine = serve.running(url).service.engine
    forward = Faults(engine.engine).forward
    forward.hold()
    with httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(http.post, COMPLETIONS, json={"prompt": "a", "n": 4, "max_tokens": 2})
        assert eventually(lambda: len(engine._streams) == 4)
        response = http.post(COMPLETIONS, json={"prompt": "a", "n": 5, "max_tokens": 50, "stream": stream})
        error = refusal(response, 429, "rate_limit_error")
        assert "4 requests are waiting and 5 more would pass MAX_QUEUED_REQUESTS, 8" in error["message"]
        assert int(response.headers["retry-after"]) >= 1
        assert len(engine._streams) == 4
        forward.release()
        assert waiting.result().status_code == 200
        assert http.post(COMPLETIONS, json={"prompt": "a", "n": 5, "max_tokens": 2}).status_code == 200
        assert engine.stats().generation_tokens <= 9 * 2, "none of the refused choices ran"


def test_queued_tokens_are_limited_too(serve: Any, tiny_checkpoint: Path) -> None:
    url = serve(model_id=str(tiny_checkpoint), max_num_seqs=1, max_queued_tokens=200, max_model_len=512)
    response = httpx.post(f"{url}{COMPLETIONS}", json={"prompt": [[1] * 90] * 4, "max_tokens": 1})
    error = refusal(response, 400, "invalid_request_error")  # to wait would not help
    for word in ("4 sequences", "360 prompt tokens", "200 tokens", "MAX_QUEUED_TOKENS"):
        assert word in error["message"]
    alone = httpx.post(f"{url}{COMPLETIONS}", json={"prompt": [1] * 400, "max_tokens": 1}, timeout=60)
    assert alone.status_code == 200, "a prompt larger than the limit runs when nothing else waits"
