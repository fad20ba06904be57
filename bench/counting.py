"""How many tokens a text has, to the server that will read it: from a local tokenizer, /tokenize, or a usage.

Synchronous: prompts are written between measurements, never during one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import httpx

from bench.client import Server, ServerUnusable
from bench.prompts import Counter

USAGE_TOLERANCE = 0.01  # of the prompt's length: an exact fit would cost a prefill for every count
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class TokenCounter:
    """Counts tokens. `source` says how, for the report; a prompt may be off by `tolerance` of its length."""

    count: Counter
    source: str
    tolerance: float = 0.0


def local_counter(folder: str) -> TokenCounter:
    """Counts with the tokenizer of a local model folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return TokenCounter(lambda text: len(tokenizer(text).input_ids), "the model folder's tokenizer")


def server_counter(server: Server) -> TokenCounter:
    """Counts with a connected server: its /tokenize if it has one, else the usage of a one-token completion.

    Raises:
        ServerUnusable: it has neither.
    """
    for field_name in ("prompt", "content"):  # vLLM's name and llama.cpp's
        if _tokenize(server, field_name, "One two three") is not None:
            return TokenCounter(partial(_expect, _tokenize, server, field_name), f"{server.name}'s /tokenize")
    if _usage(server, "One two three") is not None:
        return TokenCounter(partial(_expect, _usage, server), f"the usage {server.name} reports", USAGE_TOLERANCE)
    raise ServerUnusable(f"{server.name} has neither /tokenize nor a usage: give --tokenizer FOLDER")


def _expect(ask: Callable[..., int | None], server: Server, *arguments: str) -> int:
    """A server that counted once must go on counting."""
    count = ask(server, *arguments)
    if count is None:
        raise ServerUnusable(f"{server.name} stopped counting tokens")
    return count


def _tokenize(server: Server, field_name: str, text: str) -> int | None:
    body = {field_name: text, "add_special_tokens": True}
    if field_name == "content":
        body = {"content": text, "add_special": True}
    tokens = _post(server, f"{server.root}/tokenize", body).get("tokens")
    return len(tokens) if isinstance(tokens, list) and tokens else None


def _usage(server: Server, text: str) -> int | None:
    body = server.body(text, 1)
    body.pop("stream_options", None)  # belongs to streams only
    body["stream"] = False
    usage = _post(server, f"{server.url}/completions", body).get("usage")
    return int(usage["prompt_tokens"]) if isinstance(usage, dict) and "prompt_tokens" in usage else None


def _post(server: Server, url: str, body: dict[str, object]) -> dict[str, object]:
    try:
        reply = httpx.post(url, json=body, headers=server.headers, timeout=TIMEOUT_S)
        answer = reply.json() if reply.is_success else {}
    except (httpx.HTTPError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}
