"""schemathesis over the served OpenAPI document: every operation, valid and invalid data, and the edges of each field.

Whatever is sent, the reply has a documented status, content type, headers and body, and is no 5xx; what the document
forbids is refused. What it allows may still be refused with a 400 where the limit depends on the model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from prerope.server.api.openapi.document import OPERATIONS
from prerope.server.app import create_app
from prerope.server.settings import Settings
from schemathesis.config import SchemathesisConfig

from tests.fuzz.budget import budget

MAX_MODEL_LEN = 128
CONFIG: dict[str, Any] = {
    "seed": 1,
    "request-timeout": 30,
    "checks": {
        "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "504"]},  # a request may ask for no time at all
        "positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404", "504"]},
        "negative_data_rejection": {"expected-statuses": ["400", "404", "405"]},
    },
}
SMALL = {"n": 2, "best_of": 2, "max_tokens": 8, "max_completion_tokens": 8, "min_tokens": 8}
AT_ODDS = (
    *(
        "model",
        "best_of",
        "min_tokens",
        "max_completion_tokens",
        "stream_options",
        "top_logprobs",
        "logit_bias",
        "rope",
    ),
    *("timeout_s", "regex", "choice", "grammar", "json_schema", "response_format", "structured_outputs", "tools"),
    *("tool_choice", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "chat_template_kwargs"),
)
"""Fields whose valid values are often refused beside one another, or by this model."""

ANSWERED: Counter[str] = Counter()
"""Operation → replies with status 200."""


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path) -> str:
    return str(serve_module(model_id=str(tiny_checkpoint), max_model_len=MAX_MODEL_LEN))


DOCUMENT = create_app(Settings()).openapi()  # needs no model; each operation is a test of its own
api = schemathesis.openapi.from_dict(DOCUMENT, config=SchemathesisConfig.from_dict(CONFIG))
no_edges = schemathesis.openapi.from_dict(
    DOCUMENT, config=SchemathesisConfig.from_dict({**CONFIG, "phases": {"coverage": {"enabled": False}}})
)
LARGE = (
    *("/generate", "/v1/chat/completions", "/v1/chat/completions/render", "/v1/completions", "/v1/completions/render"),
    *("/tokenize", "/detokenize"),
)
"""Bodies whose edges are slow, a thousand cases and more: test_openapi_slow.py. What they allow is tried here."""


def answers_as_documented(case: Any, url: str) -> None:
    settle(case)
    response = case.call(base_url=url)
    case.validate_response(response)
    if response.status_code == 200:
        ANSWERED[case.operation.label] += 1
    if is_stream(response):
        assert response.text.endswith("data: [DONE]\n\n") or "event: error" in response.text


def name_of(method: str, path: str) -> str:
    return f"test_{method}{re.sub(r'[^a-z0-9]+', '_', path)}"


def operation_test(method: str, path: str, schema: Any, max_examples: int) -> Any:
    """All phases of one operation, under a name of its own: items of one name would be run once by xdist."""

    @schema.include(method=method.upper(), path=path).parametrize()
    @budget(max_examples)
    def test(case: Any, url: str) -> None:
        answers_as_documented(case, url)

    return test


for _path, _item in DOCUMENT["paths"].items():
    for _method in _item:
        _name = name_of(_method, _path)
        _how = (no_edges, 30) if _path in LARGE else (api, 10)
        globals()[_name] = operation_test(_method, _path, *_how)


def is_stream(response: Any) -> bool:
    return "text/event-stream" in response.headers.get("content-type", [""])[0]


def settle(case: Any) -> None:
    """A valid request becomes a small one, and every other such one that this model can answer."""
    body = case.body
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if case.path_parameters and len(str(case.path_parameters)) % 2:
        case.path_parameters = {"model": "tiny-llama"}
    if not isinstance(body, dict):
        return
    if case.path == "/tokenize" and not body.keys() & {"prompt", "messages"}:
        body["prompt"] = "said"  # which of the two, no document says
    if OPERATIONS[case.path].events:
        body["max_tokens"] = SMALL["max_tokens"] if body.get("max_tokens") is None else body["max_tokens"]
    for name, limit in SMALL.items():
        if isinstance(body.get(name), int):
            body[name] = min(body[name], limit)
    if isinstance(body.get("prompt"), list):
        body["prompt"] = [small(one) for one in body["prompt"][:3]]
    if len(json.dumps(body)) % 2:
        return
    for name in ("prompt", "tokens", "stop_token_ids"):
        body[name] = small(body[name]) if name in body else None
    messages = body.get("messages") if LARGE.count(case.path) else None  # elsewhere they may be empty, and no more
    for message in filter(lambda one: isinstance(one, dict), messages if isinstance(messages, list) else ()):
        for name in ("tool_calls", "tool_call_id"):
            message.pop(name, None)
        message["role"] = "user" if message.get("role") == "tool" else message.get("role")
        if not isinstance(message.get("content"), str):
            message["content"] = "said"
    for name in AT_ODDS:
        body.pop(name, None)
    case.body = {name: value for name, value in body.items() if value is not None}


def small(value: Any) -> Any:
    """Token ids of any vocabulary, and few."""
    if isinstance(value, list):
        return [small(one) for one in value[:8]]
    return value % 1000 if isinstance(value, int) and not isinstance(value, bool) else value


def test_every_operation_was_answered() -> None:
    """Refusals alone would show little. (It follows the tests above.)"""
    labels = {f"{method.upper()} {path}" for path, item in DOCUMENT["paths"].items() for method in item}
    assert labels <= ANSWERED.keys() or not ANSWERED


def test_every_operation_is_described(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    assert document == json.loads(json.dumps(DOCUMENT))
    assert document["paths"].keys() == OPERATIONS.keys()
    for path, item in document["paths"].items():
        for operation in item.values():
            replies = operation["responses"]
            assert replies["200"]["content"], path
            assert "422" not in replies
            assert "500" in replies
            assert ("413" in replies) == ("requestBody" in operation)
            assert "401" not in replies
    assert "ValidationError" not in json.dumps(document)


def test_keys_are_declared_where_they_are_asked_for(serve: Any, tiny_checkpoint: Path) -> None:
    url = serve(model_id=str(tiny_checkpoint), api_key="a-key", max_model_len=MAX_MODEL_LEN)
    document = httpx.get(f"{url}/openapi.json").json()
    for path, item in document["paths"].items():
        for method, operation in item.items():
            refused = httpx.request(method, url + path.format(model="x")).status_code == 401
            assert refused == ("401" in operation["responses"]) == ("security" in operation), path
