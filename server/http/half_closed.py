"""A client that has closed its side of a connection: it may be gone, or may still read ("half-closed", as of `nc -N`).

TCP does not tell until something is sent. So something is sent that means nothing, and the kernel is asked what came of
it.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import h11
from prerope.server.api.middleware import FILLER

if TYPE_CHECKING:
    from prerope.server.http.connection import Connection

TCP_CLOSE_WAIT = 8
"""Of Linux's tcp_info: the client has closed its side, and nothing says that it does not read."""
GONE_CHECK_S = 0.25


def stays_open(connection: Connection) -> bool:
    """Whether to stay open: for a client that has sent its request whole, and does not turn out to be gone."""
    cycle = connection.cycle
    if not connection.answering or cycle.more_body or not hasattr(socket, "TCP_INFO"):
        return False
    if not cycle.response_started and connection.scope["http_version"] != "1.1":
        return False  # older clients know no interim replies
    cycle.keep_alive = False
    connection.transport.write(_filler(connection))
    _close_if_gone(connection)
    return True


def _filler(connection: Connection) -> bytes:
    """What means nothing here, and what a client that is gone answers with a reset; empty where the reply's next piece
    does as well."""
    parser = connection.conn
    if not connection.cycle.response_started:
        return parser.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")) or b""
    filler = connection.scope["state"].get(FILLER)
    return b"" if filler is None else parser.send(h11.Data(data=filler)) or b""


def _close_if_gone(connection: Connection) -> None:
    if not connection.answering or connection.transport.is_closing():
        return
    there: socket.socket = connection.transport.get_extra_info("socket")
    if there.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_CLOSE_WAIT:
        connection.transport.abort()
    else:
        connection.gone_timer = connection.loop.call_later(GONE_CHECK_S, _close_if_gone, connection)
