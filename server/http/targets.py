"""Request targets that are not paths: a client that takes the server for a proxy sends the whole address."""

from __future__ import annotations

import re

import h11

ABSOLUTE = re.compile(rb"https?://(?P<host>[^/?#@]+)(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?", re.IGNORECASE)


def in_origin_form(request: h11.Request) -> h11.Request:
    """`GET http://host/path` as `GET /path`, the Host header replaced by the host (RFC 9112, 3.2.2). Others as they
    are: of this server they name nothing."""
    found = ABSOLUTE.fullmatch(request.target)
    if found is None:
        return request
    target = (found["path"] or b"/") + (found["query"] or b"")
    headers = [(b"host", found["host"]), *((name, value) for name, value in request.headers if name != b"host")]
    return h11.Request(method=request.method, target=target, headers=headers, http_version=request.http_version)
