"""One HTTP request on its way from the entrance to a replica: pickled, whole, and with what the router goes by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

PASSED_ON = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path"),
    *("root_path", "query_string", "headers", "client", "server"),
)
PROMPT_CHARS = 2**16
"""The router keeps and compares so much of a body; what differs only behind it goes to the same replica."""

PROMPT = re.compile(rb'"(?:system|instructions|messages|prompt|inputs?)"\s*:')
"""The field with which a prompt begins, in any dialect. Within a string, a quotation mark has a backslash."""


@dataclass(frozen=True, slots=True)
class Call:
    """prompt: for Ray's router, which takes it from the first argument of this name and may not get an empty one."""

    scope: dict[str, Any]
    body: bytes
    prompt: str

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> Call:
        """A request whose body has been read."""
        return cls({name: scope[name] for name in PASSED_ON if name in scope}, body, _prompt(body) or scope["path"])


def _prompt(body: bytes) -> str:
    """The body from its prompt on, as it came: no turn of a conversation changes what the turns before it were."""
    found = PROMPT.search(body)
    begin = found.start() if found else len(body)
    return body[begin : begin + PROMPT_CHARS].decode("utf-8", "replace")
