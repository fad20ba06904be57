"""Server-sent events: an async iterator of JSON-able events as a response.

    data: {json}          one for each event
    : keep-alive          a comment every few seconds, so that no proxy cuts a silent stream
    event: error          if the source raises once the stream has begun; then the stream ends
    data: {"error": …}
    data: [DONE]          at the end, unless there was an error

Where events are `named`, as Anthropic's and Responses' are, `event: TYPE` stands before each, and no [DONE] at the end.

The source is closed when the client goes away; closing it must abort what it reads.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import structlog
from prerope.server.api.errors import error_body, internal_error
from prerope.server.api.stream.printing import printed
from prerope.server.errors import RequestError
from prerope.server.log import trace
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus

log = structlog.get_logger(__name__)

KEEP_ALIVE_S = 5
SEPARATOR = "\n"
LINE_ENDS = "\u0085\u2028\u2029"

# By default it cuts streams at a signal; here they may finish (`server.http.server`).
AppStatus.enable_automatic_graceful_drain = False


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
