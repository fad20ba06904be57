"""Server-sent events of /generate, and what happens when a client goes away: in a stream, in a prefill, or waiting."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prerope.server.engine.async_engine import AsyncEngine
from prerope.server.engine.engine import Engine
from prerope.server.engine.outputs import TokenOutput

PROMPT = "The quick brown fox jumps over the lazy dog, and then"
LONG = [10 + i % 1000 for i in range(450)]


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path) -> str:
    return str(
        serve_module(model_id=str(tiny_checkpoint), rope_method="rope", max_model_len=512, max_batched_tokens=64)
    )


@pytest.fixture(scope="module")
def engine(serve_module: Any, url: str) -> AsyncEngine:
    """The engine behind the server, which runs on a thread of this process."""
    engine: AsyncEngine = serve_module.running(url).service.engine
    return engine


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of at least 20 ms, so that a client can leave in the middle of something."""
    step = Engine.step

    def slower(engine: Engine) -> list[tuple[str, TokenOutput]]:
        time.sleep(0.02)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slower)


def frames(http: httpx.Client, **body: Any) -> list[str]:
    """The stream, cut into frames."""
    with http.stream("POST", "/generate", json={"prompt": PROMPT, "stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return [frame for frame in "".join(response.iter_text()).split("\n\n") if frame]


def events(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    *data, done = [frame for frame in frames(http, **body) if not frame.startswith(":")]
    assert done == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in data]


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.005)


def test_a_stream_is_the_reply_in_pieces(http: httpx.Client) -> None:
    body: dict[str, Any] = {"max_tokens": 30, "seed": 3, "logprobs": 2, "ignore_eos": True}
    whole = http.post("/generate", json={"prompt": PROMPT, **body}).json()
    *pieces, end = events(http, **body)
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [token_id for piece in pieces for token_id in piece["token_ids"]] == whole["token_ids"]
    streamed = [entry["token_id"] for piece in pieces for entry in piece["logprobs"]]
    assert streamed == [entry["token_id"] for entry in whole["logprobs"]]
    counts = [len(piece["token_ids"]) for piece in pieces]
    assert [piece["index"] for piece in pieces] == [sum(counts[:i]) for i in range(len(counts))]
    assert len(pieces) >= 25, "an event a step"
    assert end["finish_reason"] == whole["finish_reason"] == "length"
    assert end["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 30
    assert end["rope"] == whole["rope"]
    assert end["id"].startswith("gen-")
    assert set(end["timings"]) == {"queue_s", "prefill_s", "decode_s"}
    assert not any("finish_reason" in piece for piece in pieces)


def test_stop_strings_in_a_stream(http: httpx.Client) -> None:
    whole = http.post("/generate", json={"prompt": PROMPT, "temperature": 0, "max_tokens": 24}).json()
    stop = whole["text"][len(whole["text"]) // 2 :][:5]
    *pieces, end = events(http, temperature=0, max_tokens=24, stop=stop)
    text = "".join(piece["text"] for piece in pieces)
    assert text == whole["text"][: whole["text"].index(stop)]
    assert end["finish_reason"] == "stop"
    assert end["timings"] is not None


def test_progress_of_a_long_prefill(http: httpx.Client) -> None:
    seen = events(http, prompt=LONG, max_tokens=2, return_progress=True, cache_salt="progress")
    progress = [event["progress"] for event in seen if "progress" in event]
    assert len(progress) >= 5, "a step takes 64 tokens"
    assert all(one["total"] == len(LONG) for one in progress)
    processed = [one["processed"] for one in progress]
    assert processed == sorted(set(processed))
    assert processed[0] <= 64
    first_text = next(i for i, event in enumerate(seen) if "text" in event)
    assert all("progress" in event for event in seen[:first_text])
    assert not any("progress" in event for event in events(http, prompt=LONG, max_tokens=2, cache_salt="other"))


def test_refusals_come_before_the_stream(http: httpx.Client) -> None:
    response = http.post("/generate", json={"prompt": PROMPT, "stream": True, "temperature": -1})
    assert response.status_code == 400
    assert response.headers["content-type"].startswith("application/json")


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_leaving_a_stream_frees_its_blocks(http: httpx.Client, engine: AsyncEngine, path: str) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    if path == "/v1/completions":
        body["n"] = 3
    if path == "/v1/chat/completions":
        body = {**body, "messages": [{"role": "user", "content": "hi"}], "n": 2}
        del body["prompt"]
    with http.stream("POST", path, json=body) as response:
        lines = response.iter_lines()
        for _ in range(12):
            next(lines)
        stats = engine.stats()
        assert stats.num_running == body.get("n", 1)
        assert stats.num_free_blocks < stats.num_blocks
    left_at = engine.stats().num_steps
    until(lambda: engine.stats().num_running == 0)
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_steps - left_at <= 10, "one step, and what a busy machine takes to notice"


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_leaving_in_the_middle_of_a_prefill(url: str, engine: AsyncEngine, stream: bool) -> None:
    before = engine.stats().prompt_tokens

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            body = {"prompt": LONG, "max_tokens": 50, "stream": stream, "cache_salt": f"leave {stream}"}
            request = asyncio.create_task(client.post("/generate", json=body))
            await asyncio.to_thread(until, lambda: engine.stats().prompt_tokens > before, 60)  # a worker starts
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    asyncio.run(leave())
    until(lambda: engine.stats().num_running == 0)
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.prompt_tokens - before < len(LONG), "the rest of the prompt was never read"


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("n", [1, 3])
def test_leaving_a_whole_reply_aborts_it(url: str, engine: AsyncEngine, n: int, http: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{url}/v1/completions",
            json={"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "n": n},
            timeout=httpx.Timeout(5, read=0.2),
        )
    until(lambda: engine.stats().num_running == 0, seconds=3.0)  # to its end it would take 8 s
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert 'status="499"' in http.get("/metrics").text


@pytest.mark.usefixtures("slow")
def test_others_go_on_when_a_client_leaves(url: str, http: httpx.Client) -> None:
    expected = http.post("/generate", json={"prompt": PROMPT, "max_tokens": 20, "temperature": 0}).json()
    replies: list[dict[str, Any]] = []
    other = threading.Thread(
        target=lambda: replies.append(
            httpx.post(
                f"{url}/generate", json={"prompt": PROMPT, "max_tokens": 20, "temperature": 0}, timeout=60
            ).json()
        )
    )
    with http.stream("POST", "/generate", json={"prompt": LONG, "max_tokens": 50, "stream": True}) as response:
        other.start()
        next(response.iter_lines())
    other.join()
    assert replies[0]["token_ids"] == expected["token_ids"]


def test_a_step_that_fails_ends_the_stream_with_an_error_event(
    serve: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(model_id=str(tiny_checkpoint))
    step, num_steps = Engine.step, 0

    def failing(engine: Engine) -> list[tuple[str, TokenOutput]]:
        nonlocal num_steps
        num_steps += 1
        if num_steps > 5:
            raise RuntimeError("secret detail of /some/path")
        return step(engine)

    monkeypatch.setattr(Engine, "step", failing)
    with httpx.Client(base_url=url, timeout=60) as http:
        seen = frames(http, max_tokens=50, ignore_eos=True)
        assert seen[-1].startswith("event: error\ndata: ")
        assert "secret" not in seen[-1]
        assert json.loads(seen[-1].partition("data: ")[2])["error"]["type"] == "server_error"
