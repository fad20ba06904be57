"""Bodies by which one client would hold up all others: small for what they ask, or many of what costs by its number.

Each maker takes the share of what fits into a body, 1 for all of it: what is sent costs as its number, to be refused or
answered without anybody's notice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

BODY_BYTES = 16 * 2**20
GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)
PANGRAM = "The quick brown fox jumps over the lazy dog, and then it rests. "
FUNCTION = '{"type":"function","name":"f%d","parameters":{"type":"object","properties":{"a":{},"b":{},"c":{}}}}'

Post = tuple[str, Any]
"""A path, and what is sent to it: JSON-able, or text as it is."""


def filled(head: str, item: str, share: float, tail: str = "]}") -> str:
    """As many items as go into this share of a body."""
    room = int(BODY_BYTES * share) - 64 - len(head) - len(tail)
    return head + ",".join([item] * (room // (len(item) + 1))) + tail


def doubling(letter: str) -> str:
    """A grammar whose reply is a million letters, in 250 characters."""
    rules = "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(20))
    return f'start: T0\n{rules}T20: "{letter}"\n'


def meeting(primes: Sequence[int]) -> dict[str, Any]:
    """A request for letters whose number is divisible by all of these: a lexer with as many states as their product."""
    letters = " & ".join(f"/({'a' * prime})*b/" for prime in primes)
    return {"prompt": "Hi", "grammar": f"start: A\nA: {letters}"}


HUGE_GRAMMAR = meeting(PRIMES)


def chat(content: Any) -> Post:
    return CHAT, {"messages": [{"role": "user", "content": content}], "max_tokens": 1}


def explosive_grammars(share: float) -> list[Post]:
    """By their number alone are there fewer: each is small, and as costly as it was."""
    grammars: list[dict[str, Any]] = [
        {"regex": ".?" * 32_000},
        {"json_schema": {"type": "integer", "multipleOf": 99999989}},
    ]
    grammars += [{"grammar": doubling(one)} for one in "abc"]
    bodies = [*({"prompt": "Hi", "max_tokens": 64, **grammar} for grammar in grammars), HUGE_GRAMMAR]
    return [(GENERATE, body) for body in bodies[: math.ceil(6 * share)]]


def many_messages(share: float) -> list[Post]:
    message = {"role": "user", "content": ""}
    return [(CHAT, {"messages": [message] * int(share * count), "max_tokens": 1}) for count in (100_000, 9_000)]


def many_items(share: float) -> list[Post]:
    """Of a conversation that Responses would repeat and keep, and tools that it would repeat."""
    message = '{"role":"user","content":""}'
    tools = ",".join(FUNCTION % i for i in range(int(share * 120_000)))
    return [
        ("/v1/responses", filled('{"max_output_tokens":1,"input":[', message, share)),
        ("/v1/responses", f'{{"max_output_tokens":1,"input":"Hi","tool_choice":"none","tools":[{tools}]}}'),
        ("/v1/messages/count_tokens", filled('{"messages":[', message, share)),
    ]


def many_values(share: float) -> list[Post]:
    """Where a list or an object is read item by item."""
    bias = ",".join(f'"{i}":1' for i in range(int(share * 100_000)))
    lists = {"bad_words": '"b"', "stop": '"b"', "documents": '"b"', "unknown": "{}"}
    return [
        (GENERATE, f'{{"prompt":"Hi","max_tokens":1,"logit_bias":{{{bias}}}}}'),
        *(
            (GENERATE, filled(f'{{"prompt":"Hi","max_tokens":1,"{name}":[', item, share))
            for name, item in lists.items()
        ),
        ("/api/show", filled('{"model":"m","options":[', "{}", share)),
        (COMPLETIONS, filled('{"max_tokens":1,"prompt":[', '"b"', share)),
    ]


def echoed_logprobs(share: float) -> list[Post]:
    prompt = [1000 + i % 40_000 for i in range(int(share * 20_000))]
    return [(COMPLETIONS, {"prompt": prompt, "echo": True, "logprobs": 20, "max_tokens": 1})]


def ordinary_prompt(share: float) -> list[Post]:
    text = PANGRAM * int(share * 1_720)
    return [("/tokenize", {"prompt": text}), chat(text)]


def slow_masks(share: float) -> list[Post]:
    """Each mask is slow; of a part of a request there is one."""
    body = {"prompt": "Hi", "regex": "a" * 60_000, "max_tokens": 1 if share < 1 / 32 else 4, "temperature": 0}
    return [(GENERATE, body)] * max(1, int(share * 32))


HOSTILE: dict[str, Callable[[float], list[Post]]] = {
    "explosive grammars": explosive_grammars,
    "slow masks": slow_masks,
    "empty messages": lambda share: [(CHAT, filled('{"messages":[', "{}", share))],
    "many messages": many_messages,
    "empty parts": lambda share: [chat([{"type": "text", "text": ""}] * int(share * 400_000))],
    "nested prompts": lambda share: [(path, filled('{"prompt":[', "[]", share)) for path in (GENERATE, COMPLETIONS)],
    "emoji": lambda share: [("/tokenize", {"prompt": "😀" * int(share * 250_000)})],
    "digits": lambda share: [chat("1234567890" * int(share * 260_000))],
    "many ids": lambda share: [("/detokenize", filled('{"tokens":[', "33", share))],
    "an ordinary long prompt": ordinary_prompt,
    "echoed logprobs": echoed_logprobs,
    "many items": many_items,
    "many values": many_values,
}
"""Name → what is sent, all at once, of a share of a body."""


def encoded(body: Any) -> bytes:
    return body.encode() if isinstance(body, str) else json.dumps(body).encode()
