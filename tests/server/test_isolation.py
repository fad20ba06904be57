"""What one client may learn of another, and what logs, metrics and errors may know of any: nothing that was sent."""

from __future__ import annotations

import json
import random
import re
import signal
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import dropwhile
from pathlib import Path
from typing import Any

import httpx
import pytest
from prerope.server.api.running import prefix_salt
from prerope.server.byte_cache import IDLE_S, ByteCache

from tests.faulty_server import QUOTED
from tests.server.api.test_errors import BAD_VALUES
from tests.server.test_cli import ROOT, free_port, start, wait_for
from tests.tiers import every

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
PROMPT = list(range(100, 180))
WHOLE_BLOCKS = 64
"""Of its 80 tokens: the last one is always computed, in blocks of 16."""

# --- prefixes ---------------------------------------------------------------------------------------------------------


def cached(url: str, path: str = GENERATE, key: str = "", **body: Any) -> int:
    """Tokens of the same prompt that came from the cache."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    sent = {"prompt": PROMPT, "max_tokens": 1} | body
    usage = httpx.post(url + path, json=sent, headers=headers, timeout=60).json()["usage"]
    return int(usage["cached_tokens"] if path == GENERATE else usage["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS])
def test_a_salt_separates_prefixes(serve: Any, tiny_checkpoint: Path, path: str) -> None:
    url = serve(model_id=str(tiny_checkpoint), max_model_len=512)
    assert cached(url, path, cache_salt="one") == 0
    assert cached(url, path, cache_salt="one") == WHOLE_BLOCKS
    assert cached(url, path, cache_salt="two") == 0, "another's prefix does not show"
    assert cached(url, path) == 0
    assert cached(url, path, cache_salt="one") == WHOLE_BLOCKS


def test_keys_separate_prefixes_unless_told_otherwise(serve: Any, tiny_checkpoint: Path) -> None:
    settings = {"model_id": str(tiny_checkpoint), "api_key": "one,two", "max_model_len": 512}
    apart, together = serve(**settings), serve(prefix_sharing="all", **settings)
    assert [cached(apart, key="one"), cached(apart, key="one")] == [0, WHOLE_BLOCKS]
    assert cached(apart, key="two") == 0
    assert cached(apart, key="one", cache_salt="x") == 0, "a salt separates one key's own prefixes, too"
    assert cached(apart, key="two", cache_salt="x") == 0
    assert [cached(together, key="one"), cached(together, key="two")] == [0, WHOLE_BLOCKS]


def test_no_salt_of_one_key_reaches_the_prefixes_of_another() -> None:
    class Settings:
        prefix_sharing = "key"

    class Service:
        settings = Settings()

    tenants = ["0" * 32, "0" * 31 + "1"]
    salts = {prefix_salt(Service(), tenant, salt) for tenant in tenants for salt in ("", "1", tenants[0], tenants[1])}  # type: ignore[arg-type]
    assert len(salts) == 8


def test_what_one_keeps_is_not_lost_to_another() -> None:
    """Whoever fills a cache gives up his own; somebody's that is within an equal share stays while he is there."""
    cache: ByteCache[tuple[str, int], str] = ByteCache(1000)
    for index in range(3):
        cache.put(("small", index), "s", 100, "small")
    for index in range(50):
        cache.put(("greedy", index), "g", 100, "greedy")
        assert cache.num_bytes <= 1000
    assert [cache.get(("small", index)) for index in range(3)] == ["s"] * 3
    assert [cache.get(("greedy", index)) is None for index in range(50)] == [True] * 43 + [False] * 7
    cache.put(("third", 0), "t", 300, "third")
    assert [cache.get(("third", 0)), cache.get(("small", 0))] == ["t", "s"]
    cache.put(("third", 0), "t", 100, "third")
    assert cache.stats().num_bytes == 100 * cache.stats().num_entries
    cache.put(("third", 1), "t", 1001, "third")
    assert cache.get(("third", 1)) is None


def test_responses_of_one_key_are_neither_read_nor_pushed_out_by_another(
    serve: Any, byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two keys, one of which keeps more than there is room for."""
    monkeypatch.setattr("prerope.server.service.MAX_CONVERSATION_BYTES", room := 64 * 1024)
    url = serve(model_id=str(byte_checkpoint), api_key="small,greedy")
    small, greedy = (
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) for key in ("small", "greedy")
    )

    def keep(http: httpx.Client, **more: Any) -> httpx.Response:
        return http.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 1, **more}, timeout=60)

    def told(http: httpx.Client, response_id: str) -> int:
        return http.get(f"/v1/responses/{response_id}").status_code

    with small, greedy:
        own = keep(small).json()["id"]
        filled = [{"role": "user", "content": "x" * (room // 8)}, {"role": "user", "content": "Hi"}]
        others = [keep(greedy, input=filled, truncation="auto").json()["id"] for _ in range(9)]
        assert [told(small, own), told(greedy, own), told(small, others[-1])] == [200, 404, 404]
        assert [told(greedy, one) for one in others] == [404] * 3 + [200] * 6, "of some 9.6 kB each"
        assert [keep(http, previous_response_id=own).status_code for http in (small, greedy)] == [200, 400]
        assert greedy.delete(f"/v1/responses/{own}").status_code == 404
        said = greedy.get("/metrics").text
    held = re.search(r'prerope:cache_bytes{cache="conversations".*} (.*)', said)
    assert held is not None
    assert 0.8 * room < float(held[1]) <= room


def test_the_owner_of_the_most_gives_up_whatever_came_before() -> None:
    """Held to what is left of every key that was put, in random histories of owners who come and go."""
    draw, sizes = random.Random(0), dict[int, tuple[str, int]]()
    cache: ByteCache[int, str] = ByteCache(300, lambda: 0.0)
    for _ in range(5000):
        key, owner, size = draw.randrange(40), f"owner {draw.randrange(8)}", draw.randrange(1, 120)
        shares = Counter[str]()
        for one, (name, taken) in sizes.items():
            shares[name] += taken if one != key else 0
        shares[owner] += size
        cache.put(key, "", size, owner)
        sizes = {one: told for one, told in (sizes | {key: (owner, size)}).items() if cache.get(one) is not None}
        left = Counter[str]()
        for name, taken in sizes.values():
            left[name] += taken
        assert left.total() == cache.num_bytes <= 300
        most = max(left.values(), default=0)
        assert all(shares[name] == left[name] or left[name] + 120 > most for name in shares), "one who kept less lost"


def test_those_who_are_gone_hold_no_room() -> None:
    """Many small ones fill a cache: who comes later keeps something larger once they have used nothing for long."""
    now = 0.0
    cache: ByteCache[str, str] = ByteCache(1000, lambda: now)
    for index in range(100):
        cache.put(f"small {index}", "s", 10, f"owner {index}")
    cache.put("large", "l", 500, "late")
    assert cache.get("large") is None, "all of them are there"
    now = IDLE_S
    assert cache.get("small 7") == "s"
    now += 1.0
    cache.put("large", "l", 500, "late")
    assert [cache.get("large"), cache.get("small 7")] == ["l", "s"]
    assert len(cache) == 51


# --- the grep ---------------------------------------------------------------------------------------------------------


@dataclass
class Secrets:
    """Marked text for every place of a request. `words` is what must be found nowhere else; but what is `named` may be
    repeated by the error that refuses it: a model that is not served, what is wrong in a schema."""

    words: list[str] = field(default_factory=list)
    named: set[str] = field(default_factory=set)

    def __call__(self, place: str, *, named: bool = False) -> str:
        word = f"geheim{len(self.words)}{place}"
        self.words.append(word)
        self.named |= {word} if named else set()
        return word

    def found_in(self, text: str) -> list[str]:
        return [word for word in self.words if word.lower() in text.lower()]


KEY = "geheim-key-of-the-deployment"


def requests_with(secret: Secrets) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, path, httpx's arguments): good ones and refused ones, each with secrets wherever text may stand."""
    chat = {"messages": [{"role": "user", "content": secret("message") + " ünïcödé 🤫"}]}
    text = {"prompt": f"{secret('prompt')} 🤐 {secret('日本')}"}
    common = {"max_tokens": 3, "cache_salt": secret("salt"), "stop": [secret("stop")], "seed": 1}
    for stream in (False, True):
        yield "POST", GENERATE, {"json": text | common | {"stream": stream, "logprobs": 2}}
        yield "POST", COMPLETIONS, {"json": text | common | {"stream": stream, "user": secret("user"), "echo": True}}
        yield "POST", CHAT, {"json": chat | common | {"stream": stream, "metadata": {"a": secret("metadata")}}}
    yield "POST", "/tokenize", {"json": text | {"return_token_strs": True}}
    yield "POST", "/tokenize", {"json": chat}
    yield "POST", GENERATE, {"json": {"prompt": secret("long") * 100_000}}
    yield "POST", CHAT, {"json": {"messages": [{"role": "user", "content": secret("long chat") * 100_000}]}}
    yield "POST", GENERATE, {"json": {"prompt": f"{QUOTED} {secret('tokenizer error')}"}}
    yield "POST", GENERATE, {"json": {"prompt": f"{QUOTED} {secret('tokenizer error')}" * 300, "stream": True}}
    for name in ("temperature", "max_tokens", "seed", "stream", "stop_token_ids", "logit_bias", "rope", "timeout_s"):
        yield "POST", GENERATE, {"json": text | {name: secret("in " + name)}}
    for name in ("logprobs", "top_logprobs", "stream_options", "chat_template_kwargs", "n"):
        yield "POST", CHAT, {"json": chat | {name: secret("in " + name)}}
    for wrong in (secret("as content"), [secret("in a list")], {"a": secret("in an object")}):
        yield "POST", GENERATE, {"json": {"prompt": {"a": wrong}}}
        yield "POST", COMPLETIONS, {"json": {"prompt": [wrong, 5]}}
        yield "POST", CHAT, {"json": {"messages": [wrong]}}
        yield "POST", CHAT, {"json": {"messages": [{"role": "user", "content": [{"type": "text", "text": [wrong]}]}]}}
        yield "POST", "/detokenize", {"json": {"tokens": wrong}}
    yield "POST", GENERATE, {"json": text | {"cache_salt": secret("too long") * 100}}
    yield "POST", GENERATE, {"json": text | {"stop": [secret("too long") * 500]}}
    yield "POST", GENERATE, {"json": text | {"stop": {"a": secret("no list")}}}
    yield "POST", GENERATE, {"content": b'{"prompt": "' + secret("broken").encode() + b'", ', **JSON}
    yield "POST", GENERATE, {"content": b'{"prompt": "' + secret("surrogate").encode() + rb'\ud800"}', **JSON}
    yield "POST", GENERATE, {"content": secret("no json").encode(), "headers": {"content-type": "text/plain"}}
    yield "POST", GENERATE, {"json": text, "headers": {"Authorization": f"Bearer {secret('wrong key')}"}}
    yield "POST", GENERATE, {"json": text, "headers": {"Authorization": secret("no scheme")}}
    yield "POST", GENERATE, {"json": text, "params": {"prompt": secret("query")}}
    yield "GET", f"/{secret('route')}", {}
    yield "GET", f"/v1/models/{secret('model', named=True)}", {"headers": {"Cookie": secret("cookie")}}
    yield "GET", "/v1/models/", {}
    yield secret("METHOD"), "/health", {}
    types = {"type": secret("type", named=True)}, {"enum": [secret("enum")]}, {"$ref": secret("ref", named=True)}
    for schema in types:
        yield "POST", GENERATE, {"json": text | {"json_schema": schema, "max_tokens": 3}}
    yield "POST", GENERATE, {"json": text | {"regex": f"({secret('regex', named=True)}", "max_tokens": 3}}
    yield "POST", GENERATE, {"json": text | {"choice": [secret("choice")], "max_tokens": 3}}


JSON = {"headers": {"content-type": "application/json"}}


@dataclass
class Drive:
    """What a server said while all those requests were made."""

    secret: Secrets
    errors: list[str] = field(default_factory=list)
    metrics: str = ""
    log: str = ""
    statuses: set[int] = field(default_factory=set)
    token_ids: str = ""
    log_format: str = "text"


@pytest.fixture(scope="module", params=every(2, ["json", "text"], quick=0))
def drive(request: pytest.FixtureRequest, byte_checkpoint: Path) -> Drive:
    """All requests against a process whose tokenizer quotes some prompts in its errors, at LOG_LEVEL=debug."""
    port, seen = free_port(), Drive(Secrets([KEY]), log_format=request.param)
    url = f"http://127.0.0.1:{port}"
    with start(
        *("quote", "--model-id", str(byte_checkpoint), "--port", str(port), "--kv-cache-memory", "16MiB"),
        *("--max-model-len", "512"),
        module="tests.faulty_server",
        API_KEY=KEY,
        LOG_LEVEL="debug",
        LOG_FORMAT=request.param,
    ) as process:
        try:
            wait_for(f"{url}/ready")
            with httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as http:
                _send_all(http, seen)
                ids = http.post("/tokenize", json={"prompt": f"{QUOTED[:3]} a prompt of some tokens"}).json()["tokens"]
                http.post(GENERATE, json={"prompt": ids, "max_tokens": 2}, headers={"x-request-id": "mine"})
                http.post(GENERATE, json={"prompt": [*ids, -5]})
                seen.token_ids = ", ".join(map(str, ids))
                seen.metrics = http.get("/metrics").text
        finally:
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
    seen.log = out + err
    return seen


def _send_all(http: httpx.Client, seen: Drive) -> None:
    for method, path, arguments in requests_with(seen.secret):
        response = http.request(method, path, **arguments)
        seen.statuses.add(response.status_code)
        if response.status_code >= 400:
            seen.errors.append(response.text)
        elif "event: error" in response.text:
            seen.errors.append(response.text.split("event: error")[1])
    for path, body, _, _ in BAD_VALUES:
        response = http.post(path, json=body)
        if response.status_code >= 400:
            seen.errors.append(response.text)


def test_the_drive_meets_what_it_is_about(drive: Drive) -> None:
    assert {200, 400, 401, 404, 405, 500} <= drive.statuses, "else the grep proves little"
    assert len(drive.errors) > 60
    assert "request failed" in drive.log
    assert "tokenizer.py" in drive.log or "faulty_server.py" in drive.log, "where it failed is in the log"
    assert "debug" in drive.log.lower()


def test_the_log_can_be_json(drive: Drive) -> None:
    """All of it, once what is imported has warned, and a request is found by its id."""
    if drive.log_format == "json":
        written = dropwhile(lambda line: not line.startswith("{"), drive.log.splitlines())
        lines = [json.loads(line) for line in written]
        assert any(line["event"] == "ready" and line["url"].startswith("http://") for line in lines)
        assert any(
            line["event"] == "request" and line["request_id"] == "mine" and line["status"] == 200 for line in lines
        )


@pytest.mark.parametrize("of", ["log", "metrics"])
def test_nothing_that_was_sent_is_in(drive: Drive, of: str) -> None:
    text: str = getattr(drive, of)
    assert len(text) > 1000
    unescaped = re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), text)
    for shown in (text, unescaped):
        assert drive.secret.found_in(shown) == []
    assert "ünïcödé" not in unescaped
    assert "🤫" not in unescaped
    assert drive.token_ids not in text


def test_nothing_that_was_sent_comes_back_in_an_error(drive: Drive) -> None:
    for text in drive.errors:
        assert set(drive.secret.found_in(text)) <= drive.secret.named, text


def test_no_error_shows_a_path_or_a_traceback(drive: Drive, byte_checkpoint: Path) -> None:
    paths = {str(ROOT), str(byte_checkpoint.parent), sys.prefix, sysconfig.get_path("purelib"), str(Path.home()), ".py"}
    for text in drive.errors:
        for path in paths - {"/"}:
            assert path not in text, text
        assert "Traceback" not in text
        body = json.loads(text.partition("data: ")[2] if text.startswith("\n") else text)
        assert set(body["error"]) == {"message", "type", "param", "code"}


def test_while_it_loads_no_path_is_shown(serve: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/ready says what loading does; each stage is looked at."""

    from prerope.server import service

    stages: list[str] = []
    report: Callable[[Any, str], None] = service.Service.report

    def noted(self: Any, stage: str) -> None:
        stages.append(stage)
        report(self, stage)

    monkeypatch.setattr(service.Service, "report", noted)
    serve(model_id=str(tiny_checkpoint))
    assert len(stages) >= 4
    for stage in stages:
        assert str(tiny_checkpoint.parent) not in stage
        assert str(ROOT) not in stage
