"""Requests that a server must refuse: each kind of 4xx, with the status that it must get.

A full queue is not among them: it takes several clients (`bench.soak_plan.CROWD`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.soak_plan import CHAT, COMPLETIONS, GENERATE, Task

LONG_TEXT_CHARS = 6_000_000
IMPOSSIBLE_BYTES = 10**12


def bad_tasks(max_model_len: int, *, keyed: bool) -> list[Task]:
    """All of them. `keyed`: the server asks for an API key."""
    tasks = [*_bad_json(), *_bad_values(max_model_len), *_bad_openai(), *_bad_addresses()]
    if keyed:
        hello = {"prompt": "Hello", "max_tokens": 1}
        tasks += [
            _bad("no key", GENERATE, hello, 401, key=False),
            _bad("wrong key", COMPLETIONS, hello, 401, key="not-the-key"),
        ]
    return tasks


def _bad(detail: str, path: str, body: Mapping[str, Any] | bytes, status: int = 400, **more: Any) -> Task:
    return Task("bad", path, body, frozenset({status}), detail=detail, **more)


def _bad_json() -> list[Task]:
    return [
        _bad("broken JSON", GENERATE, b'{"prompt": "Hel'),
        _bad("empty body", GENERATE, b""),
        _bad("no object", COMPLETIONS, b"[1, 2]"),
        _bad("half a surrogate pair", GENERATE, b'{"prompt": "\\ud83d"}'),
        _bad("not UTF-8", GENERATE, b'{"prompt": "\xff\xfe"}'),
    ]


def _bad_values(max_model_len: int) -> list[Task]:
    return [
        _bad("unknown field", GENERATE, {"prompt": "Hello", "max_token": 4}),
        _bad("wrong type", GENERATE, {"prompt": "Hello", "max_tokens": "many"}),
        _bad("out of range", GENERATE, {"prompt": "Hello", "temperature": -1}),
        _bad("empty prompt", GENERATE, {"prompt": ""}),
        _bad("no such token", GENERATE, {"prompt": [1, 2**31]}),
        _bad("too many tokens", GENERATE, {"prompt": [7] * (max_model_len + 1), "stream": True}),
        _bad("too many characters", GENERATE, {"prompt": "x" * LONG_TEXT_CHARS}),
        _bad("too long with its output", GENERATE, {"prompt": "Hello", "max_tokens": max_model_len}),
        _bad("no such method", GENERATE, {"prompt": "Hello", "rope": {"method": "roap"}}),
        _bad("too many stop strings", GENERATE, {"prompt": "Hello", "stop": ["x"] * 100}),
    ]


def _bad_openai() -> list[Task]:
    return [
        _bad("stream options without a stream", COMPLETIONS, {"prompt": "Hello", "stream_options": {}}),
        _bad("unsupported field", COMPLETIONS, {"prompt": "Hello", "suffix": "!"}),
        _bad("no messages", CHAT, {"messages": []}),
        _bad("no such role", CHAT, {"messages": [{"role": "nobody", "content": "Hello"}]}),
        _bad("nothing to tokenise", "/tokenize", {}),
        _bad("no such token to detokenise", "/detokenize", {"tokens": [-1]}),
        _bad("no such model", COMPLETIONS, {"prompt": "Hello", "model": "no-such-model"}, 404),
    ]


def _bad_addresses() -> list[Task]:
    return [
        _bad("no such route", "/v1/engines", {}, 404),
        _bad("wrong method", GENERATE, b"", 405, method="GET"),
        _bad("body too large", GENERATE, b"{", 413, declared_bytes=IMPOSSIBLE_BYTES),
    ]
