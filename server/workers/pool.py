"""Tasks in killable processes, for an event loop: `await workers.run(task, …)`.

Nothing waits for ever. A task that passes its limits, or crashes its process, is an error with words; one whose
process was ended by somebody else is begun again, once; one that nobody waits for any more is killed at once. Each lane
runs so many tasks at a time, and is fair to those whose tasks wait (`server.workers.fair`). The processes are forked
from one zygote (`server.workers.children`), which starts when it is first needed or by `start`, is started again when
it has died, and keeps a child in waiting, since a fork takes milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from prerope.server.errors import EngineUnavailable, InvalidRequest
from prerope.server.workers.children import Child, WorkerLost, Zygote, no_room, start_zygote
from prerope.server.workers.fair import FairSemaphore
from prerope.server.workers.messages import Limits, Order, Outcome, Task

log = structlog.get_logger(__name__)

ATTEMPTS = 2

CRASHES = frozenset({-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE, -signal.SIGTRAP})
"""Ends that a task brings on itself: a stack that overflows, a library that gives up where memory ends."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Tasks of one kind: how many at once, what each may use, and what it is called in an error."""

    name: str
    at_once: int
    limits: Limits
    doing: str


class Workers:
    """Runs tasks in children of one zygote, which has `world()`. All methods are called on the event loop."""

    def __init__(self, world: Callable[[], Any], lanes: tuple[Lane, ...]) -> None:
        """world: called on a thread when a zygote starts; its `prepare()` is called there, its tasks get it."""
        self._world = world
        self.lanes = {lane.name: lane for lane in lanes}
        self._places = {lane.name: FairSemaphore(lane.at_once) for lane in lanes}
        self._zygote: Zygote | None = None
        self._starting = asyncio.Lock()
        self._forking: asyncio.Task[None] | None = None
        self._closed = False
        self.num_run = 0
        self.num_failed = 0

    async def start(self) -> None:
        """Start the zygote now rather than at the first task."""
        await self._ready_zygote()

    async def run(self, task: Task, lane: str, *, line: str = "", param: str | None = None) -> Any:
        """What the task returns. InvalidRequest where it passes a limit of its lane or crashes its process.

        line: whose task it is.
        """
        kind = self.lanes[lane]
        async with self._places[lane].place(line):
            self.num_run += 1
            reason = ""
            for _ in range(ATTEMPTS):
                try:
                    outcome = await self._attempt(task, kind, param)
                    break
                except WorkerLost as lost:
                    reason = str(lost)
            else:
                self.num_failed += 1
                said = reason or "a helper process was lost; send the request again"
                raise EngineUnavailable(said, code="worker_lost")
        if outcome.out_of_memory:
            self.num_failed += 1
            raise _too_much_memory(kind, param)
        if outcome.failure is not None:
            raise outcome.failure
        return outcome.value

    async def _attempt(self, task: Task, kind: Lane, param: str | None) -> Outcome:
        """Run the task once. Raises WorkerLost where it may be begun again."""
        zygote = await self._ready_zygote()
        child = await zygote.child()
        self._keep_one_waiting(zygote)
        try:
            return await child.ask(Order(task, kind.limits))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise await self._explained(zygote, child, kind, param) from None
        finally:
            child.end()

    def close(self) -> None:
        """Kill everything, at once."""
        self._closed = True
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None

    async def _explained(self, zygote: Zygote, child: Child, kind: Lane, param: str | None) -> Exception:
        status = None if child.pid is None else await zygote.status(child.pid)
        if status == -signal.SIGXCPU:
            self.num_failed += 1
            return InvalidRequest(
                f"{kind.doing} took more than {kind.limits.cpu_s} s of CPU time; send less of it, or something simpler",
                param=param,
                code="too_much_work",
            )
        log.warning("a worker was lost", lane=kind.name, status=status)
        if status in CRASHES:
            self.num_failed += 1
            return _too_much_memory(kind, param)
        return WorkerLost()

    async def _ready_zygote(self) -> Zygote:
        async with self._starting:
            if self._closed:
                raise EngineUnavailable("the server is shutting down and takes no new requests", code="draining")
            if self._zygote is None or not self._zygote.alive:
                if self._zygote is not None:
                    log.warning("the process that workers are forked from has died; it is started again")
                    self._zygote.close()
                try:
                    self._zygote = await asyncio.to_thread(start_zygote, self._world)
                except OSError as error:  # no descriptor, process or memory left, or it ended as it began
                    log.error("the process that workers are forked from cannot be started", kind=type(error).__name__)
                    raise no_room(error.strerror or str(error) or type(error).__name__) from None
                self._zygote.listen(asyncio.get_running_loop())
            return self._zygote

    def _keep_one_waiting(self, zygote: Zygote) -> None:
        async def fork() -> None:
            with contextlib.suppress(WorkerLost):
                child = await zygote.fork()
                if zygote.alive and not self._closed:
                    zygote.standby.append(child)
                else:
                    child.end()

        if not zygote.standby and (self._forking is None or self._forking.done()):
            self._forking = asyncio.create_task(fork())


def _too_much_memory(kind: Lane, param: str | None) -> InvalidRequest:
    return InvalidRequest(
        f"{kind.doing} took more than {kind.limits.memory_bytes // 2**20} MiB of memory, or crashed; send less of it, "
        "or something simpler",
        param=param,
        code="too_much_work",
    )
