"""What clients can do with connections alone, and what it costs the others: nothing that is not bounded."""

from __future__ import annotations

import json
import logging
import re
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from prerope.server.api.middleware import PIECE_BYTES
from prerope.server.http import connection as doors
from prerope.server.http import refusals
from prerope.server.http.server import room_for
from prerope.server.log import LINES_OF_A_KIND, WINDOW_S, KindLimit
from structlog.testing import capture_logs

from tests.faults import Faults
from tests.logged import logged
from tests.server.test_cli import ENVIRONMENT, ROOT, free_port, wait_for

ROOM, TIMEOUT_S, HEADER_S = 12, 1.0, 0.6
NEVER_S = 60.0
"""Longer than any test here waits."""
HALF_HEADER = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nX-More: "
TOKENIZE = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALF_BODY = TOKENIZE + b'Content-Length: 9000000\r\n\r\n{"prompt":'
HALF_CHUNK = TOKENIZE + b'Transfer-Encoding: chunked\r\n\r\na\r\n{"prompt":\r\n'
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
BUNDLE, NUM_UNREAD = "/docs/swagger-ui-bundle.js", 10
UNREAD = b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % BUNDLE.encode() * NUM_UNREAD
"""Of 1.4 MB each: more than the kernel takes."""


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path) -> str:
    settings = {"max_connections": ROOM, "client_timeout_s": TIMEOUT_S, "keep_alive_s": 30, "max_model_len": 512}
    return str(serve_module(model_id=str(tiny_checkpoint), **settings))


@pytest.fixture(scope="module")
def patient(serve_module: Any, tiny_checkpoint: Path) -> str:
    """A server that waits for its clients."""
    return str(serve_module(model_id=str(tiny_checkpoint), max_connections=ROOM, client_timeout_s=NEVER_S))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "HEADER_TIMEOUT_S", HEADER_S)


def connect(url: str) -> socket.socket:
    where = urlsplit(url)
    connection = socket.create_connection((where.hostname, where.port), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def raw(body: dict[str, Any], path: str = "/generate", version: str = "1.1") -> bytes:
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text


def seconds_until_closed(connection: socket.socket, trickle: bytes | None = None, every_s: float = 0.1) -> float:
    """Until the server cuts it, a byte of `trickle` being sent now and then."""
    began = time.monotonic()
    connection.settimeout(every_s)
    try:
        while time.monotonic() - began < 20:
            try:
                if not connection.recv(65536):
                    break
            except TimeoutError:
                if trickle is not None:
                    connection.send(trickle)
    except OSError:
        pass
    return time.monotonic() - began


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.005)


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", HALF_HEADER, HALF_BODY, HALF_CHUNK])
def test_connections_that_wait_for_their_clients_keep_nobody_out(
    patient: str, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five times as many as there is room for: each new one takes the oldest's place, long before its time is up, and
    /health is as ever. Its median is looked at, as a machine may stand still during one answer."""
    monkeypatch.setattr(doors, "HEADER_TIMEOUT_S", NEVER_S)
    took = []
    with ExitStack() as stack:
        for _ in range(5 * ROOM):
            stack.enter_context(closing(connect(patient))).send(sent)
        http = stack.enter_context(httpx.Client())
        for _ in range(10):
            began = time.monotonic()
            assert http.get(f"{patient}/health", headers={"Connection": "close"}).status_code == 200
            took.append(time.monotonic() - began)
    assert statistics.median(took) < 0.25


def test_where_all_carry_requests_one_more_is_told_so_at_once(url: str, serve_module: Any) -> None:
    running = serve_module.running(url)
    faults = Faults(running.service.engine.engine)
    until(lambda: not len(running.http.door))
    faults.forward.hold()
    with ExitStack() as stack:
        stack.callback(faults.forward.release)
        busy = [stack.enter_context(closing(connect(url))) for _ in range(ROOM)]
        for connection in busy:
            connection.sendall(raw({"prompt": "a", "max_tokens": 1}))
        until(lambda: len(running.service.engine._streams) == ROOM)
        began = time.monotonic()
        for _ in range(3 * refusals.MAX_LINGERING):  # past the number that may linger, too
            refused = stack.enter_context(closing(connect(url)))
        response = httpx.get(f"{url}/health")
        assert time.monotonic() - began < 2
        assert response.status_code == 503
        assert "MAX_CONNECTIONS" in response.json()["error"]["message"]
        assert response.headers["retry-after"] == "1"
        assert seconds_until_closed(refused) < 2
        faults.forward.release()
        for connection in busy:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    until(lambda: httpx.get(f"{url}/health").status_code == 200)


def test_what_clients_do_not_read_is_not_kept_for_each(url: str, serve_module: Any) -> None:
    """What the kernel does not take is 64 KiB at a time, and replies are whole for whoever reads them late. Until then
    the connection is one that waits for its client."""
    door = serve_module.running(url).http.door
    until(lambda: not len(door))
    with closing(connect(url)) as connection:
        connection.sendall(UNREAD + HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        until(lambda: len(door._halted) == 1)
        (there,) = door._halted
        assert there.transport.get_write_buffer_size() < 2 * PIECE_BYTES + 2**16
        received = bytearray()
        while more := connection.recv(2**20):
            received += more
    *replies, _health = received.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert len(replies) == NUM_UNREAD
    assert {reply.partition(b"\r\n\r\n")[2] for reply in map(bytes, replies)} == {httpx.get(url + BUNDLE).content}


HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
LONG = b"X-More: " + b"a" * 2**16 + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (HEAD + LONG, 431, "16384 bytes"),
        (HEAD + b"".join(b"X-%d: a\r\n" % index for index in range(20_000)) + b"\r\n", 431, "16384 bytes"),
        (b"GET /health?" + b"a=1&" * 30_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431, "16384 bytes"),
        (
            b"GET /v1/models?" + b"[a]" * 3_000 + b"=1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
            200,
            "data",
        ),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n", 505, "HTTP/1.1"),
        (TOKENIZE.replace(b"HTTP/1.1", b"HTTP/2.0") + b"Content-Length: 2\r\n\r\n{}", 505, "HTTP/1.0"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n" * 9, 400, "http://"),
        (TOKENIZE + b"Content-Length: -5\r\n\r\n", 400, "Content-Length"),
        (TOKENIZE + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400, "chunk"),
    ],
    ids=["long", "many", "query", "deep query", "no host", "version", "version with a body", "TLS", "length", "chunk"],
)
@pytest.mark.parametrize("piece", [2**20, 1000])
def test_what_is_no_request_is_told_why(url: str, sent: bytes, status: int, said: str, piece: int) -> None:
    """However it comes; and the reply arrives, though not all that was sent is read."""
    with closing(connect(url)) as connection:
        with suppress(OSError):  # the rest is not wanted
            for start in range(0, len(sent), piece):
                connection.sendall(sent[start : start + piece])
        answer = b""
        while more := connection.recv(65536):
            answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert said in (body.decode() if status == 200 else json.loads(body)["error"]["message"])


@pytest.mark.parametrize("path", ["/health", "/tokenize", "/nowhere"])
def test_a_body_that_cannot_be_read_is_no_error_of_the_server(url: str, path: str) -> None:
    """Its request was handed on before, and is answered by nobody else."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with capture_logs() as lines, logged() as records, closing(connect(url)) as connection:
        connection.sendall(head.encode() + b"2\r\n{}zz\r\n")
        answer = b""
        while more := connection.recv(65536):
            answer += more
        until(lambda: any(line["event"] == "request" for line in lines))
        time.sleep(0.1)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"\r\n\r\n") == 1
    assert not [line for line in lines if line["log_level"] == "error"]
    assert not [record.getMessage() for record in records if record.levelno >= logging.ERROR]


def test_small_pieces_do_not_wait_for_an_acknowledgement(url: str, serve_module: Any) -> None:
    """The reply to a connection's second request would: 40 ms."""
    door = serve_module.running(url).http.door
    until(lambda: not len(door))
    with closing(connect(url)) as connection:
        connection.sendall(HALF_HEADER)
        until(lambda: len(door) == 1)
        (there,) = door._open
        accepted = there.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_requests_sent_before_their_turn_are_answered_in_order_and_with_rests(url: str) -> None:
    """Thousands on one connection kept the event loop busy, and somebody's stream waited half a second for a step."""
    paths = ["/health", "/v1/models", "/nowhere"] * 20
    with connect(url) as connection:
        began = time.monotonic()
        connection.sendall(b"".join(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode() for path in paths))
        received, statuses = b"", []
        while len(statuses) < len(paths):
            received += connection.recv(65536)
            statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", received)]
        assert statuses == [200, 200, 404] * 20
        assert time.monotonic() - began >= (len(paths) - 1) * doors.PIPELINE_REST_S


@pytest.mark.slow
def test_the_limit_of_descriptors_is_one_of_connections(tiny_checkpoint: Path) -> None:
    """With `ulimit -n 256`, 400 half headers: others are served, and the log says a few lines."""
    port = free_port()
    flags = ("--model-id", str(tiny_checkpoint), "--port", str(port), "--kv-cache-memory", "16MiB")
    served = subprocess.Popen(
        [sys.executable, "-m", "prerope.server", *flags],
        cwd=ROOT,
        env=ENVIRONMENT | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/ready")
        with ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(closing(connect(url))).send(HALF_HEADER)
            answers = [httpx.get(f"{url}/health", timeout=5).status_code for _ in range(10)]
            reply = httpx.post(f"{url}/generate", json={"prompt": "a", "max_tokens": 2}, timeout=30)
        assert answers == [200] * 10
        assert reply.status_code == 200
    finally:
        served.terminate()
        _, err = served.communicate(timeout=60)
    assert "`ulimit -n` is 256" in err
    assert len(err) < 20_000, err


def test_room_is_made_by_raising_the_soft_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [64, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.__setitem__(slice(None), pair))
    assert room_for(1000) == 1000
    assert 1000 < limits[0] < 2000
    assert 3000 < room_for(100_000) < 4096
    assert limits == [4096, 4096]


# --- how long ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", HALF_HEADER, HEALTH + HALF_HEADER], ids=["nothing", "first", "second"])
def test_a_header_has_its_time(url: str, sent: bytes) -> None:
    """Whatever trickles in: the time counts from its beginning."""
    with closing(connect(url)) as connection:
        connection.sendall(sent)
        assert HEADER_S - 0.1 < seconds_until_closed(connection, b"x") < HEADER_S + 2


def test_a_kept_connection_may_be_silent_for_longer(url: str) -> None:
    with closing(connect(url)) as connection:
        for _ in range(2):
            connection.sendall(HEALTH)
            reply = b""
            while not reply.endswith(b"}"):
                reply += connection.recv(4096)
            assert reply.startswith(b"HTTP/1.1 200")
            time.sleep(1.5 * HEADER_S)


def test_a_body_that_trickles_has_an_end(url: str) -> None:
    """No silence is as long as CLIENT_TIMEOUT_S, but a byte now and then is not 16 KiB a second."""
    with closing(connect(url)) as connection:
        connection.sendall(raw({"prompt": "a"}).replace(b"Length: ", b"Length: 9"))
        began = time.monotonic()
        connection.settimeout(0.1)
        reply = b""
        while not reply.endswith(b"}") and time.monotonic() - began < 20:  # head and body may come one by one
            try:
                reply += connection.recv(4096)
            except TimeoutError:
                connection.send(b" ")
        assert reply.startswith(b"HTTP/1.1 408")
        assert b"bytes a second" in reply
        assert TIMEOUT_S - 0.1 < time.monotonic() - began < TIMEOUT_S + 2
        assert seconds_until_closed(connection, b" ") < HEADER_S + 2


def test_a_body_that_nobody_wants_is_not_waited_for_either(url: str) -> None:
    """The reply is complete; the rest of the body goes on, byte by byte."""
    with closing(connect(url)) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 404")
        assert seconds_until_closed(connection, b" ") < HEADER_S + 2


# --- half-closed ------------------------------------------------------------------------------------------------------

BODY = {"prompt": "a", "max_tokens": 30, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_has_closed_its_side_gets_its_reply(url: str, serve_module: Any, stream: bool) -> None:
    faults = Faults(serve_module.running(url).service.engine.engine)
    faults.forward.slow_down(0.03)  # it is asked more than once whether it is gone
    with closing(connect(url)) as connection:
        connection.sendall(raw(BODY | {"stream": stream}))
        connection.shutdown(socket.SHUT_WR)
        reply = connection.makefile("rb").read()
    faults.forward.slow_down(0)
    final = reply.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert final.startswith(b"HTTP/1.1 200")
    if stream:
        assert b"data: [DONE]" in final
    else:
        assert final != reply, "asked whether it is gone before there was anything else to send"
        assert len(json.loads(final.partition(b"\r\n\r\n")[2])["token_ids"]) == 30


LARGE = {
    "a file": b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a document": b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "within"])
@pytest.mark.parametrize("asked", LARGE.values(), ids=LARGE)
def test_a_large_reply_comes_whole_where_the_client_closes_its_side(url: str, asked: bytes, late: bool) -> None:
    with closing(connect(url)) as connection:
        connection.sendall(asked)
        beginning = connection.recv(500) if late else b""
        connection.shutdown(socket.SHUT_WR)
        reply = beginning + connection.makefile("rb").read()
    head, _, body = reply.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None
    assert len(body) == int(length[1]) > 2 * PIECE_BYTES


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_is_gone_is_not_taken_for_one(url: str, serve_module: Any, version: str, stream: bool) -> None:
    engine = serve_module.running(url).service.engine
    faults = Faults(engine.engine)
    faults.forward.slow_down(0.05)
    with closing(connect(url)) as connection:
        connection.sendall(raw(BODY | {"stream": stream, "max_tokens": 400}, version=version))
        until(lambda: len(engine._streams) == 1)
        if stream:
            connection.recv(100)
    before = engine.stats().generation_tokens
    until(lambda: not engine._streams)
    assert engine.stats().generation_tokens - before < 20
    faults.forward.slow_down(0)


# --- the log ----------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def limit() -> tuple[KindLimit, Clock]:
    clock = Clock()
    return KindLimit(clock), clock


def line(message: Any, *args: Any) -> logging.LogRecord:
    return logging.LogRecord("asyncio", logging.ERROR, __file__, 1, message, args, None)


def test_a_kind_of_line_cannot_flood_the_log(limit: tuple[KindLimit, Clock]) -> None:
    """Its number is told instead; other kinds and served requests are all written."""
    kinds, clock = limit
    passed = [kinds.filter(line("no %s left", "descriptors")) for _ in range(1000)]
    assert passed == [True] * LINES_OF_A_KIND + [False] * (1000 - LINES_OF_A_KIND)
    assert all(kinds.filter(line({"event": "request", "status": 200})) for _ in range(1000))
    assert sum(kinds.filter(line({"event": "request", "status": 401})) for _ in range(1000)) == LINES_OF_A_KIND
    assert kinds.filter(line("something else"))
    clock.now = WINDOW_S
    first, refused = line("no %s left", "descriptors"), line({"event": "request", "status": 401})
    assert kinds.filter(first)
    assert kinds.filter(refused)
    assert first.getMessage() == "no descriptors left (950 more of this kind were left out)"
    assert refused.msg["note"].startswith("950 more")


# --- what bodies hold -------------------------------------------------------------------------------------------------


def test_bodies_that_were_begun_make_room_for_others(
    url: str, serve_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for three of those that never end: a whole one is read all the same, and then nothing is held."""
    room = serve_module.running(url).service.bodies
    monkeypatch.setattr(room, "max_bytes", 2**20)
    head = TOKENIZE + b"Content-Length: 400000\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(closing(connect(url))).sendall(head + b" " * 300_000)
        until(lambda: room.num_bytes >= 3 * 300_000)
        body = json.dumps({"prompt": "Hello"}).encode() + b" " * 300_000
        kind = {"Content-Type": "application/json"}
        response = httpx.post(f"{url}/tokenize", content=body, headers=kind, timeout=60)
        assert response.status_code == 200
        assert room.num_bytes <= 2**20
    until(lambda: room.num_bytes == 0)


def test_a_body_of_too_many_chunks_is_told_so(url: str) -> None:
    """Of one byte each. As many of some size are taken, and read in order."""
    text = json.dumps({"prompt": "Hello", "add_special_tokens": False}).encode()
    text += b" " * 40_000
    head = TOKENIZE + b"Transfer-Encoding: chunked\r\n\r\n"
    for size, codes in ((1, (b"400", b"408")), (40, (b"200",))):  # a slow machine's limit of time may be met first
        chunks = [text[start : start + size] for start in range(0, len(text), size)]
        with closing(connect(url)) as connection:
            connection.sendall(head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks))
            connection.sendall(b"0\r\n\r\n")
            reply = b""
            while not reply.endswith(b"}"):
                reply += connection.recv(4096)
            assert reply.split()[1] in codes, reply
            assert (b"too_many_chunks" in reply) == (reply.split()[1] == b"400")
