"""Browsers: which names reach a server, what its page may do, and who may read its metrics."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from prerope.server.api.middleware import HostCheck
from prerope.server.errors import WrongHost

NAMES = (
    "localhost",
    "127.0.0.1",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "10.1.2.3",
    "prerope",
    "printer.local",
    "a.b.internal",
)
FOREIGN = (
    "evil.example",
    "evil.example.",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "1.2.3",
    "[::1]x",
    "a b.c",
)


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path) -> str:
    return str(serve_module(model_id=str(tiny_checkpoint), metrics_key="m1, m2"))


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/metrics%0A", "/metrics%0a/", "/metrics%0D", "/%0Ametrics"])
def test_no_spelling_of_the_path_opens_the_metrics(http: httpx.Client, path: str) -> None:
    assert http.get(path, follow_redirects=True).status_code in (401, 404)
    assert http.get("/metrics", headers={"Authorization": "Bearer m1"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models%0A", "/models%0A", "/v1/models%00", "/v1/%7Fmodels"])
def test_paths_with_control_characters_are_nobodys(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 404


@pytest.mark.parametrize("port", ["", ":8000"])
@pytest.mark.parametrize("name", NAMES)
def test_a_server_without_keys_is_known_by_local_names(http: httpx.Client, name: str, port: str) -> None:
    assert http.get("/v1/models", headers={"Host": name.upper() + port}).status_code == 200


def status_of(url: str, target: str, host: str, version: str = "1.1") -> tuple[int, bytes]:
    """Of a GET with this very target."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=20) as connection:
        sent = f"GET {target} HTTP/{version}\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        connection.sendall(sent.encode())
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(reply.split()[1]), reply


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1:80", "[::1]:9"])
def test_a_whole_address_is_a_target_too(url: str, name: str, version: str) -> None:
    for target in (f"http://{name}/v1/models", f"HTTPS://{name}/v1/models?limit=1"):
        status, reply = status_of(url, target, "localhost", version)
        assert status == 200
        assert b'"object"' in reply
    assert status_of(url, f"http://{name}", "localhost", version)[0] == status_of(url, "/", "localhost", version)[0]
    assert status_of(url, f"http://{name}/nowhere", "localhost", version)[0] == 404


@pytest.mark.parametrize("name", FOREIGN[:-1])
def test_and_its_host_counts_not_the_headers(url: str, name: str) -> None:
    assert status_of(url, f"http://{name}/v1/models", "localhost")[0] == 421
    assert status_of(url, "http://localhost/v1/models", name)[0] == 200


@pytest.mark.parametrize(
    "target", ["ftp://localhost/", "http:///health", "http://a@localhost/health", "http:", "health"]
)
def test_targets_that_are_neither_are_nobodys(url: str, target: str) -> None:
    assert status_of(url, target, "localhost")[0] in (400, 404)


@pytest.mark.parametrize("path", ["/generate", "/", "/health", "/metrics", "/nowhere"])
@pytest.mark.parametrize("name", FOREIGN)
def test_and_by_no_others(http: httpx.Client, name: str, path: str) -> None:
    """A page whose name has come to mean this address gets nothing, whatever it asks."""
    response = http.post(path, json={"prompt": "a", "max_tokens": 1}, headers={"Host": name + ":8000"})
    assert response.status_code == 421
    error = response.json()["error"]
    assert error["code"] == "wrong_host"
    assert "ALLOWED_HOSTS" in error["message"]
    assert name in error["message"]


@pytest.mark.parametrize(
    ("allowed", "keyed", "host", "passes"),
    [
        ((), True, "llm.example.com", True),
        (("llm.example.com",), True, "LLM.example.com:443", True),
        (("llm.example.com",), True, "localhost", False),
        (("llm.example.com",), False, "127.0.0.1", False),
        (("*.example.com", "localhost"), False, "a.b.example.com", True),
        (("*.example.com", "localhost"), False, "example.com", False),
        (("*.example.com", "localhost"), False, "badexample.com", False),
        (("*",), False, "anything.example", True),
    ],
)
def test_allowed_hosts(allowed: tuple[str, ...], keyed: bool, host: str, passes: bool) -> None:
    async def app(*_: Any) -> None:
        seen.append(host)

    seen: list[str] = []
    check = HostCheck(app, allowed, default_all=keyed)
    scope = {"type": "http", "headers": [(b"host", host.encode())]}
    with suppress(WrongHost):
        asyncio.run(check(scope, None, None))  # type: ignore[arg-type]
    assert bool(seen) is passes


def test_the_page_may_do_what_it_does_and_nothing_else(http: httpx.Client) -> None:
    """Its script and its style are named by their digests, so that none that was put in is run; nobody may frame it."""
    page = http.get("/")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"\s(style|on\w+)=", page.text.partition("<body>")[2].partition("<script>")[0])
    assert page.headers["x-frame-options"] == http.get("/docs").headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in http.get("/docs").headers["content-security-policy"]


def test_metrics_may_have_a_key_of_their_own(http: httpx.Client) -> None:
    """It opens nothing else, and nothing else needs it."""
    for headers in ({}, {"Authorization": "Bearer m3"}, {"Authorization": "Basic m1"}):
        assert http.get("/metrics", headers=headers).status_code == 401
        assert http.get("/metrics/", headers=headers).status_code == 401
    for key in ("m1", "m2"):
        assert "vllm:" in http.get("/metrics", headers={"Authorization": f"Bearer {key}"}).text
    assert http.get("/health").status_code == 200
