"""Events on the wire: frames, the end, errors in mid-stream, keep-alive, and closing when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from prerope.server.api.stream import printing
from prerope.server.errors import EngineFailure


async def sent(source: AsyncGenerator[Any, None], *, disconnect_after: int | None = None) -> str:
    """What a client receives; it goes away after so many chunks if asked to."""
    chunks: list[bytes] = []
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            chunks.append(message["body"])
            if disconnect_after is not None and len(chunks) >= disconnect_after:
                gone.set()

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await printing.event_stream(source)(scope, receive, send)
    return b"".join(chunks).decode()


def test_each_event_is_one_line_of_json_and_the_end_is_marked() -> None:
    async def source() -> AsyncGenerator[Any, None]:
        yield {"text": "two\nlines\u2028 日本"}
        yield {"text": ""}

    frames = asyncio.run(sent(source())).split("\n\n")
    assert [frame.count("\n") for frame in frames] == [0, 0, 0, 0]
    assert json.loads(frames[0].removeprefix("data: ")) == {"text": "two\nlines\u2028 日本"}
    assert frames[2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (EngineFailure("the step failed", code="engine_failure"), "the step failed"),
        (OSError("/secret"), "Internal server error."),
    ],
)
def test_an_error_in_mid_stream_is_an_event_and_then_the_end(raised: Exception, message: str) -> None:
    async def source() -> AsyncGenerator[Any, None]:
        yield {"text": "a"}
        raise raised

    first, error, rest = asyncio.run(sent(source())).split("\n\n")
    assert first == 'data: {"text":"a"}'
    kind, data = error.split("\n")
    assert kind == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["message"] == message
    assert rest == ""


def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printing, "KEEP_ALIVE_S", 0.02)

    async def source() -> AsyncGenerator[Any, None]:
        await asyncio.sleep(0.1)
        yield {"text": "a"}

    frames = asyncio.run(sent(source())).split("\n\n")
    assert frames[0] == ": keep-alive"
    assert 'data: {"text":"a"}' in frames


def test_the_source_is_closed_when_the_client_goes_away() -> None:
    closed = []

    async def source() -> AsyncGenerator[Any, None]:
        try:
            while True:
                yield {"text": "a"}
                await asyncio.sleep(0.001)
        finally:
            closed.append(True)

    asyncio.run(asyncio.wait_for(sent(source(), disconnect_after=3), 10))
    assert closed == [True]


def test_the_source_is_closed_when_the_client_goes_away_while_it_is_silent() -> None:
    closed = []

    async def source() -> AsyncGenerator[Any, None]:
        try:
            yield {"text": "a"}
            await asyncio.sleep(3600)
        finally:
            closed.append(True)

    asyncio.run(asyncio.wait_for(sent(source(), disconnect_after=1), 10))
    assert closed == [True]
