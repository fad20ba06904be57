"""JSON of any size, printed on the event loop without holding it: long lists a slice at a time.

    {"text": "…", "logprobs": Many(entry(token) for token in tokens)}

A `Many` stands for a list in what is printed. Its items are made and printed one by one, in slices that take turns with
all others' (`server.workers.slices`), so that nobody waits for somebody's hundred thousand log-probabilities.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Iterable, Sequence
from itertools import chain, islice
from typing import Any

from fastapi import Response
from prerope.server.api.requests.body import Verbatim
from prerope.server.workers.slices import turn

FEW = 32
"""Items that are printed where they are met."""

HOW: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
ENCODER = json.JSONEncoder(**HOW)


class Many:
    """A list to be printed, of items that may yet have to be made. Printed once."""

    def __init__(self, items: Iterable[Any], length: int, at_once: int = 1) -> None:
        """length: of `items`. at_once: how many are printed between two looks at the clock."""
        self.items = items
        self.length = length
        self.at_once = at_once

    @classmethod
    def ids(cls, token_ids: Sequence[int]) -> Many:
        """A list of token ids, a thousand of which are printed in the time of one log-probability."""
        return cls(token_ids, len(token_ids), at_once=4096)

    def __add__(self, other: Many) -> Many:
        return Many(chain(self.items, other.items), self.length + other.length, self.at_once)


async def printed(value: Any) -> str:
    """The value as JSON, byte for byte as `starlette.responses.JSONResponse` writes it."""
    mark, found = secrets.token_hex(16), list[Many | Verbatim]()

    def kept_for_later(inner: object) -> Any:
        if not isinstance(inner, Many | Verbatim):
            raise TypeError(f"{type(inner).__name__} is no JSON")
        if isinstance(inner, Many) and inner.length <= max(FEW, inner.at_once):
            return list(inner.items)
        found.append(inner)
        return mark

    text = json.JSONEncoder(**HOW, default=kept_for_later).encode(value)
    if not found:
        return text
    pieces = text.split(f'"{mark}"')
    written = [pieces[0]]
    for inner, piece in zip(found, pieces[1:], strict=True):
        if isinstance(inner, Verbatim):
            written += [inner.text, piece]
        else:
            written += ["[", ",".join([batch async for batch in _batches(inner)]), "]", piece]
    return "".join(written)


async def json_response(value: Any) -> Response:
    """`value` as a reply."""
    return Response((await printed(value)).encode(), media_type="application/json")


async def _batches(many: Many) -> AsyncGenerator[str]:
    """The items' text, separated by commas, some at a time."""
    rest, whole = iter(many.items), False
    while not whole:
        batch: list[str] = []
        async with turn() as left:
            while not whole and left():
                items = list(islice(rest, many.at_once))
                whole = len(items) < many.at_once
                if items:
                    batch.append(ENCODER.encode(items)[1:-1])
        if batch:
            yield ",".join(batch)
