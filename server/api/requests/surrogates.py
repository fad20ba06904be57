"""Halves of surrogate pairs, which JSON can escape and UTF-8 cannot carry: refused once, where JSON is decoded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from prerope.server.errors import InvalidRequest

ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""No body without it has any: raw bytes of surrogates are not valid UTF-8."""

MAX_PATH_CHARS = 100

Step = str | int
"""A key or an index."""


def refuse_surrogates(value: Any) -> None:
    """InvalidRequest, by the place in the body, for text that is not valid Unicode: a key or a value, however deep."""
    if _is_unicode(value):
        return
    for steps, text, of_key in _texts(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _refusal(steps, error.start, of_key=of_key) from None


def _is_unicode(value: Any) -> bool:
    """Quickly; False where it cannot tell."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _texts(value: Any) -> Iterator[tuple[Sequence[Step], str, bool]]:
    """The steps to each text, the text, and whether it is a key. What is remembered grows with the depth alone."""
    steps: list[Step] = [""]
    held: list[Iterator[tuple[Step, Any]]] = [iter([("", value)])]
    while held:
        for step, one in held[-1]:
            if isinstance(step, str):
                yield steps[1:-1], step, True
            steps[-1] = step
            if isinstance(one, str):
                yield steps[1:], one, False
            elif isinstance(one, dict | list):
                held.append(iter(one.items()) if isinstance(one, dict) else enumerate(one))
                steps.append("")
                break
        else:
            held.pop()
            steps.pop()


def _refusal(steps: Sequence[Step], position: int, *, of_key: bool) -> InvalidRequest:
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps[:MAX_PATH_CHARS])
    path = path.removeprefix(".") or "body"
    shown = path if len(path) <= MAX_PATH_CHARS else path[:MAX_PATH_CHARS] + "…"
    where = f"a key of '{shown}'" if of_key else f"'{shown}'"
    return InvalidRequest(
        f"{where} holds half a surrogate pair at character {position}: it is not valid Unicode",
        param=None if of_key else shown,
        code="invalid_unicode",
    )
