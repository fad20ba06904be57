"""Bodies by which one client would hold up all others: small for what they ask, or many of what costs by its number."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

BODY_BYTES = 16 * 2**20
GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"

Post = tuple[str, Any]
"""A path, and what is sent to it: JSON-able, or text as it is."""

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)


def filled(head: str, item: str, tail: str, num_bytes: int = BODY_BYTES - 64) -> str:
    """As many items as go into a body."""
    return head + ",".join([item] * ((num_bytes - len(head) - len(tail)) // (len(item) + 1))) + tail


def doubling(letter: str) -> str:
    """A grammar whose reply is a million letters, in 250 characters."""
    rules = "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(20))
    return f'start: T0\n{rules}T20: "{letter}"\n'


def meeting(primes: Sequence[int]) -> dict[str, Any]:
    """A request for letters whose number is divisible by all of these: a lexer with as many states as their product."""
    letters = " & ".join(f"/({'a' * prime})*b/" for prime in primes)
    return {"prompt": "Hi", "grammar": f"start: A\nA: {letters}"}


HUGE_GRAMMAR = meeting(PRIMES)


def chat(content: Any, **more: Any) -> Post:
    return CHAT, {"messages": [{"role": "user", "content": content}], "max_tokens": 1, **more}


def explosive_grammars() -> list[Post]:
    schema = {"type": "integer", "multipleOf": 99999989}
    grammars: list[dict[str, Any]] = [
        {"json_schema": schema},
        {"regex": ".?" * 32_000},
        *({"grammar": doubling(one)} for one in "abc"),
    ]
    return [(GENERATE, HUGE_GRAMMAR), *((GENERATE, {"prompt": "Hi", **grammar}) for grammar in grammars)]


def slow_masks() -> list[Post]:
    return [(GENERATE, {"prompt": "Hi", "regex": "a" * 60_000, "max_tokens": 4, "temperature": 0})] * 32


def many_messages() -> list[Post]:
    message = {"role": "user", "content": ""}
    return [(CHAT, {"messages": [message] * count, "max_tokens": 1}) for count in (100_000, 9_000)]


def ordinary_prompt() -> list[Post]:
    text = "The quick brown fox jumps over the lazy dog, and then it rests. " * 1_720
    return [("/tokenize", {"prompt": text}), chat(text)]


def echoed_logprobs(num_tokens: int = 20_000) -> list[Post]:
    prompt = [1000 + i % 40_000 for i in range(num_tokens)]
    return [(COMPLETIONS, {"prompt": prompt, "echo": True, "logprobs": 20, "max_tokens": 1})]


def many_items() -> list[Post]:
    """Of a conversation that Responses would repeat and keep, and tools that it would repeat."""
    message = '{"role":"user","content":""}'
    tool = '{"type":"function","name":"f%d","parameters":{"type":"object","properties":{"a":{},"b":{},"c":{}}}}'
    tools = ",".join(tool % i for i in range(120_000))
    return [
        ("/v1/responses", filled('{"max_output_tokens":1,"input":[', message, "]}")),
        ("/v1/responses", f'{{"max_output_tokens":1,"input":"Hi","tool_choice":"none","tools":[{tools}]}}'),
        ("/v1/messages/count_tokens", filled('{"messages":[', message, "]}")),
    ]


def many_values() -> list[Post]:
    """Where a list or an object is read item by item."""
    bias = ",".join(f'"{i}":1' for i in range(100_000))
    return [
        (GENERATE, f'{{"prompt":"Hi","max_tokens":1,"logit_bias":{{{bias}}}}}'),
        (GENERATE, filled('{"prompt":"Hi","max_tokens":1,"bad_words":[', '"b"', "]}")),
        (GENERATE, filled('{"prompt":"Hi","max_tokens":1,"stop":[', '"b"', "]}")),
        (GENERATE, filled('{"prompt":"Hi","max_tokens":1,"documents":[', '"b"', "]}")),
        (GENERATE, filled('{"prompt":"Hi","max_tokens":1,"unknown":[', "{}", "]}")),
        ("/api/show", filled('{"model":"m","options":[', "{}", "]}")),
        (COMPLETIONS, filled('{"max_tokens":1,"prompt":[', '"b"', "]}")),
    ]


HOSTILE: dict[str, Callable[[], list[Post]]] = {
    "explosive grammars": explosive_grammars,
    "slow masks": slow_masks,
    "empty messages": lambda: [(CHAT, filled('{"messages":[', "{}", "]}"))],
    "many messages": many_messages,
    "empty parts": lambda: [chat([{"type": "text", "text": ""}] * 400_000)],
    "nested prompts": lambda: [(path, filled('{"prompt":[', "[]", "]}")) for path in (GENERATE, COMPLETIONS)],
    "emoji": lambda: [("/tokenize", {"prompt": "😀" * 250_000})],
    "digits": lambda: [chat("1234567890" * 260_000)],
    "many ids": lambda: [("/detokenize", filled('{"tokens":[', "33", "]}"))],
    "an ordinary long prompt": ordinary_prompt,
    "echoed logprobs": echoed_logprobs,
    "many items": many_items,
    "many values": many_values,
}
"""Name → what is sent, all at once."""


def encoded(body: Any) -> bytes:
    return body.encode() if isinstance(body, str) else json.dumps(body).encode()
