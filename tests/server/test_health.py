"""What surrounds the endpoints: probes, metrics, keys, size limits, ids, and errors in one shape."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prerope.server import service as app_service
from prerope.server.engine.engine import Engine

from tests.faults import Faults

BODY = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path) -> str:
    return str(
        serve_module(
            model_id=str(tiny_checkpoint),
            api_key="one, two",
            cors_allow_origin="https://page.example",
            max_body_bytes="8KiB",
        )
    )


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30, headers={"Authorization": "Bearer two"}) as client:
        yield client


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a reply, which has this shape whatever went wrong."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- ready or not ---


@pytest.fixture
def loading_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Loading stops at its first step until the event is set."""
    release = threading.Event()
    resolve = app_service.resolve_checkpoint

    def held(*args: Any, **kwargs: Any) -> Any:
        release.wait(60)
        return resolve(*args, **kwargs)

    monkeypatch.setattr(app_service, "resolve_checkpoint", held)
    yield release
    release.set()


def test_while_the_model_loads_the_process_lives_and_is_not_ready(
    serve: Any, tiny_checkpoint: Path, loading_held: threading.Event
) -> None:
    url = serve(model_id=str(tiny_checkpoint), wait=False)
    with httpx.Client(base_url=url, timeout=30) as http:
        assert http.get("/live").status_code == http.head("/live").status_code == 200
        assert [http.get(path).status_code for path in ("/health", "/ping")] == [503, 503]
        assert http.head("/health").status_code == 503
        response = http.get("/ready")
        assert "loading" in error_of(response, 503)["message"]
        assert int(response.headers["retry-after"]) > 0
        assert "loading" in error_of(http.post("/generate", json=BODY), 503)["message"]
        assert 'prerope:engine_ready{model_name="tiny-llama"} 0.0' in http.get("/metrics").text
        loading_held.set()
        serve.running(url).wait_until_ready()
        assert [http.get(path).status_code for path in ("/health", "/ping", "/live")] == [200, 200, 200]
        assert http.post("/ping").status_code == 200
        assert http.get("/ready").json() == {"status": "ready", "model": "tiny-llama"}
        assert http.post("/generate", json=BODY).status_code == 200


def test_when_the_engine_dies_requests_fail_and_the_process_ends_for_its_supervisor(
    serve: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(model_id=str(tiny_checkpoint), log_level="error")
    running = serve.running(url)

    def broken(_: Engine) -> None:
        raise RuntimeError("/secret/path: out of memory")

    monkeypatch.setattr(Engine, "step", broken)
    with httpx.Client(base_url=url, timeout=30) as http:
        error = error_of(http.post("/generate", json=BODY), 500)
        assert "secret" not in str(error)
    eventually(lambda: running.http.failure is not None)
    assert "out of memory" in str(running.http.failure)
    with pytest.raises(app_service.EngineUnavailable, match="stopped"):
        running.service.engine.require_ready()
    eventually(lambda: not running._thread.is_alive())


def test_notice_is_given_before_the_drain(serve: Any, tiny_checkpoint: Path) -> None:
    url = serve(model_id=str(tiny_checkpoint), shutdown_notice_s=2)
    running = serve.running(url)
    with httpx.Client(base_url=url, timeout=30) as http:
        running.http.handle_exit(15, None)
        eventually(lambda: http.get("/health").status_code == 503)
        assert "about to shut down" in error_of(http.get("/ready"), 503)["message"]
        assert http.post("/generate", json=BODY).status_code == 200
    eventually(lambda: not running._thread.is_alive())


def test_a_draining_server_is_not_ready_and_refuses_new_work(serve: Any, tiny_checkpoint: Path) -> None:
    url = serve(model_id=str(tiny_checkpoint), shutdown_timeout_s=60)
    running = serve.running(url)
    Faults(running.service.engine.engine).forward.slow_down(0.01)  # the stream outlives what is asked beside it
    with (
        httpx.Client(base_url=url, timeout=30) as http,
        http.stream("POST", "/generate", json=BODY | {"max_tokens": 200, "ignore_eos": True, "stream": True}) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        running.http.handle_exit(15, None)
        eventually(lambda: running.service.engine.state == "draining")
        with httpx.Client(base_url=url, timeout=30) as other:
            assert "shutting down" in error_of(other.get("/ready"), 503)["message"]
            assert other.get("/health").status_code == 503
            assert other.get("/live").status_code == 200
            assert "shutting down" in error_of(other.post("/generate", json=BODY), 503)["message"]
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]
    assert '"finish_reason":"length"' in rest[-4]
    eventually(lambda: not running._thread.is_alive())
    assert running.http.failure is None


# --- metrics ---


def samples(text: str) -> dict[str, float]:
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_metrics_count_what_happened_under_vllms_names(http: httpx.Client) -> None:
    label = '{model_name="tiny-llama"}'
    before = samples(http.get("/metrics").text)
    reply = http.post("/generate", json=BODY | {"ignore_eos": True, "max_tokens": 5}).json()
    after = samples(http.get("/metrics").text)

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grew(f"vllm:generation_tokens_total{label}") == 5
    assert grew(f"vllm:prompt_tokens_total{label}") == reply["usage"]["prompt_tokens"]
    assert grew(f"vllm:time_to_first_token_seconds_count{label}") == 1
    assert grew(f"vllm:inter_token_latency_seconds_count{label}") == 4
    assert grew(f"vllm:e2e_request_latency_seconds_count{label}") == 1
    assert grew('vllm:request_success_total{finished_reason="length",model_name="tiny-llama"}') == 1
    assert grew('prerope:http_requests_total{handler="/generate",method="POST",status="200"}') == 1
    assert after[f"vllm:num_requests_running{label}"] == 0
    assert after[f"vllm:num_requests_waiting{label}"] == 0
    assert after[f"vllm:kv_cache_usage_perc{label}"] == 0
    speculation = [f"spec_decode_num_{name}" for name in ("drafts", "draft_tokens", "accepted_tokens")]
    for name in ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", *speculation):
        assert f"vllm:{name}_total{label}" in after
    assert any(name.startswith("prerope:position_method_info{") and 'method="' in name for name in after)
    state = next(name for name in after if name.startswith("prerope:cuda_graphs_state_info{"))
    assert 'state="off"' in state
    assert "for a GPU" in state
    assert after["process_resident_memory_bytes"] > 0


def test_a_request_that_a_stop_string_ended_is_in_every_histogram(http: httpx.Client) -> None:
    text = http.post("/generate", json=BODY | {"max_tokens": 8, "ignore_eos": True}).json()["text"]
    before = samples(http.get("/metrics").text)
    reply = http.post("/generate", json=BODY | {"max_tokens": 300, "ignore_eos": True, "stop": text[len(text) // 2 :]})
    assert reply.json()["finish_reason"] == "stop"
    after = samples(http.get("/metrics").text)
    phases = ("queue_time", "prefill_time", "decode_time", "time_per_output_token")
    names = ["vllm:e2e_request_latency_seconds", *(f"vllm:request_{phase}_seconds" for phase in phases)]
    for name in names:
        assert (
            after[f'{name}_count{{model_name="tiny-llama"}}'] == before[f'{name}_count{{model_name="tiny-llama"}}'] + 1
        )
    timings = reply.json()["timings"]
    assert min(timings.values()) >= 0
    assert sum(timings.values()) > 0


def test_routes_are_counted_by_their_template(http: httpx.Client) -> None:
    http.get("/v1/models/tiny-llama")
    http.get("/no/such/route")
    http.get("/v1/responses/s/input_items")
    http.get("/v1/responses/input_items/input_items")
    http.get("/v1/models/some/one")
    http.get("/v1/models//")
    found = [name for name in samples(http.get("/metrics").text) if name.startswith("prerope:http_requests_total")]
    assert any('handler="/v1/models/{model}"' in name for name in found), found
    assert any('handler="/v1/responses/{response_id}/input_items"' in name for name in found), found
    assert not any(said in name for name in found for said in ("/some/", "models//", "items/", "/s/")), found
    assert any('handler="unmatched"' in name and 'status="404"' in name for name in found)


# --- keys ---


@pytest.mark.parametrize("header", [None, "Bearer three", "Bearer", "Basic two", "two", "Bearer öne"])
def test_a_missing_or_wrong_key_is_refused(url: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    response = httpx.post(f"{url}/generate", json=BODY, headers=headers)
    error = error_of(response, 401)
    assert error["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"
    for key in ("one", "two", "three"):
        assert f"'{key}'" not in error["message"]


@pytest.mark.parametrize("key", ["one", "two"])
def test_each_of_several_keys_opens(url: str, key: str) -> None:
    headers = {"Authorization": f"bearer {key}"}
    assert httpx.post(f"{url}/generate", json=BODY, headers=headers).status_code == 200


PAGES = ["/live", "/health", "/ping", "/version", "/ready", "/metrics", "/", "/docs", "/openapi.json", "/health/"]


@pytest.mark.parametrize("path", PAGES)
def test_probes_and_pages_need_no_key(url: str, path: str) -> None:
    assert httpx.get(url + path, follow_redirects=True).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/models", "/tokenize", "/generate", "/v1/chat/completions", "/nowhere", "//health"]
)
def test_everything_else_does(url: str, path: str) -> None:
    assert httpx.get(url + path).status_code == 401


# --- bodies ---


def test_a_body_over_the_limit_is_refused_by_its_declared_length(http: httpx.Client) -> None:
    error = error_of(http.post("/generate", json=BODY | {"prompt": "a" * 9000}), 413)
    assert "8192" in error["message"]
    assert "MAX_BODY_BYTES" in error["message"]


def test_a_body_over_the_limit_is_refused_without_a_declared_length(http: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"a" * 100
        yield b'"}'

    response = http.post("/generate", content=chunks(), headers={"Content-Type": "application/json"})
    assert "MAX_BODY_BYTES" in error_of(response, 413)["message"]


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (b'{"prompt": ', "application/json", "not valid JSON"),
        (b"", "application/json", "JSON object"),
        (b"[1, 2]", "application/json", "JSON object"),
        (b'"text"', "application/json", "JSON object"),
        (b"prompt=hello", "application/x-www-form-urlencoded", "not valid JSON"),
        (b'{"prompt": "\xff"}', "application/json", "not valid UTF-8: at byte 12"),
        (b'{"prompt": "a", "seed": ' + b"9" * 4400 + b"}", "application/json", "more than 4300 digits"),
        (b"[" * 2000, "application/json", ""),
    ],
)
def test_a_body_that_is_no_json_object_is_a_bad_request(
    http: httpx.Client, content: bytes, kind: str, said: str
) -> None:
    response = http.post("/generate", content=content, headers={"Content-Type": kind})
    assert said in error_of(response, 400)["message"]


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize("kind", [None, FORM, "text/plain; charset=utf-8", "text/json", "application/json"])
@pytest.mark.parametrize("origin", [None, "null", "http://evil.example"])
def test_only_browsers_must_say_that_a_body_is_json(http: httpx.Client, kind: str | None, origin: str | None) -> None:
    """`curl -d` says that it is a form, and the examples of others' documentation say nothing else; a page of another
    site may send just that without being asked for leave, but says where it is from."""
    headers = {"Content-Type": kind or "", "Origin": origin or ""}
    request = http.build_request("POST", "/generate", content=json.dumps(BODY).encode())
    request.headers.update({name: value for name, value in headers.items() if value})
    reply = http.send(request)
    if origin is None or kind == "application/json":
        assert reply.status_code == 200, reply.text
    else:
        message = error_of(reply, 400)["message"]
        assert "Content-Type: application/json" in message
        assert (kind or "missing").partition(";")[0] in message


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "identity"])
def test_a_compressed_body_is_refused_as_such(url: str, encoding: str) -> None:
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json", "Authorization": "Bearer two"}
    content = gzip.compress(json.dumps(BODY).encode())
    message = httpx.post(f"{url}/generate", content=content, headers=headers).json()["error"]["message"]
    assert (f"Content-Encoding: {encoding}" in message) is (encoding != "identity")


def test_no_refusal_repeats_a_long_number(http: httpx.Client) -> None:
    digits = "9" * 3000
    for field in (f'"logit_bias": {{"5": {digits}}}', f'"seed": {digits}', f'"top_k": {digits}', f'"stop": [{digits}]'):
        content = f'{{"prompt": "a", {field}}}'
        response = http.post("/generate", content=content, headers={"Content-Type": "application/json"})
        assert len(error_of(response, 400)["message"]) < 300


# --- ids, routes, origins ---


def test_a_request_id_is_kept_if_well_formed_and_made_otherwise(http: httpx.Client) -> None:
    assert http.get("/health", headers={"x-request-id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
    made = http.get("/health", headers={"x-request-id": "no spaces allowed"}).headers["x-request-id"]
    assert made != "no spaces allowed"
    assert len(made) == 32


def test_unknown_routes_and_methods_have_the_same_shape(http: httpx.Client) -> None:
    assert "/docs" in error_of(http.get("/no/such/route"), 404)["message"]
    response = http.get("/generate")
    assert "GET" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "POST"


def test_a_bug_shows_nothing_of_itself(http: httpx.Client, monkeypatch: pytest.MonkeyPatch, serve_module: Any) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("/secret/path and a prompt")

    tokenizer = serve_module.running(str(http.base_url).rstrip("/")).service.tokenizer
    monkeypatch.setattr(type(tokenizer), "encode", broken)
    response = http.post("/generate", json=BODY)
    assert error_of(response, 500)["message"] == "Internal server error."
    assert response.headers["x-request-id"]


def test_pages_of_an_allowed_origin_may_call(url: str, http: httpx.Client) -> None:
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    preflight = httpx.options(f"{url}/generate", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://page.example"
    refused = httpx.post(f"{url}/generate", json=BODY, headers={"Origin": "https://page.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example"
    other = http.get("/health", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_the_page_comes_with_the_server(http: httpx.Client) -> None:
    response = http.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "/generate" in response.text
    assert "https://" not in response.text.replace("https://page.example", ""), "it must work without a network"


def test_the_reference_comes_with_the_server_and_asks_nobody_else(http: httpx.Client) -> None:
    """Its script and its style are read from here, without a key as it is itself; its policy knows no other host."""
    page = http.get("/docs")
    asked = re.findall(r'(?:src|href)="([^"]+)"', page.text) + re.findall(r"url: '([^']+)'", page.text)
    assert {one for one in asked if not one.startswith("data:")} == {
        *("docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "openapi.json"),
    }
    for address in asked:
        if not address.startswith("data:"):
            file = httpx.get(page.url.join(address))
            assert file.status_code == 200, address
            assert len(file.content) > 10_000
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    (own,) = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'" in policy


def test_head_is_answered_wherever_get_is(http: httpx.Client, url: str) -> None:
    for path in ("/", "/health", "/ready", "/metrics", "/version", "/v1/models", "/v1/models/tiny-llama", "/docs"):
        got, headed = http.get(path), http.head(path)
        assert (headed.status_code, headed.content) == (got.status_code, b""), path
        assert headed.headers["content-type"] == got.headers["content-type"]
    assert httpx.head(f"{url}/v1/models").status_code == 401
    assert http.head("/generate").status_code == 405
