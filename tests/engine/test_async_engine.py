"""The engine on its own thread: refusals at the call, streams that end, aborts that free, and no hang when it dies."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prerope.rope.spec import RopeSpec
from prerope.server.engine import async_engine, life
from prerope.server.engine.async_engine import AsyncEngine
from prerope.server.engine.engine import Engine
from prerope.server.engine.life import EngineState
from prerope.server.engine.outputs import FinishReason, TokenOutput
from prerope.server.engine.sequence import EngineRequest
from prerope.server.errors import (
    ClientGone,
    ConfigurationError,
    EngineFailure,
    EngineUnavailable,
    InvalidRequest,
    QueueFull,
)
from prerope.server.models.model import Model

from tests.engine.tiny_models import assert_idle, generate, greedy, prompt_of, request, tiny, tiny_engine, tokens_of

TIMEOUT_S = 60


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(tiny("llama"))


def go(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run one scenario; whatever hangs fails."""

    async def limited() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await scenario()

    asyncio.run(limited())


@asynccontextmanager
async def served(load: Callable[[], Engine]) -> AsyncGenerator[AsyncEngine]:
    engine = AsyncEngine(load)
    engine.start()
    await engine.wait_until_loaded()
    try:
        yield engine
    finally:
        await engine.shutdown(0)
        assert not engine._thread.is_alive()


async def collect(stream: AsyncGenerator[TokenOutput, None]) -> list[TokenOutput]:
    return [output async for output in stream]


async def until(condition: Callable[[], bool]) -> None:
    # What is waited for is a snapshot of the engine's thread, and snapshots raise no event.
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.002)


def idle(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks


def test_streams_side_by_side(model: Model) -> None:
    prompts = [prompt_of(length, seed=length) for length in (5, 80, 30)]
    expected = generate(tiny_engine(model), prompts, greedy(10))

    async def scenario() -> None:
        async with served(lambda: tiny_engine(model)) as engine:
            assert engine.state is EngineState.READY
            streams = [engine.submit([request(str(i), prompt, greedy(10))])[0] for i, prompt in enumerate(prompts)]
            outputs = await asyncio.gather(*(collect(stream) for stream in streams))
            assert [tokens_of(one) for one in outputs] == expected
            assert [one[-1].finish_reason for one in outputs] == [FinishReason.LENGTH] * 3
            await until(lambda: idle(engine))
            with pytest.raises(StopAsyncIteration):
                await anext(streams[0])

    go(scenario)


def test_refusals_are_raised_by_the_call_itself(model: Model) -> None:
    async def scenario() -> None:
        async with served(lambda: tiny_engine(model)) as engine:
            with pytest.raises(InvalidRequest, match="unknown position method"):
                engine.resolve_positions(RopeSpec(method="spiral"))
            assert len(await collect(engine.submit([request("0", prompt_of(5), greedy(2))])[0])) == 2

    go(scenario)


def test_a_step_comes_between_what_comes_at_once(model: Model) -> None:
    """One request may be a thousand sequences, and taking them in takes as long as ten steps."""
    engine, happened = tiny_engine(model), list[str]()
    add, step = engine.add, engine.step

    def slow_add(request: EngineRequest) -> None:
        happened.append("add")
        time.sleep(async_engine.TAKE_S)
        add(request)

    def noted_step() -> list[tuple[str, TokenOutput]]:
        happened.append("step")
        return step()

    engine.add, engine.step = slow_add, noted_step  # type: ignore[method-assign]

    async def scenario() -> None:
        async with served(lambda: engine) as served_engine:
            streams = served_engine.submit([request(str(i), prompt_of(5), greedy(3)) for i in range(8)])
            outputs = await asyncio.gather(*(collect(stream) for stream in streams))
            assert [len(tokens_of(one)) for one in outputs] == [3] * 8
            await until(lambda: idle(served_engine))

    go(scenario)
    assert happened.count("add") == 8
    assert "add add add" not in " ".join(happened)


def test_who_goes_does_not_wait_behind_what_is_taken_in(model: Model) -> None:
    """A thousand sequences may stand in the inbox: what goes from there is not begun, and what runs ends at once."""
    engine, happened, hold = tiny_engine(model), list[str](), threading.Event()
    add, step, abort = engine.add, engine.step, engine.abort

    def slow_add(request: EngineRequest) -> None:
        happened.append(f"add {request.request_id}")
        time.sleep(async_engine.TAKE_S)
        add(request)

    def held_step() -> list[tuple[str, TokenOutput]]:
        happened.append("step")
        hold.wait(TIMEOUT_S)
        return step()

    def noted_abort(request_id: str) -> TokenOutput | None:
        found = abort(request_id)
        if found is not None:
            happened.append(f"abort {request_id}")
        return found

    engine.add, engine.step, engine.abort = slow_add, held_step, noted_abort  # type: ignore[method-assign]

    async def scenario() -> None:
        async with served(lambda: engine) as served_engine:
            try:
                (running,) = served_engine.submit([request("runs", prompt_of(5), greedy(99))])
                await until(lambda: "step" in happened)
                gone = served_engine.submit([request(f"gone {i}", prompt_of(5), greedy(3)) for i in range(20)])
                left = served_engine.submit([request(f"left {i}", prompt_of(5), greedy(3)) for i in range(3)])
                for stream in (*gone, running):
                    await stream.aclose()
                assert served_engine.stats().num_waiting == 3
            finally:
                hold.set()
            assert [len(tokens_of(await collect(stream))) for stream in left] == [3] * 3
            await until(lambda: idle(served_engine))

    go(scenario)
    assert not [what for what in happened if "gone" in what]
    assert happened.index("abort runs") < happened.index("step", 2), "before the next step"


def test_the_queue_counts_what_the_thread_has_not_seen_yet(model: Model) -> None:
    async def scenario() -> None:
        async with served(lambda: tiny_engine(model, max_queued_requests=3, max_queued_tokens=100)) as engine:
            streams = [engine.submit([request(str(i), prompt_of(10), greedy(2))])[0] for i in range(3)]
            with pytest.raises(QueueFull, match="MAX_QUEUED_REQUESTS, 3"):
                engine.submit([request("refused", prompt_of(10), greedy(2))])
            await asyncio.gather(*(collect(stream) for stream in streams))
            await until(lambda: idle(engine))
            stream = engine.submit([request("3", prompt_of(60), greedy(2))])[0]
            assert (engine.stats().num_waiting, engine.stats().num_waiting_tokens) == (1, 60)
            with pytest.raises(QueueFull, match="60 prompt tokens are waiting and 50 more"):
                engine.submit([request("refused", prompt_of(50), greedy(2))])
            await collect(stream)
            with pytest.raises(InvalidRequest, match="4 sequences"):
                engine.submit([request(str(i), prompt_of(5), greedy(2)) for i in range(4, 8)])
            assert idle(engine), "all of a request or nothing"

    go(scenario)


@pytest.mark.parametrize("num_outputs", [0, 1, 3])
def test_closing_a_stream_frees_its_blocks(model: Model, num_outputs: int) -> None:
    """Never iterated, in mid-prefill (the first events are progress), and in mid-decode."""

    async def scenario() -> None:
        async with served(lambda: tiny_engine(model, max_batched_tokens=16, max_num_seqs=8)) as engine:
            stream = engine.submit([request("0", prompt_of(30), greedy(200), report_progress=True)])[0]
            for _ in range(num_outputs):
                await anext(stream)
            await stream.aclose()
            await until(lambda: idle(engine) and not engine._unseen)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            assert engine.stats().generation_tokens < 200
            assert len(await collect(engine.submit([request("1", prompt_of(5), greedy(2))])[0])) == 2

    go(scenario)


def test_cancelling_the_reader_frees_its_blocks(model: Model) -> None:
    async def scenario() -> None:
        async with served(lambda: tiny_engine(model)) as engine:
            reader = asyncio.create_task(collect(engine.submit([request("0", prompt_of(20), greedy(200))])[0]))
            await until(lambda: engine.stats().generation_tokens > 2)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            await until(lambda: idle(engine))
            assert engine.stats().generation_tokens < 200

    go(scenario)


def test_shutdown_finishes_what_runs_and_refuses_the_rest(model: Model) -> None:
    async def scenario() -> None:
        async with served(lambda: tiny_engine(model)) as engine:
            stream = engine.submit([request("0", prompt_of(20), greedy(60))])[0]
            reader = asyncio.create_task(collect(stream))
            stopping = asyncio.create_task(engine.shutdown(TIMEOUT_S))
            await asyncio.sleep(0)
            assert engine.state is EngineState.DRAINING
            with pytest.raises(EngineUnavailable, match="shutting down"):
                engine.submit([request("late", prompt_of(5), greedy(2))])
            await stopping
            outputs = await reader
            assert len(tokens_of(outputs)) == 60
            assert outputs[-1].finish_reason is FinishReason.LENGTH
            assert not engine._thread.is_alive()
            assert_idle(engine.engine)

    go(scenario)


def test_shutdown_aborts_what_is_left_at_the_timeout(model: Model) -> None:
    async def scenario() -> None:
        async with served(lambda: slow_engine(model)) as engine:
            readers = [
                asyncio.create_task(collect(engine.submit([request(str(i), prompt_of(20), greedy(200))])[0]))
                for i in range(3)
            ]
            await until(lambda: engine.stats().generation_tokens > 0)
            await engine.shutdown(0.05)
            outputs = await asyncio.gather(*readers)
            assert [one[-1].finish_reason for one in outputs] == [FinishReason.ABORT] * 3
            assert all(len(tokens_of(one)) < 200 for one in outputs)
            assert_idle(engine.engine)

    go(scenario)


def slow_engine(model: Model, **config: Any) -> Engine:
    """Steps of at least 10 ms, so that 200 tokens outlast any timeout here."""
    engine = tiny_engine(model, **config)
    step, pause = engine.step, threading.Event()

    def slow_step() -> list[tuple[str, TokenOutput]]:
        pause.wait(0.01)
        return step()

    engine.step = slow_step  # type: ignore[method-assign]
    return engine


def test_a_step_that_raises_fails_every_stream(model: Model) -> None:
    async def scenario() -> None:
        failing = tiny_engine(model)
        step = failing.step

        def explode() -> list[tuple[str, TokenOutput]]:
            if failing.stats().num_steps == 3:
                raise RuntimeError("out of luck")
            return step()

        failing.step = explode  # type: ignore[method-assign]
        async with served(lambda: failing) as engine:
            streams = [engine.submit([request(str(i), prompt_of(20), greedy(50))])[0] for i in range(3)]
            results = await asyncio.gather(*(collect(stream) for stream in streams), return_exceptions=True)
            assert [type(result) for result in results] == [EngineFailure] * 3
            assert all("out of luck" not in str(result) for result in results), "a client is not shown the inside"
            assert engine.state is EngineState.DEAD
            assert str(engine.failure) == "out of luck"
            with pytest.raises(EngineUnavailable, match="stopped after an error"):
                engine.submit([request("late", prompt_of(5), greedy(2))])
            await engine.wait_until_stopped()
            await streams[0].aclose()

    go(scenario)


def test_a_load_that_fails() -> None:
    def load() -> Engine:
        raise ConfigurationError("MODEL_ID: no such thing")

    async def scenario() -> None:
        engine = AsyncEngine(load)
        engine.start()
        with pytest.raises(ConfigurationError, match="no such thing"):
            await engine.wait_until_loaded()
        assert engine.state is EngineState.DEAD
        assert isinstance(engine.failure, ConfigurationError)
        await engine.shutdown(1)
        await engine.wait_until_stopped()

    go(scenario)


def test_before_it_is_loaded(model: Model) -> None:
    allowed = threading.Event()

    def load() -> Engine:
        allowed.wait(TIMEOUT_S)
        return tiny_engine(model)

    async def scenario() -> None:
        engine = AsyncEngine(load)
        engine.start()
        assert engine.state is EngineState.LOADING
        for call in (
            lambda: engine.submit([request("0", prompt_of(5), greedy(2))]),
            lambda: engine.info,
            engine.stats,
            lambda: engine.resolve_positions(RopeSpec()),
        ):
            with pytest.raises(EngineUnavailable, match="loading"):
                call()
        allowed.set()
        await engine.wait_until_loaded()
        assert len(await collect(engine.submit([request("0", prompt_of(5), greedy(2))])[0])) == 2
        await engine.shutdown(1)

    go(scenario)


def test_shutdown_while_loading_ends_once_loaded(model: Model) -> None:
    allowed = threading.Event()

    def load() -> Engine:
        allowed.wait(TIMEOUT_S)
        return tiny_engine(model)

    async def scenario() -> None:
        engine = AsyncEngine(load)
        engine.start()
        await engine.shutdown(1)
        assert engine.state is EngineState.DRAINING
        allowed.set()
        await engine.wait_until_stopped()
        assert engine.state is EngineState.DRAINING

    go(scenario)


def test_the_loop_is_free_while_the_engine_steps(model: Model) -> None:
    """The loop turns many times within one slow step."""

    async def scenario() -> None:
        async with served(lambda: slow_engine(model)) as engine:
            reader = asyncio.create_task(collect(engine.submit([request("0", prompt_of(20), greedy(10))])[0]))
            turns = 0
            while not reader.done():
                await asyncio.sleep(0)
                turns += 1
            assert turns > 50
            assert len(tokens_of(await reader)) == 10

    go(scenario)


def test_a_reader_that_does_not_read_is_cut_off(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it may still read is bounded, and ends with an error; its blocks are free and others go on."""
    monkeypatch.setattr(async_engine, "MAX_UNREAD", 8)

    async def scenario() -> None:
        async with served(lambda: tiny_engine(model)) as engine:
            unread = engine.submit([request("unread", prompt_of(20), greedy(200))])[0]
            assert len(tokens_of(await collect(engine.submit([request("read", prompt_of(20), greedy(100))])[0]))) == 100
            await until(lambda: idle(engine))
            assert unread._items.qsize() == 8 + 2
            for _ in range(9):
                assert (await anext(unread)).token_ids
            with pytest.raises(ClientGone, match="8 outputs were not read"):
                await anext(unread)
            assert engine.stats().generation_tokens < 200

    go(scenario)


def test_a_step_that_never_ends_is_left_at_shutdown(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "STEP_GRACE_S", 0.1)
    released = threading.Event()

    async def scenario() -> None:
        stuck = tiny_engine(model)
        step = stuck.step

        def hang() -> list[tuple[str, TokenOutput]]:
            if stuck.stats().num_steps == 3:
                released.wait(TIMEOUT_S)
            return step()

        stuck.step = hang  # type: ignore[method-assign]
        engine = AsyncEngine(lambda: stuck)
        engine.start()
        await engine.wait_until_loaded()
        stream = engine.submit([request("0", prompt_of(20), greedy(50))])[0]
        await anext(stream)
        for _ in range(2):  # the second time there is nothing to wait for
            await engine.shutdown(0.1)
        with pytest.raises(EngineUnavailable, match="shut down"):
            await collect(stream)
        assert engine._thread.is_alive()
        released.set()
        await asyncio.to_thread(engine._thread.join)

    go(scenario)


def test_what_has_no_token_at_the_drains_end_fails(model: Model) -> None:
    async def scenario() -> None:
        async with served(lambda: slow_engine(model, max_num_seqs=1)) as engine:
            first = asyncio.create_task(collect(engine.submit([request("0", prompt_of(20), greedy(200))])[0]))
            waiting = engine.submit([request("1", prompt_of(20), greedy(200))])[0]
            await until(lambda: engine.stats().generation_tokens > 0)
            await engine.shutdown(0.05)
            assert (await first)[-1].finish_reason is FinishReason.ABORT
            with pytest.raises(EngineUnavailable, match="shut down before the reply was complete"):
                await collect(waiting)
            assert_idle(engine.engine)

    go(scenario)
