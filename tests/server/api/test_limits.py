"""Who may ask for how much: keys, sizes, the queue, a key's share, deadlines, priority. Refusals have their numbers."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import pickle
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from prerope.server.api import keys as auth_keys
from prerope.server.api.dialects.kept_responses import with_history
from prerope.server.api.dialects.lowering.responses import ResponsesRequest
from prerope.server.api.fairness import Allowance, Hold
from prerope.server.api.keys import KeyRing
from prerope.server.api.middleware import ABORT
from prerope.server.api.replies import Replies
from prerope.server.api.requests.reading import ModelText
from prerope.server.api.requests.task import ReadTask
from prerope.server.config import EngineConfig
from prerope.server.engine.limits import check_room, retry_after_s
from prerope.server.errors import ClientGone, ConfigurationError, InvalidRequest, KeyBusy, QueueFull
from prerope.server.flags import load_settings
from prerope.server.service import Kept
from prerope.server.tokenizer import Tokenizer

from tests.faults import Faults

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
LONG_REPLY = {"max_tokens": 300, "ignore_eos": True, "temperature": 0}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return dict(response.json()["error"])


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.005)


@contextmanager
def in_background(*requests: Callable[[], httpx.Response]) -> Iterator[list[Future[httpx.Response]]]:
    with ThreadPoolExecutor(len(requests)) as pool:
        yield [pool.submit(request) for request in requests]


# --- keys -------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def write_keys(file: Path, text: str) -> None:
    """In one move, as a mounted secret changes: the inode is another."""
    new = file.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)


def test_a_key_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys", Clock()
    write_keys(file, "# ours\n\n  first  \nsecond # not a comment\n")
    ring = KeyRing(["fixed"], file, clock)
    for key in (b"first", b"second # not a comment", b"fixed"):
        assert ring.tenant(key)
    for key in (b"", b"# ours", b"second", b"first ", b"other"):
        assert ring.tenant(key) is None
    write_keys(file, "third\n")
    assert ring.tenant(b"first"), "looked at a second ago at most"
    clock.now += 1.0
    assert ring.tenant(b"first") is None
    assert ring.tenant(b"third")
    assert ring.tenant(b"fixed")


@pytest.mark.parametrize("loss", ["removed", "emptied", "no text"])
def test_a_key_file_that_has_lost_its_keys_opens_nothing(tmp_path: Path, loss: str) -> None:
    file, clock = tmp_path / "keys", Clock()
    write_keys(file, "first\n")
    ring = KeyRing([], file, clock)
    assert ring.tenant(b"first")
    if loss == "removed":
        file.unlink()
    else:
        file.write_bytes(b"# none\n" if loss == "emptied" else b"\xff\xfe\xfa")
    clock.now += 1.0
    assert ring.asks
    assert ring.tenant(b"first"), "its last keys go on"
    assert ring.tenant(b"other") is None


def test_keys_are_compared_whole_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(auth_keys.hmac, "compare_digest", counted)
    ring = KeyRing(["a", "bb" * 50, "ccc"])
    for given in (b"a", b"nobody's", b"", b"x" * 10_000):
        compared.clear()
        ring.tenant(given)
        assert compared == [(16, 16)] * 3, "digests of one length, and no end at the first match"


def test_a_tenant_is_no_hash_of_its_key_that_others_could_make() -> None:
    names = {KeyRing(["a key"]).tenant(b"a key") for _ in range(2)}
    assert len(names) == 2, "keyed by a secret of each ring"
    assert all(name and "key" not in name for name in names)


def test_a_key_file_must_hold_keys_at_the_start(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("# nothing yet\n", encoding="utf-8")
    for path in (empty, tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigurationError, match=r"API_KEY_FILE=.* is not allowed.*one key a line"):
            load_settings(["--api-key-file", str(path)])


def test_keys_of_the_variable_and_of_the_file(
    serve: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth_keys, "REREAD_S", 0.0)
    file = tmp_path / "keys"
    write_keys(file, "from-file\nschlüssel\n")
    url = serve(model_id=str(tiny_checkpoint), api_key="from-variable", api_key_file=file)

    def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}".encode()}
        return httpx.post(f"{url}/tokenize", json={"prompt": "a"}, headers=headers).status_code

    assert [status(key) for key in ("from-file", "schlüssel", "from-variable", "other")] == [200, 200, 200, 401]
    write_keys(file, "new\n")
    assert [status(key) for key in ("from-file", "new", "from-variable")] == [401, 200, 200]


# --- sizes, before anything is tokenised ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path) -> str:
    return str(serve_module(model_id=str(tiny_checkpoint), max_model_len=512, max_num_seqs=4, max_body_bytes="4MiB"))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (GENERATE, {"prompt": "x" * 1_000_000}),
        (GENERATE, {"prompt": "x" * 5_000_000}),
        (COMPLETIONS, {"prompt": ["x" * 1_000_000, "a"]}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 400_000}] * 3}),
        ("/tokenize", {"prompt": "x" * 1_000_000}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 1_000_000}]}),
    ],
    ids=["prompt", "body", "list", "chat", "tokenize", "tokenize chat"],
)
def test_the_tokenizer_never_sees_an_over_long_text(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    def must_not_be_called(*_: object, **__: object) -> list[int]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(Tokenizer, "encode", must_not_be_called)
    response = http.post(path, json=body)
    if response.status_code == 413:
        assert "MAX_BODY_BYTES" in error_of(response, 413)["message"]
    else:
        message = error_of(response, 400)["message"]
        assert "characters" in message
        assert "MAX_MODEL_LEN" in message


def test_nor_what_a_template_makes_of_a_short_one(
    http: httpx.Client, url: str, serve_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = serve_module.running(url).service.tokenizer
    monkeypatch.setattr(tokenizer._hf, "chat_template", "{{ messages[0]['content'] * 100000 }}")
    error = error_of(http.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 100}]}), 400)
    assert "10000000 characters" in error["message"]


LIMITS = ModelText(cast(Any, None), (), any_name=True, max_model_len=256, vocab_size=100)


@pytest.mark.parametrize("wrong", [-1, 100, 10**30])
def test_token_ids_outside_the_vocabulary(wrong: int) -> None:
    LIMITS.check_vocabulary([0, 99], "prompt")
    with pytest.raises(InvalidRequest, match=r"'prompt\[1\]' is .* 0 to 99") as refusal:
        LIMITS.check_vocabulary([5, wrong], "prompt")
    assert (refusal.value.param, refusal.value.code) == ("prompt", "bad_token_id")


def test_lengths_that_fit_and_that_do_not() -> None:
    for asked, default, granted in ((56, None, 56), (0, None, 0), (None, None, 56), (None, 16, 16), (None, 400, 56)):
        assert LIMITS.max_tokens_that_fit(200, asked, default) == granted
    for prompt, asked, param in ((256, 1, "prompt"), (300, None, "prompt"), (200, 57, "max_tokens")):
        with pytest.raises(InvalidRequest, match=rf"{prompt} tokens .* 256 tokens.* MAX_MODEL_LEN") as refusal:
            LIMITS.max_tokens_that_fit(prompt, asked, None)
        assert (refusal.value.param, refusal.value.code) == (param, "context_length_exceeded")


def test_a_conversation_is_not_copied_for_each_body_that_goes_on_with_it() -> None:
    """A body of a hundred bytes was one of eight megabytes while it waited for a worker, and a thousand may wait."""
    items = [{"role": "user", "content": "x" * 100}] * 10_000
    kept = Kept(json.dumps(items).encode(), b'[{"type":"message"}]', b"{}")
    service: Any = SimpleNamespace(conversations={("", f"resp-{0:032x}"): kept})
    body = b'{"input":"And?","previous_response_id":"resp-%032x"} ' % 0
    waiting = [with_history(service, body) for _ in range(100)]
    assert sum(len(piece) for pieces in waiting for piece in pieces if isinstance(piece, bytes)) < 100 * 1000
    task, expected = ReadTask(ResponsesRequest, waiting[0], strict=False), [*items, {"type": "message"}]
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.loads(pickle.dumps(task, protocol=5, buffer_callback=buffers.append), buffers=buffers)
    for pieces in (*waiting[:2], sent.pieces):
        assert json.loads(b"".join(pieces))["_history"] == {"id": f"resp-{0:032x}", "items": expected}
    empty: Any = SimpleNamespace(conversations={("", f"resp-{0:032x}"): Kept(b"[]", b"[1]", b"{}")})
    assert json.loads(b"".join(with_history(empty, body)))["_history"]["items"] == [1]


def test_large_replies_that_nobody_reads_make_room_for_later_ones() -> None:
    """Two megabytes of digits ask for twenty of tokens; a client that reads a byte now and then kept each of them."""

    async def rest(_: int) -> None:
        await asyncio.sleep(0)

    async def run() -> None:
        replies, dropped = Replies(rest, max_bytes=1_000_000), list[int]()

        def reply(number: int, size: int) -> AsyncGenerator[Any]:
            scope = {"state": {ABORT: lambda: dropped.append(number)}}
            return replies.in_pieces({"type": "http.response.body", "body": bytes([number]) * size}, scope)

        slow = [reply(number, 400_000) for number in range(2)]
        for one in slow:
            await anext(one)
        sent = [piece async for piece in reply(2, 700_000)]
        assert b"".join(piece["body"] for piece in sent) == b"\2" * 700_000
        assert [piece["more_body"] for piece in sent] == [True] * (len(sent) - 1) + [False]
        assert dropped == [0, 1], "the one that was on its way longest first, and no more than make room"
        for one in slow:
            with pytest.raises(ClientGone):
                await anext(one)
        assert sum([len(piece["body"]) async for piece in reply(3, 3_000_000)]) == 3_000_000, "one has room, alone"
        left = reply(4, 100_000)
        await anext(left)
        await left.aclose()
        assert replies.num_bytes == 0
        assert len(dropped) == 2

    asyncio.run(run())


# --- the queue --------------------------------------------------------------------------------------------------------

CONFIG = EngineConfig(max_queued_requests=4, max_queued_tokens=100)


def queue(num_waiting: int, num_waiting_tokens: int, num_running_tokens: int = 0, rate: float = 0.0) -> Any:
    """Statistics of an engine, as far as the queue is concerned."""
    return SimpleNamespace(
        num_waiting=num_waiting,
        num_waiting_tokens=num_waiting_tokens,
        num_running_tokens=num_running_tokens,
        prefill_tokens_per_s=rate,
    )


def test_room_for_all_sequences_of_a_request_or_for_none() -> None:
    check_room(CONFIG, queue(2, 50), 50, 2)
    check_room(CONFIG, queue(0, 0), 10_000, 1)  # alone it may wait, however long it is
    with pytest.raises(QueueFull, match="2 requests are waiting and 3 more would pass MAX_QUEUED_REQUESTS, 4"):
        check_room(CONFIG, queue(2, 50), 50, 3)
    with pytest.raises(QueueFull, match="50 prompt tokens are waiting and 51 more would pass MAX_QUEUED_TOKENS, 100"):
        check_room(CONFIG, queue(2, 50), 51, 2)


@pytest.mark.parametrize(("num_tokens", "num_sequences"), [(5, 5), (101, 2)])
def test_what_an_empty_queue_would_not_take_is_no_matter_of_waiting(num_tokens: int, num_sequences: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"{num_sequences} sequences .* {num_tokens} prompt tokens.* 4 .* 100 "):
        check_room(CONFIG, queue(0, 0), num_tokens, num_sequences)


@pytest.mark.parametrize(
    ("waiting", "running", "rate", "seconds"),
    [(0, 0, 50.0, 1), (1000, 0, 50.0, 20), (1000, 500, 50.0, 30), (1001, 0, 1000.0, 2), (5000, 0, 0.0, 5)],
)
def test_retry_after_is_the_backlog_over_the_measured_rate(
    waiting: int, running: int, rate: float, seconds: int
) -> None:
    assert retry_after_s(queue(9, waiting, running, rate)) == seconds


def test_retry_after_over_http(serve: Any, tiny_checkpoint: Path) -> None:
    """Prompts of 300 and 200 tokens while a step is held, and 20 tokens a second."""
    url = serve(model_id=str(tiny_checkpoint), max_num_seqs=1, max_queued_requests=2, max_model_len=512)
    engine = serve.running(url).service.engine
    faults = Faults(engine.engine)
    faults.forward.hold()
    with httpx.Client(base_url=url, timeout=60) as http:
        bodies = [{"prompt": [5] * length, "max_tokens": 1} for length in (300, 200)]
        with in_background(*(partial(http.post, GENERATE, json=body) for body in bodies)) as replies:
            until(lambda: len(engine._streams) == 2)
            engine._stats = replace(engine._stats, prefill_tokens_per_s=20.0)
            response = http.post(GENERATE, json={"prompt": "a", "max_tokens": 1})
            assert "2 requests are waiting and 1 more" in error_of(response, 429)["message"]
            assert int(response.headers["retry-after"]) == 500 / 20
            faults.forward.release()
            assert [reply.result().status_code for reply in replies] == [200, 200]


def test_a_refused_request_leaves_nothing_behind(serve: Any, tiny_checkpoint: Path) -> None:
    url = serve(model_id=str(tiny_checkpoint), max_num_seqs=1, max_queued_requests=3)
    engine = serve.running(url).service.engine
    steps = engine.stats().num_steps
    response = httpx.post(f"{url}{COMPLETIONS}", json={"prompt": ["a", "b"], "n": 2, "max_tokens": 5})
    assert "4 sequences" in error_of(response, 400)["message"]
    assert "retry-after" not in response.headers, "to wait would not help"
    assert engine.stats().num_steps == steps
    assert not engine._streams


# --- a key's share ----------------------------------------------------------------------------------------------------


def test_an_allowance_counts_sequences_of_each_tenant() -> None:
    allowance = Allowance(4, lambda: 9)
    first, second, other = Hold("one", allowance), Hold("one", allowance), Hold("two", allowance)
    first.count(1)
    first.count(3)
    second.count(1)
    with pytest.raises(KeyBusy, match=r"3 sequences .* 2 more would pass MAX_SEQS_PER_KEY, 4.* 9 s") as refusal:
        second.count(2)
    assert refusal.value.retry_after_s == 9
    with pytest.raises(InvalidRequest, match=r"5 sequences .* at most 4 .*MAX_SEQS_PER_KEY"):
        other.count(5)
    other.count(4)
    assert allowance.in_use == {"one": 4, "two": 4}
    Hold("", allowance).count(100)  # without keys there is nobody to count for


@pytest.fixture(scope="module")
def shared(serve_module: Any, tiny_checkpoint: Path) -> str:
    """A server of two keys, each with two sequences at a time."""
    return str(serve_module(model_id=str(tiny_checkpoint), max_model_len=4096, api_key="one,two", max_seqs_per_key=2))


@contextmanager
def streaming(url: str, key: str, **body: Any) -> Iterator[Iterator[str]]:
    """A stream that has begun."""
    sent = {"prompt": "a", "stream": True, "max_tokens": 3500, "ignore_eos": True} | body
    with httpx.stream("POST", url + COMPLETIONS, json=sent, headers=bearer(key), timeout=60) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()
        next(lines)
        yield lines


def ask(url: str, key: str, **body: Any) -> httpx.Response:
    sent = {"prompt": "a", "max_tokens": 1} | body
    return httpx.post(url + COMPLETIONS, json=sent, headers=bearer(key), timeout=60)


def test_one_key_cannot_take_everything(shared: str) -> None:
    with streaming(shared, "one"), streaming(shared, "one"):
        response = ask(shared, "one")
        error = error_of(response, 429)
        assert error["code"] == "key_busy"
        assert "MAX_SEQS_PER_KEY, 2" in error["message"]
        assert int(response.headers["retry-after"]) >= 1
        assert httpx.get(f"{shared}/v1/models", headers=bearer("one")).status_code == 200
        assert ask(shared, "two").status_code == 200
        assert ask(shared, "two", n=2).status_code == 200
    until(lambda: ask(shared, "one").status_code == 200)  # the clients have left


def test_choices_and_prompts_count_one_by_one(shared: str) -> None:
    error = error_of(ask(shared, "one", prompt=["a", "b", "c"]), 400)
    assert "3 sequences" in error["message"]
    with streaming(shared, "one"):
        assert "2 more" in error_of(ask(shared, "one", n=2), 429)["message"]
        assert ask(shared, "one").status_code == 200
    until(lambda: ask(shared, "one", n=2).status_code == 200)


def test_a_reply_that_has_ended_counts_no_more(shared: str) -> None:
    with streaming(shared, "one", n=2, max_tokens=3) as lines:
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    for _ in range(5):
        assert ask(shared, "one", n=2).status_code == 200
        assert ask(shared, "one", temperature=-1).status_code == 400


def test_without_keys_the_share_is_not_limited(serve: Any, tiny_checkpoint: Path) -> None:
    url = serve(model_id=str(tiny_checkpoint), max_seqs_per_key=1)
    assert ask(url, "whoever", n=4).status_code == 200


# --- deadlines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_steps(serve_module: Any, url: str) -> Iterator[Faults]:
    """Steps of at least 20 ms."""
    faults = Faults(serve_module.running(url).service.engine.engine)
    faults.forward.slow_down(0.02)
    yield faults
    faults.forward.slow_down(0.0)


def idle(serve_module: Any, url: str) -> bool:
    stats = serve_module.running(url).service.engine.stats()
    return stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
def test_a_reply_that_has_begun_ends_with_what_it_has(
    http: httpx.Client, url: str, serve_module: Any, path: str
) -> None:
    prompt: dict[str, Any] = {"prompt": "a"}
    if path == CHAT:
        prompt = {"messages": [{"role": "user", "content": "a"}]}
    began = time.monotonic()
    response = http.post(path, json=prompt | LONG_REPLY | {"timeout_s": 0.6})
    assert response.status_code == 200, response.text
    assert 0.5 < time.monotonic() - began < 5.0
    reply = response.json()
    choice = reply if path == GENERATE else reply["choices"][0]
    assert choice["finish_reason"] == "abort"
    assert 0 < reply["usage"]["completion_tokens"] < 300
    until(lambda: idle(serve_module, url))


@pytest.mark.usefixtures("slow_steps")
def test_a_stream_that_has_begun_ends_with_its_reason(http: httpx.Client, url: str, serve_module: Any) -> None:
    body = {"prompt": "a", "stream": True, "timeout_s": 0.6} | LONG_REPLY
    lines = [line for line in http.post(GENERATE, json=body).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["finish_reason"] == "abort"
    until(lambda: idle(serve_module, url))


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_a_cut_reply_is_not_called_one_of_full_length(http: httpx.Client, path: str, stream: bool) -> None:
    asked = {"messages": [{"role": "user", "content": "a"}]} if path == "/v1/messages" else {"input": "a"}
    length = {"max_tokens" if path == "/v1/messages" else "max_output_tokens": 300, "ignore_eos": True}
    response = http.post(path, json={**asked, **length, "timeout_s": 0.6, "stream": stream})
    said = response.text.split("event: error\ndata: ")[1] if stream else response.text
    assert response.status_code == (200 if stream else 504)
    assert json.loads(said)["error"]["code"] == "reply_cut"
    assert "max_tokens" not in response.text
    assert 'max_output_tokens"}' not in response.text


def test_nor_by_ollama(serve: Any, tiny_checkpoint: Path) -> None:
    """Whose clients name no deadline: it is the server's."""
    url = serve(model_id=str(tiny_checkpoint), request_timeout_s=0.6)
    Faults(serve.running(url).service.engine.engine).forward.slow_down(0.02)
    asked = {"messages": [{"role": "user", "content": "a"}], "options": {"num_predict": 300, "temperature": 0}}
    whole = httpx.post(f"{url}/api/chat", json={**asked, "stream": False}, timeout=60)
    assert whole.status_code == 504
    streamed = httpx.post(f"{url}/api/chat", json=asked, timeout=60).text.splitlines()
    assert whole.json()["error"] == json.loads(streamed[-1])["error"]
    assert whole.json()["error"].startswith("The reply was cut before its end")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_request_that_waited_in_vain_gets_an_error(
    http: httpx.Client, url: str, serve_module: Any, slow_steps: Faults, stream: bool
) -> None:
    """Four streams hold all the places; the fifth never leaves the queue."""
    slow_steps.forward.hold()
    requests = [lambda: http.post(GENERATE, json={"prompt": "a", "max_tokens": 30, "ignore_eos": True})] * 4
    with in_background(*requests) as replies:
        assert slow_steps.forward.entered.wait(20)
        engine = serve_module.running(url).service.engine
        until(lambda: len(engine._streams) == 4)
        slow_steps.forward.release()
        response = http.post(GENERATE, json={"prompt": "a", "timeout_s": 0.1, "stream": stream})
        assert all(reply.result().status_code == 200 for reply in replies)
    if stream:
        frame = response.text.split("event: error\ndata: ")[1]
        error = json.loads(frame)["error"]
    else:
        error = error_of(response, 504)
    assert error["code"] == "deadline_exceeded"
    assert error["type"] == "timeout_error"
    for said in ("before its first token", "0 of 1 prompt tokens", "timeout_s", "REQUEST_TIMEOUT_S"):
        assert said in error["message"]
    until(lambda: idle(serve_module, url))


def test_the_deployments_limit_holds_beside_the_requests(serve: Any, tiny_checkpoint: Path) -> None:
    url = serve(model_id=str(tiny_checkpoint), request_timeout_s=0.4)
    Faults(serve.running(url).service.engine.engine).forward.slow_down(0.02)
    began = time.monotonic()
    reply = httpx.post(url + GENERATE, json={"prompt": "a", "timeout_s": 60} | LONG_REPLY, timeout=60).json()
    assert reply["finish_reason"] == "abort"
    assert time.monotonic() - began < 5.0
    beams = {"prompt": "a", "use_beam_search": True, "n": 2} | LONG_REPLY
    refused = httpx.post(url + COMPLETIONS, json=beams, timeout=60)
    assert error_of(refused, 504)["code"] == "deadline_exceeded", "of all steps of a search together"
    until(lambda: idle(serve, url))


@pytest.mark.parametrize("value", [0, -1, "soon", True, 1e300])
def test_a_timeout_is_a_number_above_zero(http: httpx.Client, value: object) -> None:
    assert error_of(http.post(GENERATE, json={"prompt": "a", "timeout_s": value}), 400)["param"] == "timeout_s"


# --- priority ---------------------------------------------------------------------------------------------------------


def test_a_lower_priority_number_overtakes_in_the_queue(serve: Any, tiny_checkpoint: Path) -> None:
    url = serve(model_id=str(tiny_checkpoint), max_num_seqs=1)
    engine = serve.running(url).service.engine
    faults = Faults(engine.engine)
    faults.forward.hold()
    done: list[int] = []

    def send(http: httpx.Client, priority: int) -> httpx.Response:
        response = http.post(GENERATE, json={"prompt": "a", "max_tokens": 3, "priority": priority})
        done.append(priority)
        return response

    with httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(5) as pool:
        futures = [pool.submit(send, http, 0)]
        assert faults.forward.entered.wait(20)
        for priority in (5, 3, -2, 0):
            futures.append(pool.submit(send, http, priority))
            until(lambda: len(engine._streams) == len(futures))
        faults.forward.slow_down(0.05)  # so that replies come one by one
        faults.forward.release()
        assert [future.result().status_code for future in futures] == [200] * 5
    assert done == [0, -2, 0, 3, 5]


@pytest.mark.parametrize(("allowed", "status"), [(None, 400), (False, 400), (True, 200)])
def test_with_keys_a_request_does_not_choose_its_place(
    serve: Any, tiny_checkpoint: Path, allowed: bool | None, status: int
) -> None:
    """One key would be served at the cost of the others."""
    url = serve(model_id=str(tiny_checkpoint), api_key="a", priority_per_request=allowed)
    body = {"prompt": "a", "max_tokens": 1}
    assert httpx.post(url + GENERATE, json=body | {"priority": 0}, headers=bearer("a")).status_code == 200
    response = httpx.post(url + GENERATE, json=body | {"priority": -(2**31) + 1}, headers=bearer("a"))
    assert response.status_code == status
    if status == 400:
        assert "PRIORITY_PER_REQUEST" in error_of(response, 400)["message"]


def test_beams_and_prompt_together_have_a_limit(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step gives all of them to the engine anew, which costs whoever else is served."""
    monkeypatch.setattr("prerope.server.api.beams.MOST_TOKENS", 32)
    asked = {"prompt": [5] * 12, "use_beam_search": True, "n": 2}
    assert httpx.post(f"{url}{COMPLETIONS}", json=asked | {"max_tokens": 4}, timeout=60).status_code == 200
    refused = httpx.post(f"{url}{COMPLETIONS}", json=asked | {"max_tokens": 5}, timeout=60)
    assert "2 beams of up to 17 tokens" in error_of(refused, 400)["message"]


def test_a_search_is_as_many_sequences_as_it_has_beams(serve: Any, tiny_checkpoint: Path) -> None:
    """Two prompts of three replies each: three at a time, where the queue takes four; five beams never have room."""
    url = serve(model_id=str(tiny_checkpoint), max_num_seqs=1, max_queued_requests=4)
    asked = {"prompt": ["a", "b"], "use_beam_search": True, "max_tokens": 3}
    reply = httpx.post(f"{url}{COMPLETIONS}", json=asked | {"n": 3}, timeout=60)
    assert [choice["index"] for choice in reply.json()["choices"]] == [*range(6)], reply.text
    assert (
        "5 sequences" in error_of(httpx.post(f"{url}{COMPLETIONS}", json=asked | {"n": 5}, timeout=60), 400)["message"]
    )
    prompts = ["a"] * 5
    refused = httpx.post(f"{url}{COMPLETIONS}", json=asked | {"prompt": prompts, "n": 2}, timeout=60)
    assert "5 sequences" in error_of(refused, 400)["message"], "nor do so many prompts"


def test_a_search_that_has_begun_waits_until_others_leave_room(serve: Any, tiny_checkpoint: Path) -> None:
    url = serve(model_id=str(tiny_checkpoint), max_num_seqs=1, max_queued_requests=3)
    engine = serve.running(url).service.engine
    faults = Faults(engine.engine)
    faults.forward.hold()
    beams = {"prompt": "a", "use_beam_search": True, "n": 3, "max_tokens": 3}
    with httpx.Client(base_url=url, timeout=60) as http:
        search = partial(http.post, COMPLETIONS, json=beams)
        others = [partial(http.post, GENERATE, json={"prompt": "b", "max_tokens": 2})] * 2
        with in_background(search) as first:
            assert faults.forward.entered.wait(20)
            with in_background(*others) as rest:
                until(lambda: len(engine._streams) == 3)
                refused = http.post(COMPLETIONS, json=beams)
                faults.forward.release()
        assert error_of(refused, 429), "one that has not begun"
        assert [reply.result().status_code for reply in (*first, *rest)] == [200] * 3
