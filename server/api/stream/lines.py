"""JSON lines (NDJSON), as Ollama streams: one object a line, and a last one with `error` where something fails."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import structlog
from fastapi.responses import StreamingResponse
from prerope.server.errors import RequestError
from prerope.server.log import trace

log = structlog.get_logger(__name__)


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
