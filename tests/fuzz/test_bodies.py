"""Bodies that no document describes: what is valid, with something hostile in any of its places, to every dialect.

Halves of surrogate pairs as values and as keys, names that Python or a template engine knows, deep and wide values,
numbers of any size; and deep and wide ones in every field of the document that holds a list or an object. Whatever is
sent, the reply is no 5xx, and a refusal is an error with words.
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
from prerope.server.api.dialects.lowering.anthropic import CountTokensRequest, MessagesRequest
from prerope.server.api.dialects.lowering.ollama import OllamaChatRequest, OllamaGenerateRequest, ShowRequest
from prerope.server.api.dialects.lowering.others import TgiRequest
from prerope.server.api.dialects.lowering.responses import ResponsesRequest
from prerope.server.api.openai.schemas import ChatRequest, CompletionRequest
from prerope.server.api.requests.body import RequestBody
from prerope.server.api.requests.schemas import GenerateRequest, MapRequest
from prerope.server.api.requests.tokenize import DetokenizeRequest, TokenizeRequest
from pydantic import TypeAdapter

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


# --- every field that holds a list or an object -----------------------------------------------------------------------

DEPTH = 4
"""Of fields within fields; of what holds itself there is no end."""

Place = tuple[str, ...]
"""Names from a body's root on; a list is passed through by its first item, "[]"."""
Schema = dict[str, Any]


def choices_of(schema: Schema, root: Schema) -> Iterator[Schema]:
    """The schemas that one stands for: its reference, or those of which it may be any."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    parts = [part for word in ("anyOf", "oneOf", "allOf") for part in schema.get(word, ())]
    yield from (one for part in parts for one in choices_of(part, root))
    if not parts:
        yield schema


def holders(schema: Schema, root: Schema, place: Place = ()) -> Iterator[Place]:
    """Where a body may hold a list or an object."""
    for one in choices_of(schema, root):
        if place and one.get("type") in ("array", "object", None):  # None: anything
            yield place
        if len(place) < DEPTH:
            items = one.get("items")
            yield from holders(items, root, (*place, "[]")) if items else ()
            for name, of_field in one.get("properties", {}).items():
                yield from holders(of_field, root, (*place, name))


MODELS: dict[str, type[RequestBody]] = {
    **dict.fromkeys(("/v1/completions", "/v1/completions/render"), CompletionRequest),
    **dict.fromkeys(("/v1/chat/completions", "/v1/chat/completions/render"), ChatRequest),
    **dict.fromkeys(("/v1/responses", "/v1/responses/render", "/v1/responses/input_tokens"), ResponsesRequest),
    **dict.fromkeys(("/v1/messages", "/v1/messages/render"), MessagesRequest),
    **dict.fromkeys(("/generate_stream", "/"), TgiRequest),
    "/generate": GenerateRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/rope/map": MapRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/api/chat": OllamaChatRequest,
    "/api/generate": OllamaGenerateRequest,
    "/api/show": ShowRequest,
}
SCHEMAS = {path: TypeAdapter(model).json_schema() for path, model in MODELS.items()}
FIELDS = [(path, place) for path, root in SCHEMAS.items() for place in dict.fromkeys(holders(root, root))]

ITEMS = st.one_of(
    LEAVES,
    st.sampled_from([[], {}, [[]], USER, TOOL, CALL, {"type": "text", "text": "a"}, {"type": "function", "name": "f"}]),
    st.dictionaries(st.sampled_from(("type", "role", "content", "text", "name", "function", "id")), LEAVES, max_size=3),
)
NESTS = (("[", "]"), ('{"a":', "}"), ('[{"content":', "}]"), ('{"properties":{"a":', "}}"))


def nested(one: Any, nest: tuple[str, str], depth: int) -> str:
    return nest[0] * depth + json.dumps(one) + nest[1] * depth


DEEP_OR_WIDE = st.one_of(
    st.builds(nested, ITEMS, st.sampled_from(NESTS), st.sampled_from([2, 60, 120, 900, 20_000])),
    st.builds(lambda one, count: json.dumps([one] * count), ITEMS, st.sampled_from([2, 300, 20_000])),
    st.builds(lambda one, count: json.dumps({f"k{i}": one for i in range(count)}), ITEMS, st.sampled_from([2, 20_000])),
    st.builds(lambda one, width: json.dumps([[one] * width] * width), ITEMS, st.sampled_from([20, 150])),
)
"""As JSON: Python's own writer ends with the interpreter's stack."""
MARK = "the place of a field's value"


def put(body: dict[str, Any], place: Place, value: Any) -> None:
    """Into this place of a body, whose lists and objects on the way there are made where there are none."""
    here: Any = body
    for name, following in zip(place, (*place[1:], None), strict=True):
        key = 0 if name == "[]" else name
        if isinstance(here, list) and not here:
            here.append(None)
        if following is None:
            here[key] = value
        elif not isinstance(
            here[key] if isinstance(here, list) else here.get(key), list if following == "[]" else dict
        ):
            here[key] = [] if following == "[]" else {}
        here = here[key]


@given(st.sampled_from(FIELDS), DEEP_OR_WIDE, st.integers(0, 7))
@budget(60)
def test_deep_and_wide_fields(http: httpx.Client, field: tuple[str, Place], value: str, base: int) -> None:
    path, place = field
    bases = [body for at, body in BODIES if at == path] or [{}]
    body = copy.deepcopy(bases[base % len(bases)])
    put(body, place, MARK)
    check(http.post(path, content=json.dumps(body).replace(json.dumps(MARK), value).encode()))


def test_fields_are_of_every_endpoint_with_a_body() -> None:
    assert {path for path, _ in FIELDS} == SCHEMAS.keys() >= {path for path, _ in BODIES}
    for place in (("messages", "[]", "content"), ("tools",), ("stop",), ("logit_bias",)):
        assert ("/v1/chat/completions", place) in FIELDS
    assert ("/api/chat", ("options", "stop")) in FIELDS
