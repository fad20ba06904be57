"""Halves of surrogate pairs, which JSON can escape and UTF-8 cannot carry: refused once, where JSON is decoded."""

from __future__ import annotations

import re
from typing import Any

from prerope.server.errors import InvalidRequest

ESCAPED = re.compile(rb"\\u[dD][89a-fA-F]")
"""No body without it has any: raw bytes of surrogates are not valid UTF-8."""

MAX_PATH_CHARS = 100


def refuse_surrogates(raw: bytes, value: Any) -> None:
    """InvalidRequest, by the place in the body, for text that is not valid Unicode: a key or a value, however deep."""
    if ESCAPED.search(raw) is None:
        return
    left: list[tuple[str, Any]] = [("", value)]
    while left:
        path, one = left.pop()
        if isinstance(one, str):
            _check(one, path)
        elif isinstance(one, dict):
            for key, inner in one.items():
                _check(key, path or "body", of_key=True)
                left.append((f"{path}.{key}" if path else key, inner))
        elif isinstance(one, list):
            left += [(f"{path}[{index}]", inner) for index, inner in enumerate(one)]


def _check(text: str, path: str, *, of_key: bool = False) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = path if len(path) <= MAX_PATH_CHARS else path[:MAX_PATH_CHARS] + "…"
        where = f"a key of '{shown}'" if of_key else f"'{shown}'"
        raise InvalidRequest(
            f"{where} holds half a surrogate pair at character {error.start}: it is not valid Unicode",
            param=None if of_key else shown,
            code="invalid_unicode",
        ) from None
