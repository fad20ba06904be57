"""Which names a request may call this server by: its Host header, against DNS rebinding.

A page of evil.example whose name has come to resolve to 127.0.0.1 is, to a browser, of one origin with what listens
there, and may read it. What gives it away is the Host header, evil.example. Where no key is asked for, names are
therefore allowed that nobody can register: addresses, names of one label, and those of the local network. (starlette's
TrustedHostMiddleware takes IPv6 addresses apart at their first colon, and knows no addresses as such.)
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from prerope.server.errors import WrongHost
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa")
"""Of names that are reserved for local use."""

HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^:\[\]]*)(:\d*)?", re.IGNORECASE)
MAX_SHOWN = 64


class HostCheck:
    """Refuses requests that name another server."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str], default_all: bool) -> None:
        """allowed: names, "*.name" for those below it, "*" for all; empty: all, or those that cannot be registered."""
        self.app = app
        self.allowed = [name.lower() for name in allowed]
        self._all = "*" in self.allowed or (default_all and not self.allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._all:
            given = Headers(scope=scope).getlist("host")
            if len(given) > 1 or (given and not self._allows(given[0])):
                raise WrongHost(
                    f"The Host header names '{given[0][:MAX_SHOWN]}', which this server is not known as. Use its "
                    "address, or add the name to ALLOWED_HOSTS.",
                    code="wrong_host",
                )
        await self.app(scope, receive, send)

    def _allows(self, host: str) -> bool:
        match = HOST.fullmatch(host.strip())
        if match is None:
            return False
        name = match["name"].lower().rstrip(".")
        if self.allowed:
            return any(name == one or (one.startswith("*.") and name.endswith(one[1:])) for one in self.allowed)
        return "." not in name or name.endswith(LOCAL_SUFFIXES) or _is_address(name.strip("[]"))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
