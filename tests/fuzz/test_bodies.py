"""Bodies that no document describes: what is valid, with something hostile in any of its places, to every dialect.

Halves of surrogate pairs as values and as keys, names that Python or a template engine knows, deep and wide values,
numbers of any size. Whatever is sent, the reply is no 5xx, and a refusal is an error with words.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.budget import budget

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c", "content": "1"}]
FEW = {"max_tokens": 2, "timeout_s": 20}

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"prompt": "Hi", **FEW, "stop": ["x"], "logit_bias": {"1": 1.0}, "rope": {"method": "rope"}}),
    ("/generate", {"prompt": [1, 2], **FEW, "json_schema": {"type": "object", "properties": {"a": {"enum": ["b"]}}}}),
    (
        "/generate",
        {"prompt": "Hi", **FEW, "documents": ["One.", "Two."], "document_prefix": "All:", "bad_words": ["a"]},
    ),
    ("/generate", {"inputs": "Hi", "parameters": {"max_new_tokens": 2, "stop": ["x"], "details": True}}),
    ("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 2, "stop": ["x"]}, "return_logprob": True}),
    ("/v1/completions", {"prompt": ["Hi", [1, 2]], "max_tokens": 2, "echo": True, "logprobs": 2, "n": 2}),
    ("/v1/chat/completions", {"messages": [USER], **FEW, "chat_template_kwargs": {"enable_thinking": True}}),
    ("/v1/chat/completions", {"messages": CALLED, **FEW, "tools": [TOOL], "tool_choice": "auto", "logprobs": True}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "max_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "string"}}},
        },
    ),
    ("/v1/responses", {"input": [USER], "max_output_tokens": 2, "instructions": "Be.", "metadata": {"a": "b"}}),
    (
        "/v1/responses",
        {"input": "Hi", "max_output_tokens": 2, "tools": [{"type": "function", "name": "f", "parameters": {}}]},
    ),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 2}),
    ("/v1/messages/count_tokens", {"messages": [USER], "system": "Be.", "tools": [{"name": "f", "input_schema": {}}]}),
    ("/api/chat", {"messages": [USER], "stream": False, "options": {"num_predict": 2, "stop": ["x"]}, "tools": [TOOL]}),
    ("/api/generate", {"prompt": "Hi", "stream": False, "options": {"num_predict": 2}, "format": {"type": "string"}}),
    ("/api/show", {"model": "m"}),
    ("/tokenize", {"messages": [USER], "return_token_strs": True, "add_generation_prompt": True}),
    ("/tokenize", {"prompt": "Hi", "return_token_strs": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/rope/map", {"length": 64, "rope": {"method": "yarn"}}),
]

NAMES = (
    *("self", "messages", "conversation", "tools", "documents", "chat_template", "tokenize", "kwargs", "return_dict"),
    *("add_generation_prompt", "continue_final_message", "range", "namespace", "loop", "raise_exception", "caller"),
    *("strftime_now", "bos_token", "eos_token", "__class__", "__globals__", "cls", "None", "class", "", " ", "a b"),
)

HALVES = st.sampled_from(["\ud800", "a\udfff", "\udc00\ud800", "😀\ud83d"])
NUMBERS = st.one_of(
    st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([10**400, -(2**63), 2**63, 1e308])
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20), HALVES, st.sampled_from(NAMES))


def deep(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


HOSTILE = st.one_of(
    LEAVES,
    st.lists(LEAVES, max_size=4),
    st.dictionaries(st.one_of(st.sampled_from(NAMES), HALVES, st.text(max_size=8)), LEAVES, max_size=3),
    st.builds(deep, st.sampled_from([5, 120, 900]), st.sampled_from(["list", "object"])),
    st.builds(lambda one, count: [one] * count, LEAVES, st.sampled_from([300, 20_000])),
    st.builds(lambda count: {f"k{i}": 1 for i in range(count)}, st.sampled_from([300, 20_000])),
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in it, and (container, None): for one more."""
    if isinstance(value, dict | list):
        yield value, None
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


@st.composite
def hostile_bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    path, body = draw(st.sampled_from(BODIES))
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(list(places(body))))
        value = draw(HOSTILE)
        if isinstance(container, list):
            container.insert(0, value) if key is None else container.__setitem__(key, value)
        elif key is None:
            container[draw(st.one_of(st.sampled_from(NAMES), HALVES))] = value
        elif draw(st.booleans()):
            container[key] = value
        else:
            container[draw(HALVES)] = container.pop(key)
    return path, json.dumps(body).encode()


@pytest.fixture(scope="module")
def http(serve_module: Any, tiny_checkpoint: Path) -> Iterator[httpx.Client]:
    url = serve_module(model_id=str(tiny_checkpoint), max_model_len=256)
    with httpx.Client(base_url=url, timeout=60, headers={"content-type": "application/json"}) as client:
        yield client


def check(response: httpx.Response) -> None:
    assert response.status_code < 500 or response.status_code == 504, response.text[:500]
    if response.status_code != 200:
        error = response.json()["error"]
        assert error if response.url.path.startswith("/api/") else error["message"]  # Ollama's clients read a sentence
        assert len(response.content) < 4096, "a refusal is no echo"


@given(hostile_bodies())
@budget(60)
def test_hostile_bodies(http: httpx.Client, hostile: tuple[str, bytes]) -> None:
    path, body = hostile
    check(http.post(path, content=body))


@given(st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=6)), HOSTILE, min_size=1, max_size=3))
@budget(20)
def test_variables_of_a_template(http: httpx.Client, variables: dict[str, Any]) -> None:
    """Of any name and value: the template may use them, its engine and Python not."""
    body = {"messages": [USER], "max_tokens": 1, "chat_template_kwargs": variables}
    check(http.post("/v1/chat/completions", content=json.dumps(body).encode()))
