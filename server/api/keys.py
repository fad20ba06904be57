"""The API keys that open the server, as keyed digests: whose a key is, is a *tenant*, a name that gives no key away.

Keys are compared by digest, all of them and each in constant time. The digests are keyed by a secret of this process,
so that neither a log nor a dump of a tenant's name or salt can be matched against guessed keys.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog
from prerope.server.errors import Unauthorized
from prerope.server.setting_types import read_key_file
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

log = structlog.get_logger(__name__)

PROBES = frozenset({"/live", "/health", "/ready", "/ping", "/metrics"})
OPEN_PATHS = PROBES | {
    *("/", "/version", "/openapi.json"),
    *("/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"),
}
"""Routes that ask for no key: probes, scrapers, and pages that hold no data of anybody's."""
METRICS_PATH = "/metrics"

REREAD_S = 1.0
"""The file's time and size are looked at this often at most, when a request comes."""


class KeyRing:
    """The keys of API_KEY, and of API_KEY_FILE as it is now. A file that has lost its keys never opens the server."""

    def __init__(
        self,
        keys: Sequence[str],
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        secret: bytes | None = None,
    ):
        """secret: of the digests that name tenants; None: a new one, with which no tenant is known after a restart."""
        self._secret = secret or secrets.token_bytes(32)
        self._fixed = [self._digest(key.encode()) for key in keys]
        self._from_file: list[bytes] = []
        self._file = file
        self._clock = clock
        self._looked_at = float("-inf")
        self._version: tuple[int, ...] | None = None

    @property
    def asks(self) -> bool:
        """Whether a request needs a key at all."""
        return bool(self._fixed) or self._file is not None

    def tenant(self, given: bytes) -> str | None:
        """The tenant whose key this is; None where it is nobody's."""
        self._reread()
        digest = self._digest(given)
        matches = [hmac.compare_digest(digest, known) for known in (*self._fixed, *self._from_file)]
        return digest.hex() if any(matches) else None

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._secret, digest_size=16).digest()

    def _reread(self) -> None:
        now = self._clock()
        if self._file is None or now - self._looked_at < REREAD_S:
            return
        self._looked_at = now
        version = self._version_of(self._file)
        if version == self._version:
            return
        self._version = version
        try:
            self._from_file = [self._digest(key.encode()) for key in read_key_file(self._file)]
        except (OSError, ValueError) as error:
            log.warning("API_KEY_FILE holds no keys now: the last ones go on", reason=type(error).__name__)
        else:
            log.info("API_KEY_FILE read", num_keys=len(self._from_file))

    @staticmethod
    def _version_of(file: Path) -> tuple[int, ...] | None:
        try:
            status = file.stat()
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_size, status.st_ino)


def is_open(path: str, method: str) -> bool:
    """Whether a request needs no key: probes, and pages, which are read. (TGI's clients post prompts to `/`.)"""
    return path in OPEN_PATHS and (path != "/" or method in ("GET", "HEAD", "OPTIONS"))


class KeyCheck:
    """Refuses requests without one of the keys; notes in the scope whose key it is, as `tenant`."""

    def __init__(self, app: ASGIApp, keys: KeyRing, metrics_keys: KeyRing) -> None:
        """metrics_keys: those that open /metrics, and nothing else."""
        self.app = app
        self.keys = keys
        self.metrics_keys = metrics_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].rstrip("/") or "/"  # with a slash more it is sent on to the route
            if path == METRICS_PATH and self.metrics_keys.asks:
                self._tenant(scope, self.metrics_keys, "METRICS_KEY")
            elif self.keys.asks and not is_open(path, scope["method"]):
                scope["tenant"] = self._tenant(scope, self.keys, "KEY")
        await self.app(scope, receive, send)

    @staticmethod
    def _tenant(scope: Scope, keys: KeyRing, shown: str) -> str:
        """Whose key the request carries. Raises Unauthorized."""
        headers = Headers(scope=scope)
        scheme, _, given = headers.get("authorization", f"Bearer {headers.get('x-api-key', '')}").partition(" ")
        tenant = keys.tenant(given.strip().encode("latin-1"))  # the bytes as they came
        if scheme.lower() != "bearer" or tenant is None:
            problem = "The API key is wrong." if given else "An API key is needed."
            raise Unauthorized(f"{problem} Send the header Authorization: Bearer {shown}.", code="invalid_api_key")
        return tenant
