"""The worst day: what breaks, who notices, and what is left afterwards.

After each fault: others are unharmed or told so, every block is free or cached, /ready tells the truth, and the process
goes on or ends with a code that its supervisor understands.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from prerope.server.api import generate
from prerope.server.api.stream.generation import Transcript
from prerope.server.engine.async_engine import AsyncEngine
from prerope.server.errors import OutOfMemory, explained
from prerope.server.tokenizer import Tokenizer
from structlog.testing import capture_logs

from tests.faults import Faults, Point
from tests.server.test_cli import free_port, start, wait_for
from tests.tiers import every

GENERATE = "/generate"
BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
LONG_PROMPT = [10 + i % 200 for i in range(450)]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def url(serve_module: Any, byte_checkpoint: Path) -> str:
    """A server that lives through all faults that one can live through."""
    return str(
        serve_module(
            model_id=str(byte_checkpoint),
            max_model_len=4096,
            max_batched_tokens=64,
            max_num_seqs=4,
            client_timeout_s=1.5,
            api_key="the-key",
            max_seqs_per_key=12,
        )
    )


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60, headers={"Authorization": "Bearer the-key"}) as client:
        yield client


@pytest.fixture(scope="module")
def engine(serve_module: Any, url: str) -> AsyncEngine:
    engine: AsyncEngine = serve_module.running(url).service.engine
    return engine


@pytest.fixture(scope="module")
def faults(engine: AsyncEngine) -> Faults:
    return Faults(engine.engine)


@pytest.fixture(scope="module")
def expected(http: httpx.Client) -> list[int]:
    """What `BODY` gives on a good day."""
    return tokens(http.post(GENERATE, json=BODY))


def tokens(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return list(response.json()["token_ids"])


@pytest.fixture(autouse=True)
def recovered(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test on the shared server nothing is left of it, and the next request is served as ever."""
    if "url" not in request.fixturenames:
        yield
        return
    http, engine, faults, expected = map(request.getfixturevalue, ("http", "engine", "faults", "expected"))
    yield
    faults.forward.release()
    faults.forward.slow_down(0.0)
    until(lambda: is_clean(engine))
    engine.engine.check_integrity()
    assert http.get("/ready").status_code == 200
    assert tokens(http.post(GENERATE, json=BODY)) == expected
    assert len(tokens(http.post(GENERATE, json={"prompt": "a", "max_tokens": 1}))) == 1


def is_clean(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    idle = stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks
    return idle and not engine._streams and not engine._unseen


# --- faults that one request meets alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [GENERATE, "/v1/completions", "/tokenize"])
@pytest.mark.parametrize("length", [10, 3000], ids=["on the loop", "on a thread"])
def test_an_error_of_the_tokenizer(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, expected: list[int], path: str, length: int
) -> None:
    encode = Tokenizer.encode

    def sometimes(self: Tokenizer, text: str, **kwargs: Any) -> list[int]:
        if text.startswith("bad"):
            raise RuntimeError(text)
        return encode(self, text, **kwargs)

    monkeypatch.setattr(Tokenizer, "encode", sometimes)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(http.post, GENERATE, json=BODY)
        response = http.post(path, json={"prompt": "bad" + "x" * length})
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "Internal server error."
        assert tokens(other.result()) == expected


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_error_of_the_detokenizer(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, expected: list[int], stream: bool
) -> None:
    """In the middle of a reply, for the one request that asks for log-probabilities."""
    push, pushes = Transcript.push, 0

    def sometimes(self: Transcript, token_ids: Any, logprobs: Any = None) -> Any:
        nonlocal pushes
        pushes += logprobs is not None
        if logprobs is not None and pushes > 3:
            raise UnicodeError("words of the reply")
        return push(self, token_ids, logprobs)

    monkeypatch.setattr(Transcript, "push", sometimes)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(http.post, GENERATE, json=BODY)
        response = http.post(GENERATE, json=BODY | {"logprobs": 0, "stream": stream, "max_tokens": 400})
        assert tokens(other.result()) == expected
    monkeypatch.undo()
    if stream:
        *pieces, error = [frame for frame in response.text.split("\n\n") if frame]
        assert len(pieces) == 3
        assert error.startswith("event: error\n")
    else:
        assert response.status_code == 500
    assert "Internal server error." in response.text
    assert "words of the reply" not in response.text


def test_a_reply_that_fails_before_it_begins(
    http: httpx.Client, engine: AsyncEngine, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is never read, so nothing in it could close the generation that waits behind it."""

    def broken(_: object) -> None:
        raise RuntimeError("no stream today")

    monkeypatch.setattr(generate, "event_stream", broken)
    faults.forward.slow_down(0.01)
    before = engine.stats().generation_tokens
    assert http.post(GENERATE, json=BODY | {"stream": True, "max_tokens": 400}).status_code == 500
    until(lambda: is_clean(engine))
    assert engine.stats().generation_tokens - before < 100


# --- slow steps and a full cache --------------------------------------------------------------------------------------


def test_a_step_that_takes_long_blocks_nothing_but_tokens(
    http: httpx.Client, faults: Faults, expected: list[int]
) -> None:
    faults.forward.hold()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(http.post, GENERATE, json=BODY)
        assert faults.forward.entered.wait(20)
        began = time.monotonic()
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 200
        assert http.get("/metrics").status_code == 200
        assert http.post("/tokenize", json={"prompt": "x" * 3000}).status_code == 200
        assert time.monotonic() - began < 5.0
        faults.forward.release()
        assert tokens(reply.result()) == expected


def test_probes_and_the_log_tell_of_a_step_that_does_not_end_and_of_its_end(serve: Any, byte_checkpoint: Path) -> None:
    """Nothing is ended because of it: a step may be long."""
    url = serve(model_id=str(byte_checkpoint), step_timeout_s=0.5)
    faults = Faults(serve.running(url).service.engine.engine)
    with httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(1) as pool, capture_logs() as lines:
        time.sleep(0.7)  # an engine without work is not late
        assert http.get("/health").status_code == http.get("/live").status_code == 200
        faults.forward.hold()
        reply = pool.submit(http.post, GENERATE, json=BODY | {"prompt": "Sesame"})
        until(lambda: http.get("/health").status_code == 503)
        assert [http.get(path).status_code for path in ("/ready", "/ping", "/live")] == [503] * 3
        refused = http.post(GENERATE, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "hung")
        assert "STEP_TIMEOUT_S" in refused.json()["error"]["message"]
        assert "retry-after" in refused.headers
        assert 'prerope:engine_ready{model_name="tiny-llama"} 0.0' in http.get("/metrics").text
        until(lambda: any("does not end" in line["event"] for line in lines))
        (said,) = [line for line in lines if "does not end" in line["event"]]
        assert (said["log_level"], said["step"], said["sequences"]) == ("error", 1, 1)
        assert said["rows"] == said["prompt_rows"] == said["longest"] > 0
        assert any("faults.py" in place for place in said["at"]), "where the engine's thread is"
        assert "Sesame" not in str(lines)
        faults.forward.release()
        assert reply.result().status_code == 200
        until(lambda: http.get("/live").status_code == http.get("/health").status_code == 200)
        assert tokens(http.post(GENERATE, json=BODY | {"prompt": "Sesame"})) == tokens(reply.result())
        until(lambda: any("has ended" in line["event"] for line in lines))


def test_a_process_that_stood_has_no_late_step_because_of_it(serve: Any, tiny_checkpoint: Path) -> None:
    """Stopped and continued (SIGSTOP, SIGCONT), neither its event loop nor its engine's thread has had any time."""
    url = serve(model_id=str(tiny_checkpoint), step_timeout_s=1.0)
    engine = serve.running(url).service.engine
    faults = Faults(engine.engine)
    faults.forward.hold()
    with httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(1) as pool, capture_logs() as lines:
        reply = pool.submit(http.post, GENERATE, json=BODY)
        assert faults.forward.entered.wait(20)
        for _ in range(2):
            engine._loop.call_soon_threadsafe(time.sleep, 2.0)
            time.sleep(0.1)
            assert http.get("/health").status_code == 200, "asked for while it stood, answered at once after it"
        assert not [line for line in lines if "does not end" in line["event"]]
        until(lambda: http.get("/health").status_code == 503)
        faults.forward.release()
        assert reply.result().status_code == 200


def test_a_cache_that_has_nothing_to_give_for_a_while(
    http: httpx.Client, engine: AsyncEngine, faults: Faults, expected: list[int]
) -> None:
    """Each refusal preempts somebody, at last the one who asks; all come back and say what they would have said."""
    before = engine.stats().num_preemptions
    faults.grow.answer(*[False] * 10)
    with ThreadPoolExecutor(3) as pool:
        replies = [pool.submit(http.post, GENERATE, json=BODY) for _ in range(3)]
        assert [tokens(reply.result()) for reply in replies] == [expected] * 3
    assert engine.stats().num_preemptions > before


@pytest.mark.ci
def test_more_work_than_the_cache_holds(serve: Any, tiny_checkpoint: Path) -> None:
    """A cache of 2048 tokens, six requests of 440 each, and all their words are those they have alone."""
    url = serve(
        model_id=str(tiny_checkpoint),
        kv_cache_memory="1MiB",
        max_model_len=512,
        prefix_caching=False,
        speculation="off",
    )
    engine = serve.running(url).service.engine
    assert engine.info.num_cache_tokens == 2048
    bodies = [{"prompt": [7 + i] * 240, "max_tokens": 200, "temperature": 0, "ignore_eos": True} for i in range(6)]
    with httpx.Client(base_url=url, timeout=120) as http, ThreadPoolExecutor(6) as pool:
        together = [tokens(reply) for reply in pool.map(lambda body: http.post(GENERATE, json=body), bodies)]
        assert engine.stats().num_preemptions > 0
        assert together[::2] == [tokens(http.post(GENERATE, json=body)) for body in bodies[::2]]
        assert [len(one) for one in together] == [200] * 6


# --- clients that vanish ----------------------------------------------------------------------------------------------


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    where = urlsplit(url)
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(30)
    connection.connect((where.hostname, where.port))
    return connection


def raw_request(body: dict[str, Any], path: str = GENERATE) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer the-key\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@contextmanager
def asking(url: str, body: dict[str, Any], path: str = GENERATE) -> Iterator[socket.socket]:
    """A client that has sent its request and vanishes at the end of the block."""
    with closing(connect(url)) as connection:
        connection.sendall(raw_request(body, path))
        yield connection


def shares_in_use(serve_module: Any, url: str) -> int:
    """What the server counts for its keys."""
    from prerope.server.api.fairness import HoldRequest

    layer = serve_module.running(url).app.middleware_stack
    while not isinstance(layer, HoldRequest):
        layer = layer.app
    return sum(layer.allowance.in_use.values())


def test_a_client_that_leaves_while_it_uploads(http: httpx.Client, url: str, serve_module: Any) -> None:
    with closing(connect(url)) as connection:
        connection.sendall(raw_request(BODY)[:-10])
        until(lambda: shares_in_use(serve_module, url) == 1)
    until(lambda: shares_in_use(serve_module, url) == 0)
    assert 'handler="/generate",method="POST",status="499"' in http.get("/metrics").text


def test_a_client_that_never_ends_its_upload(http: httpx.Client, url: str, serve_module: Any) -> None:
    with closing(connect(url)) as connection:
        connection.sendall(raw_request(BODY)[:-10])
        reply = connection.makefile("rb").read()  # to the end: the server hangs up
    assert reply.startswith(b"HTTP/1.1 408")
    assert b"CLIENT_TIMEOUT_S" in reply
    assert shares_in_use(serve_module, url) == 0
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_leaves_while_its_prompt_is_tokenised(
    url: str, engine: AsyncEngine, serve_module: Any, stream: bool
) -> None:
    """Nobody looks at the connection then; what is admitted afterwards must not run for nobody."""
    service = serve_module.running(url).service
    encode = Point(service.tokenizer, "encode")
    encode.hold()
    before = engine.stats().generation_tokens
    with asking(url, BODY | {"prompt": "word " * 400, "max_tokens": 100, "stream": stream}):
        assert encode.entered.wait(20)
    time.sleep(0.1)
    encode.release()
    until(lambda: shares_in_use(serve_module, url) == 0)
    until(lambda: is_clean(engine))
    assert engine.stats().generation_tokens - before < 50
    del service.tokenizer.encode


PHASES: dict[str, Callable[[Any, Any], bool]] = {
    "queued": lambda _, now: now.num_waiting > 0,
    "prefill": lambda before, now: now.prompt_tokens > before.prompt_tokens,
    "first token": lambda before, now: now.generation_tokens > before.generation_tokens,
    "decode": lambda before, now: now.generation_tokens > before.generation_tokens + 5,
}


@pytest.mark.parametrize("path", [GENERATE, "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves_when(
    url: str,
    engine: AsyncEngine,
    faults: Faults,
    serve_module: Any,
    phase: str,
    stream: bool,
    path: str,
) -> None:
    faults.forward.slow_down(0.01)
    before, salt = engine.stats(), f"{phase} {stream} {path}"
    body = {"prompt": LONG_PROMPT, "max_tokens": 60, "ignore_eos": True, "stream": stream, "cache_salt": salt}
    if path == "/v1/completions":
        body["n"] = 2
    if phase == "queued":
        with asking(
            url, BODY | {"n": 4, "max_tokens": 3000, "speculation": "off"}, "/v1/completions"
        ):  # long enough on a slow machine
            until(lambda: engine.stats().num_running == 4)
            with asking(url, body, path):
                until(lambda: PHASES[phase](before, engine.stats()))
            until(lambda: engine.stats().num_waiting == 0)
            assert engine.stats().num_running == 4, "those who are still here go on"
    else:
        with asking(url, body, path):
            until(lambda: PHASES[phase](before, engine.stats()))
    until(lambda: is_clean(engine), seconds=5)
    until(lambda: shares_in_use(serve_module, url) == 0, seconds=5)
    if phase != "queued":
        assert engine.stats().generation_tokens - before.generation_tokens < 60, "nothing ran to its end for nobody"


def test_a_client_that_leaves_before_the_last_byte(url: str) -> None:
    with asking(url, BODY | {"stream": True}) as connection:
        seen = b""
        while b"finish_reason" not in seen:
            seen += connection.recv(20)
    assert b"[DONE]" not in seen


# --- clients that do not read -----------------------------------------------------------------------------------------


@pytest.fixture
def small_buffers(serve_module: Any, url: str) -> Iterator[None]:
    """Connections whose kernel buffers take little, so that a client that does not read is felt soon."""
    listener = serve_module.running(url)._listener
    usual = listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    yield
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, usual)


TALKATIVE = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True, "logprobs": 20}
"""Some 2 KB an event: soon more than all buffers between the engine and a client."""


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("byte_every_s", [None, 0.2], ids=["not at all", "byte by byte"])
def test_a_client_that_reads_too_slowly_is_cut(
    http: httpx.Client,
    url: str,
    engine: AsyncEngine,
    serve_module: Any,
    expected: list[int],
    byte_every_s: float | None,
) -> None:
    """It holds up nobody; CLIENT_TIMEOUT_S (1.5) after the last buffer is full its connection is dropped."""
    with closing(connect(url, receive_buffer=2048)) as connection:
        connection.sendall(raw_request(TALKATIVE))
        until(lambda: len(engine._streams) == 1)
        began = time.monotonic()
        assert tokens(http.post(GENERATE, json=BODY)) == expected
        while shares_in_use(serve_module, url):
            assert time.monotonic() - began < 15
            time.sleep(byte_every_s or 0.05)
            if byte_every_s is not None:
                connection.recv(1)
        until(lambda: is_clean(engine))
        rest = b""
        with suppress(ConnectionError):  # dropped: what was not sent is not waited for
            rest = connection.makefile("rb").read()
        assert b"[DONE]" not in rest


# --- the engine dies --------------------------------------------------------------------------------------------------

DEATHS: list[tuple[BaseException, str]] = [
    (RuntimeError("a secret of the engine"), "engine_dead"),
    (KeyboardInterrupt(), "engine_dead"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory"),
]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("a secret of the engine"), False),
        (SystemExit(3), False),
    ],
)
def test_what_counts_as_memory_that_ran_out(error: BaseException, is_memory: bool) -> None:
    assert isinstance(explained(error), OutOfMemory) == is_memory


@pytest.mark.parametrize(("error", "code"), DEATHS, ids=lambda value: type(value).__name__)
def test_a_step_that_raises(serve: Any, byte_checkpoint: Path, error: BaseException, code: str) -> None:
    """Everybody is told, /ready and new requests say 503, and the process is to end with an error."""
    url = serve(model_id=str(byte_checkpoint), log_level="error")
    running = serve.running(url)
    ending: list[BaseException] = []
    running.http._fail = ending.append  # the server stays, so that it can be asked
    faults = Faults(running.service.engine.engine)
    faults.forward.hold()
    with httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(3) as pool:
        whole = pool.submit(http.post, GENERATE, json=BODY)
        streamed = pool.submit(http.post, GENERATE, json=BODY | {"stream": True})
        several = pool.submit(http.post, "/v1/completions", json=BODY | {"n": 3})
        until(lambda: len(running.service.engine._streams) == 5)
        faults.forward.fail(error)
        faults.forward.release()
        for reply in (whole, several):
            assert reply.result().status_code == 500
            assert reply.result().json()["error"]["code"] == code
        assert f'"code":"{code}"' in streamed.result().text
        assert streamed.result().text.startswith("event: error")
        assert http.get("/live").status_code == 200
        for response in (http.get("/ready"), http.post(GENERATE, json=BODY)):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "dead"
            assert "secret" not in response.text
        assert 'prerope:engine_ready{model_name="tiny-llama"} 0.0' in http.get("/metrics").text
        until(lambda: bool(ending))
    if code == "out_of_memory":
        assert "KV_CACHE_MEMORY" in str(ending[0])
        assert ending[0].__cause__ is error
    else:
        assert ending[0] is error
    running.http.failure = ending[0]


@contextmanager
def process(checkpoint: Path, fault: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server with a fault in its fifth step, ready, and its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    started = start(
        *(fault, "--model-id", str(checkpoint), "--port", str(port), "--kv-cache-memory", "16MiB"),
        *("--max-model-len", "8192"),
        module="tests.faulty_server",
        **variables,
    )
    try:
        wait_for(f"{url}/ready")
        yield started, url
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate()


@pytest.mark.parametrize(
    ("fault", "said", "log_format"),
    every(2, [("exit", "SystemExit", "text"), ("raise", "a fault of the test", "json")], quick=0),
)
def test_a_dead_engine_ends_the_process_with_an_error(
    byte_checkpoint: Path, fault: str, said: str, log_format: str
) -> None:
    with process(byte_checkpoint, fault, LOG_FORMAT=log_format) as (served, url):
        response = httpx.post(url + GENERATE, json=BODY | {"prompt": "Sesame"}, timeout=60)
        assert response.status_code == 500
        out, err = served.communicate(timeout=30)
        assert served.returncode == 1
        assert "the engine died" in err
        assert said in err
        assert "Sesame" not in out + err
        assert "faulty_server.py" in err, "where it failed"
        assert "locals" not in err, "variables may hold what was sent"


@pytest.mark.slow
def test_a_step_that_never_ends_does_not_keep_the_process(byte_checkpoint: Path) -> None:
    """The request that hangs in it gets an error once SHUTDOWN_TIMEOUT_S is over."""
    with process(byte_checkpoint, "hang", SHUTDOWN_TIMEOUT_S="1") as (served, url), ThreadPoolExecutor(1) as pool:
        reply = pool.submit(httpx.post, url + GENERATE, json=BODY, timeout=60)
        until(lambda: "generation_tokens_total" in httpx.get(f"{url}/metrics").text)
        time.sleep(0.5)
        began = time.monotonic()
        served.send_signal(signal.SIGTERM)
        wait_for(f"{url}/ready", 503)
        assert reply.result().status_code == 503
        assert "shut down" in reply.result().json()["error"]["message"]
        served.communicate(timeout=30)
        assert served.returncode == 0
        assert time.monotonic() - began < 1 + 2 + 5 + 3  # its time, the step's, the connections', a busy machine's


ENDLESS = {"prompt": "Hello", "max_tokens": 8000, "ignore_eos": True, "stream": True}


@pytest.mark.slow
def test_what_outlasts_the_drain_ends_with_what_it_has(byte_checkpoint: Path) -> None:
    with (
        process(byte_checkpoint, "quote", SHUTDOWN_TIMEOUT_S="1") as (served, url),
        httpx.stream("POST", url + GENERATE, json=ENDLESS, timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        began = time.monotonic()
        served.send_signal(signal.SIGTERM)
        wait_for(f"{url}/ready", 503)
        refused = httpx.post(url + GENERATE, json=BODY)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        rest = [line for line in lines if line]
        assert '"finish_reason":"abort"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        served.communicate(timeout=30)
        assert served.returncode == 0
        assert 0.9 < time.monotonic() - began < 8
