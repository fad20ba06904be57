"""Overlapped steps on a thread of their own: streams end, aborts free, nothing hangs when a step in flight dies."""

from __future__ import annotations

import asyncio

import pytest
import torch
from prerope.server.engine.engine import Engine
from prerope.server.engine.life import EngineState
from prerope.server.engine.outputs import FinishReason
from prerope.server.engine.step import Arrival
from prerope.server.errors import EngineFailure, OutOfMemory

from tests.engine.scripted_model import expected, random_prompt, scripted_engine
from tests.engine.test_async_engine import collect, go, idle, served, until
from tests.engine.tiny_models import assert_idle, greedy, request, tokens_of

LONGEST = 60


def engine() -> Engine:
    return scripted_engine(overlap=True)


def test_streams_side_by_side() -> None:
    requests = [request(str(i), random_prompt(3 + 4 * i, seed=i), greedy(20)) for i in range(4)]

    async def scenario() -> None:
        async with served(engine) as served_engine:
            streams = [served_engine.submit([one])[0] for one in requests]
            outputs = await asyncio.gather(*(collect(stream) for stream in streams))
            assert [tokens_of(one) for one in outputs] == [expected(one) for one in requests]
            await until(lambda: idle(served_engine))

    go(scenario)


@pytest.mark.parametrize("num_outputs", [0, 1, 5])
def test_closing_a_stream_frees_its_blocks_and_ends_the_step_in_flight(num_outputs: int) -> None:
    async def scenario() -> None:
        async with served(engine) as served_engine:
            stream = served_engine.submit([request("0", random_prompt(9), greedy(LONGEST))])[0]
            for _ in range(num_outputs):
                await anext(stream)
            await stream.aclose()
            await until(lambda: idle(served_engine) and not served_engine.engine.has_work())
            assert served_engine.engine._in_flight is None

    go(scenario)


def test_shutdown_collects_or_drops_the_step_in_flight() -> None:
    async def scenario() -> None:
        for timeout_s, ends in ((60.0, {FinishReason.LENGTH}), (0.0, {FinishReason.LENGTH, FinishReason.ABORT})):
            async with served(engine) as served_engine:
                one = request("0", random_prompt(9), greedy(LONGEST))
                stream = served_engine.submit([one])[0]
                first = await anext(stream)
                await served_engine.shutdown(timeout_s)
                outputs = [first, *await collect(stream)]
                assert tokens_of(outputs) == expected(one)[: len(tokens_of(outputs))]
                assert outputs[-1].finish_reason in ends
                assert len(tokens_of(outputs)) == LONGEST or outputs[-1].finish_reason is FinishReason.ABORT
                assert_idle(served_engine.engine)
                assert served_engine.engine._in_flight is None

    go(scenario)


def test_a_step_that_dies_in_flight_fails_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of the device come when its results are waited for: the next step is launched by then."""
    wait, doomed = Arrival.wait, engine()

    def dying(arrival: Arrival) -> list[int]:
        if doomed.stats().num_steps >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return wait(arrival)

    async def scenario() -> None:
        async with served(lambda: doomed) as served_engine:
            streams = [
                served_engine.submit([request(str(i), random_prompt(5, seed=i), greedy(LONGEST))])[0] for i in range(3)
            ]
            results = await asyncio.gather(*(collect(stream) for stream in streams), return_exceptions=True)
            assert [type(result) for result in results] == [EngineFailure] * 3
            assert served_engine.state is EngineState.DEAD
            assert isinstance(served_engine.failure, OutOfMemory)
            await served_engine.wait_until_stopped()

    monkeypatch.setattr(Arrival, "wait", dying)
    go(scenario)
