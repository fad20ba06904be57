"""Connections that are not served: a 503 where there is no room, a 4xx where what came cannot be read as HTTP.

Each is told why and left open until its client has read that, or had the time to: closed with what it sent unread, a
connection is reset, and the reply is lost with it.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
import structlog
from prerope.server.api.errors import error_body
from prerope.server.errors import (
    HeaderTooLarge,
    InvalidRequest,
    RequestError,
    ServerFull,
    VersionNotSupported,
    first_line,
)

log = structlog.get_logger(__name__)

TLS = b"\x16\x03"

MAX_LINGERING, LINGER_S = 16, 0.5
"""Connections that are left open until their reply is read, at once and how long; others are reset."""

Lingering = set[asyncio.Protocol]


class Refused(asyncio.Protocol):
    """A connection that gets a 503 whatever it asks, and is closed once the client has read it or had the time to."""

    def __init__(self, lingering: Lingering) -> None:
        self._lingering = lingering

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._lingering.discard(self)


def refuse(transport: asyncio.Transport, room: int, lingering: Lingering) -> None:
    """Tell a client that there is no room for more than `room` connections, without reading what it sends."""
    error = ServerFull(f"All {room} connections that this server takes are in use (MAX_CONNECTIONS).")
    log.warning("connection refused: all others carry requests (MAX_CONNECTIONS)", room=room)
    body = json.dumps(error_body(error)).encode()
    head = (
        f"HTTP/1.1 {error.status} Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    )
    refused = Refused(lingering)
    transport.set_protocol(refused)
    transport.write(head.encode() + body)
    linger(transport, lingering, refused)


def linger(transport: asyncio.Transport, lingering: Lingering, protocol: asyncio.Protocol) -> None:
    """Close a connection once what was written is read, or there was time to."""
    if len(lingering) >= MAX_LINGERING:
        transport.close()
        return
    lingering.add(protocol)
    transport.write_eof()
    asyncio.get_running_loop().call_later(LINGER_S, _close, transport)


def _close(transport: Any) -> None:
    if not transport.is_closing():
        transport.abort()


def reply_to_unreadable(
    problem: h11.RemoteProtocolError | None, rest: bytes, max_header_bytes: int
) -> tuple[h11.Response, h11.Data, h11.EndOfMessage]:
    """What a client hears whose bytes the parser took offence at; `rest` is what was not parsed."""
    error = _refusal(problem, rest, max_header_bytes)
    body = json.dumps(error_body(error)).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
    return h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()


def _refusal(problem: h11.RemoteProtocolError | None, rest: bytes, max_header_bytes: int) -> RequestError:
    if problem is not None and problem.error_status_hint == HeaderTooLarge.status:
        return HeaderTooLarge(
            f"The request line and headers have more than {max_header_bytes} bytes: send fewer or shorter "
            "ones, and what is long in the body.",
            code="header_too_large",
        )
    if problem is not None and problem.error_status_hint == VersionNotSupported.status:
        return VersionNotSupported("HTTP/1.1 and HTTP/1.0 are spoken here: send one of these.", code="bad_http")
    why = f": {first_line(problem)}" if problem is not None else ""
    said = f"This is no HTTP/1.1 request that can be read{why}."
    if rest.startswith(TLS):
        said += " It begins as TLS: use http://, or put a proxy in front that ends TLS."
    return InvalidRequest(said, code="bad_http")
