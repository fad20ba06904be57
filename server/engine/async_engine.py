"""The engine on its own thread, for an event loop: requests go in through an inbox, outputs come back to the loop.

    submit ─ inbox ─ engine thread: add, abort, step ─ call_soon_threadsafe ─ OutputStream, one a request

The loop never waits for a step and the thread never touches a loop object but through `call_soon_threadsafe`. The
thread loads the engine, then drains its inbox and steps while there is work, and sleeps on the inbox when there is
none. When a step raises, the engine is DEAD: every open request fails, and a supervisor has to restart the process.
Nothing here waits for ever: a reader that does not read is cut off, and a step that does not end makes the engine HUNG
for as long, and is left to itself when the server shuts down.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from prerope.rope.model import ModelPositions
from prerope.rope.spec import RopeSpec
from prerope.server.engine.engine import Engine
from prerope.server.engine.life import Drain, EngineLife, EngineState, shut_down
from prerope.server.engine.limits import EngineStats, ModelInfo, check_room, retry_after_s
from prerope.server.engine.outputs import TokenOutput
from prerope.server.engine.sequence import EngineRequest
from prerope.server.errors import ClientGone, EngineUnavailable, RequestError, explained

TAKE_S = 0.002
"""For what comes between two steps."""

STOOD_S = 0.5
"""So late the event loop is where the process stood: a busy one is not."""

MAX_UNREAD = 4096
"""Outputs that wait for a reader who is slower than the engine; past that, the request is aborted."""


class OutputStream(AsyncGenerator[TokenOutput, None]):
    """The outputs of one request. Closing it early, started or not, aborts the request within a step."""

    def __init__(self, abort: Callable[[], None]) -> None:
        self._abort = abort
        self._items: asyncio.Queue[TokenOutput | RequestError] = asyncio.Queue()
        self._ended = False

    def put(self, item: TokenOutput | RequestError) -> None:
        """Hand an item over. A reader that lets more than `MAX_UNREAD` pile up gets an error after those."""
        self._items.put_nowait(item)
        if self._items.qsize() > MAX_UNREAD and isinstance(item, TokenOutput) and item.finish_reason is None:
            self._items.put_nowait(
                ClientGone(f"{MAX_UNREAD} outputs were not read: the reader is too slow", code="reader_too_slow")
            )
            self._abort()

    async def asend(self, _value: None) -> TokenOutput:
        if self._ended:
            raise StopAsyncIteration
        try:
            item = await self._items.get()
        except asyncio.CancelledError:
            self._close()
            raise
        if isinstance(item, RequestError):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item

    async def athrow(
        self, typ: Any, val: BaseException | object = None, _tb: TracebackType | None = None
    ) -> TokenOutput:
        self._close()
        raise val if isinstance(val, BaseException) else typ

    async def aclose(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._abort()


@dataclass(slots=True)
class Turn:
    """One turn of the thread: when it began, in monotonic seconds, and for how long this process has stood since."""

    began: float
    stood_s: float = 0.0


_Command = EngineRequest | Drain
_Delivery = tuple[str, TokenOutput]


class AsyncEngine(EngineLife):
    """One engine, loaded and stepped by a thread of its own. All methods are called on the event loop.

    Attributes:
        state: see `EngineState`.
        failure: why the engine is DEAD.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        step_timeout_s: float = math.inf,
        tell_of_step: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """step_timeout_s: after which a step that has not ended is a hung one; `tell_of_step` hears of it, and of its
        end."""
        super().__init__()
        self._load = load
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._aborts: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stats: EngineStats | None = None
        self._step_timeout_s, self._tell_of_step = step_timeout_s, tell_of_step
        self._turn: Turn | None = None  # None while the thread waits for work
        self._next_look = math.inf  # monotonic seconds
        self._told_of_step = False

    @property
    def state(self) -> EngineState:
        return EngineState.HUNG if self._state is EngineState.READY and self._step_is_late else self._state

    def require_ready(self) -> None:
        """Raises EngineUnavailable, saying why, unless requests are taken."""
        if (state := self.state) is not EngineState.READY:
            raise self._unavailable(state)

    def require_alive(self) -> None:
        """Raises EngineUnavailable where only a restart can help, as far as anybody can tell."""
        if (state := self.state) is EngineState.HUNG:
            raise self._unavailable(state)

    def _unavailable(self, state: EngineState) -> EngineUnavailable:
        """Why requests are refused in this state; a step may end, and change it, while that is asked."""
        reasons = {
            EngineState.LOADING: f"The model is loading ({self.stage}); try again in a few seconds.",
            EngineState.HUNG: f"A step of the engine has not ended for {self.seconds_in_step:.0f} s "
            "(STEP_TIMEOUT_S): requests are refused until it does; the log says which step it is.",
            EngineState.DRAINING: "The server is shutting down and takes no new requests.",
            EngineState.DEAD: "The engine has stopped; the server must be restarted.",
        }
        return EngineUnavailable(reasons[state], code=str(state))

    @property
    def seconds_in_step(self) -> float:
        """How long the step under way has taken, without the time in which the whole process stood (SIGSTOP)."""
        turn, now = self._turn, time.monotonic()
        return 0.0 if turn is None else max(0.0, now - turn.began - turn.stood_s - self._stood_s(turn, now))

    def _stood_s(self, turn: Turn, now: float) -> float:
        """Since the loop was to look at the step; it looks whatever the thread does, unless the process stands."""
        late_s = now - self._next_look
        return late_s if late_s > STOOD_S and turn.began < self._next_look else 0.0

    @property
    def _step_is_late(self) -> bool:
        return self.seconds_in_step > self._step_timeout_s

    @property
    def thread_id(self) -> int | None:
        return self._thread.ident

    # --- on the event loop ---

    @property
    def engine(self) -> Engine:
        """EngineUnavailable while loading or after death."""
        if self._engine is None or self.state is EngineState.DEAD:
            reason = "has stopped after an error" if self.state is EngineState.DEAD else "is loading its model"
            raise EngineUnavailable(f"the engine {reason}; see /ready and try again later", code=self.state.value)
        return self._engine

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    def resolve_positions(self, spec: RopeSpec) -> ModelPositions:
        return self.engine.resolve_positions(spec)

    def stats(self) -> EngineStats:
        """The engine's statistics after the last step; what was submitted since counts as waiting."""
        stats = self._stats
        if stats is None:
            raise EngineUnavailable("the engine is loading its model; see /ready", code=self.state.value)
        if not self._unseen:
            return stats
        num_waiting, num_tokens = len(self._unseen), sum(self._unseen.values())
        return replace(
            stats,
            num_waiting=stats.num_waiting + num_waiting,
            num_waiting_tokens=stats.num_waiting_tokens + num_tokens,
        )

    def submit(self, requests: Sequence[EngineRequest]) -> list[OutputStream]:
        """Queue the sequences of one request, all or, where the queue has no room for them, none.

        Their lengths and token ids are within the limits: see `engine.limits`.
        """
        engine, num_tokens = self.engine, sum([len(request.prompt_token_ids) for request in requests])
        if self.state is EngineState.DRAINING:
            raise EngineUnavailable("the server is shutting down and takes no new requests", code="draining")
        stats = self.stats()
        if stats.num_waiting or len(requests) > 1:  # alone and with nobody before it, a request may always wait
            check_room(engine.config, stats, num_tokens, len(requests))
        return [self._queue(request) for request in requests]

    def _queue(self, request: EngineRequest) -> OutputStream:
        request_id = request.request_id
        assert request_id not in self._streams, "request ids are unique"
        stream = self._streams[request_id] = OutputStream(lambda: self._abort(request_id))
        self._unseen[request_id] = len(request.prompt_token_ids)
        self._inbox.put(request)
        return stream

    def retry_after_s(self) -> int:
        """Seconds until what is here now is read, for those who are refused."""
        if self._stats is None:
            return 1
        return retry_after_s(self.stats())

    def _abort(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._unseen.pop(request_id, None)  # without a stream the thread does not take it in
        self._aborts.put(request_id)

    def _deliver(self, stats: EngineStats, taken: list[str], deliveries: list[_Delivery]) -> None:
        self._stats = stats
        for request_id in taken:
            self._unseen.pop(request_id, None)
        for request_id, output in deliveries:
            stream = self._streams.get(request_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                del self._streams[request_id]
            stream.put(output if output.failure is None else output.failure)

    def _set_ready(self, engine: Engine) -> None:
        self._engine = engine
        self._stats = engine.stats()
        if self._state is EngineState.LOADING:
            self._state = EngineState.READY
        self._loaded.set()
        self._look_at_step()

    def _look_at_step(self) -> None:
        """Now, and again in a while: nothing is ended because of a late step, and all is as before once it ends."""
        if self._stopped.is_set():
            return
        turn, now = self._turn, time.monotonic()
        if turn is not None:
            turn.stood_s += self._stood_s(turn, now)
        period_s = min(1.0, max(0.1, self._step_timeout_s / 4))
        self._next_look = now + period_s
        if self._step_is_late != self._told_of_step:
            self._told_of_step = not self._told_of_step
            self._tell_of_step(self._told_of_step)
        self._loop.call_later(period_s, self._look_at_step)

    # --- on the engine thread ---

    def _run(self) -> None:
        try:
            engine = self._load()
            self._post(self._set_ready, engine)
            self._serve(engine)
            engine.close()
        except BaseException as failure:  # whatever it was, nobody else would hear of it
            self._post(self._die, explained(failure))
        else:
            self._post(self._stopped.set)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _serve(self, engine: Engine) -> None:
        deadline: float | None = None
        while True:
            taken: list[str] = []
            deliveries: list[_Delivery] = []
            for command in self._commands(wait=not engine.has_work() and deadline is None):
                if isinstance(command, Drain):
                    deadline = command.deadline
                elif command.request_id in self._streams:  # else it was aborted while it waited here
                    taken.append(command.request_id)
                    engine.add(command)
            while not self._aborts.empty():  # after what was taken in, before the next step
                engine.abort(self._aborts.get())
            if deadline is not None and time.monotonic() >= deadline:
                deliveries += engine.abort_all(shut_down())
            if engine.has_work():
                deliveries += engine.step()
            self._post(self._deliver, engine.stats(), taken, deliveries)
            if deadline is not None and not engine.has_work():
                return

    def _commands(self, *, wait: bool) -> Iterator[_Command]:
        """What has come; where it is much the rest comes after a step: one request may be a thousand sequences."""
        if wait:
            self._turn = None
            yield self._inbox.get()
        began = time.monotonic()
        self._turn = Turn(began)
        while time.monotonic() - began < TAKE_S:
            try:
                yield self._inbox.get_nowait()
            except queue.Empty:
                return
