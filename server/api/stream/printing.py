"""How a reply is written: as JSON of any size, as server-sent events, or as JSON lines.

    {"text": "…", "logprobs": Many(entry(token) for token in tokens)}

A `Many` stands for a list in what is printed. Its items are made and printed one by one, in slices that take turns with
all others' (`server.api.fairness`), so that nobody waits for somebody's hundred thousand log-probabilities.

    data: {json}          one for each event
    : keep-alive          a comment every few seconds, so that no proxy cuts a silent stream
    event: error          if the source raises once the stream has begun; then the stream ends
    data: {"error": …}
    data: [DONE]          at the end, unless there was an error

Where events are `named`, as Anthropic's and Responses' are, `event: TYPE` stands before each, and no [DONE] at the end.
JSON lines (NDJSON) are what Ollama streams: one object a line, and a last one with `error` where something fails. The
source of a stream is closed when the client goes away; closing it must abort what it reads.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from itertools import chain, islice
from typing import Any

import structlog
from fastapi import Response
from fastapi.responses import StreamingResponse
from prerope.server.api.errors import error_body, internal_error
from prerope.server.api.fairness import turn
from prerope.server.api.requests.body import Verbatim
from prerope.server.errors import RequestError
from prerope.server.log import trace
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus

log = structlog.get_logger(__name__)

FEW = 32
"""Items that are printed where they are met."""

HOW: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
ENCODER = json.JSONEncoder(**HOW)

KEEP_ALIVE_S = 5
SEPARATOR = "\n"
LINE_ENDS = "\u0085\u2028\u2029"

# By default it cuts streams at a signal; here they may finish (`server.http.server`).
AppStatus.enable_automatic_graceful_drain = False


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


def event_stream(source: AsyncGenerator[Any, None], *, named: bool = False) -> EventSourceResponse:
    """`source` as a response. Refusals must be raised before this is called: here the status is already 200."""
    return EventSourceResponse(
        _frames(source, named=named),
        ping=KEEP_ALIVE_S,
        sep=SEPARATOR,
        ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep=SEPARATOR),
    )


async def _frames(source: AsyncGenerator[Any, None], *, named: bool = False) -> AsyncGenerator[bytes, None]:
    async with aclosing(source):
        try:
            async for event in source:
                name = f"event: {event['type']}\n".encode() if named else b""
                yield name + b"data: " + _encoded(await printed(event)) + b"\n\n"
        except RequestError as error:
            log.warning("stream failed", status=error.status, code=error.code)
            yield _error_frame(error)
            return
        except Exception as error:
            log.error("stream failed", trace=trace(error))
            yield _error_frame(internal_error())
            return
        if not named:
            yield b"data: [DONE]\n\n"


def _error_frame(error: RequestError) -> bytes:
    return (
        b"event: error\ndata: "
        + _encoded(json.dumps({"type": "error", **error_body(error)}, separators=(",", ":")))
        + b"\n\n"
    )


def _encoded(text: str) -> bytes:
    """JSON as bytes of one line: many clients split lines at Unicode's line ends too, which JSON does not escape."""
    for end in LINE_ENDS:
        text = text.replace(end, f"\\u{ord(end):04x}")
    return text.encode()


def line_stream(source: AsyncGenerator[Any, None]) -> StreamingResponse:
    """`source` as a response. Refusals must be raised before this is called: here the status is already 200."""
    return StreamingResponse(_lines(source), media_type="application/x-ndjson")


async def _lines(source: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(source):
        try:
            async for event in source:
                yield json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        except RequestError as error:
            log.warning("stream failed", status=error.status, code=error.code)
            yield json.dumps({"error": str(error)}).encode() + b"\n"
        except Exception as error:
            log.error("stream failed", trace=trace(error))
            yield b'{"error":"internal error"}\n'
