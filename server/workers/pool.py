"""Tasks in killable processes, for an event loop: `await workers.run(task, …)`.

Nothing waits for ever. A task that passes its limits, or crashes its process, is an error with words; one whose
process was ended by somebody else is begun again, once; one that nobody waits for any more is killed at once. Each lane
runs so many tasks at a time, and is fair to those whose tasks wait (`server.workers.fair`). The processes come from one
zygote (`server.workers.zygote`), which starts when it is first needed or by `start`, is started again when it has died,
and keeps a child in waiting, since a fork takes milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog
from prerope.server.errors import EngineUnavailable, InvalidRequest
from prerope.server.workers.fair import FairSemaphore
from prerope.server.workers.messages import EXIT, HEADER, Limits, Order, Outcome, Task, Unborn, pack, pieces

log = structlog.get_logger(__name__)

READ_LIMIT = 2**20
EXIT_GRACE_S = 5.0
"""Seconds between the end of a child's socket and word of how it ended."""

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


class _Lost(Exception):
    """A child or its zygote has ended or cannot start, through no fault of the task, which may be begun again."""


def _no_room(reason: str) -> _Lost:
    return _Lost(
        f"this machine lets no helper process begin ({reason}): try again in a moment; where it stays so, allow more "
        "processes (ulimit -u, pids.max), descriptors (ulimit -n) or memory"
    )


@dataclass(slots=True)
class _Child:
    """`handle` is its pidfd, where the system has those: it names this process even when its id is another's."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    pid: int | None = None
    handle: int | None = None

    @property
    def alive(self) -> bool:
        return not self.reader.at_eof() and not self.writer.transport.is_closing()

    async def greet(self) -> None:
        """Receive the child's process id."""
        told = await self.receive()
        if isinstance(told, Unborn):
            raise _no_room(told.reason)
        self.pid = told
        with contextlib.suppress(AttributeError, OSError):
            self.handle = os.pidfd_open(told)

    async def receive(self) -> Any:
        size, _ = HEADER.unpack(await self.reader.readexactly(HEADER.size))  # a child sends no buffers
        return pickle.loads(await self.reader.readexactly(size))

    async def ask(self, order: Order) -> Outcome:
        for piece in pieces(order):
            self.writer.write(piece)
            await self.writer.drain()
        outcome: Outcome = await self.receive()
        return outcome

    def end(self) -> None:
        """Kill the child, whatever it does."""
        self.writer.transport.abort()
        pid, handle, self.pid, self.handle = self.pid, self.handle, None, None
        with contextlib.suppress(ProcessLookupError):
            if handle is not None:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            elif pid is not None:
                os.kill(pid, signal.SIGKILL)
        if handle is not None:
            os.close(handle)


@dataclass(slots=True)
class _Zygote:
    process: subprocess.Popen[bytes]
    control: socket.socket
    standby: deque[_Child] = field(default_factory=deque)
    ended: dict[int, int] = field(default_factory=dict)
    told: asyncio.Event = field(default_factory=asyncio.Event)
    alive: bool = True
    loop: asyncio.AbstractEventLoop | None = None

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        self.control.setblocking(False)
        loop.add_reader(self.control, self._hear)
        self.loop = loop

    def _hear(self) -> None:
        try:
            data = self.control.recv(EXIT.size * 64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._turn_away()
        for pid, status in EXIT.iter_unpack(data[: len(data) // EXIT.size * EXIT.size]):
            self.ended[pid] = status
            while len(self.ended) > 1024:  # of children that nobody asks about
                self.ended.pop(next(iter(self.ended)))
        self.told.set()

    async def status(self, pid: int) -> int | None:
        """The exit status of a child whose socket is closed; None where it cannot be known."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_GRACE_S):
                while pid not in self.ended and self.alive:
                    self.told.clear()
                    await self.told.wait()
        return self.ended.pop(pid, None)

    def _turn_away(self) -> None:
        self.alive = False
        if self.loop is not None:
            self.loop.remove_reader(self.control)  # or the loop would take the next one's socket for this one
            self.loop = None

    def close(self) -> None:
        for child in self.standby:
            child.end()
        self.standby.clear()
        self._turn_away()
        self.control.close()
        self.process.kill()
        self.process.wait()


class Workers:
    """Runs tasks in children of one zygote, which has `world()`. All methods are called on the event loop."""

    def __init__(self, world: Callable[[], Any], lanes: tuple[Lane, ...]) -> None:
        """world: called on a thread when a zygote starts; its `prepare()` is called there, its tasks get it."""
        self._world = world
        self.lanes = {lane.name: lane for lane in lanes}
        self._places = {lane.name: FairSemaphore(lane.at_once) for lane in lanes}
        self._zygote: _Zygote | None = None
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
                except _Lost as lost:
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
        """Run the task once. Raises _Lost where it may be begun again."""
        zygote = await self._ready_zygote()
        child = await self._child(zygote)
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

    async def _explained(self, zygote: _Zygote, child: _Child, kind: Lane, param: str | None) -> Exception:
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
        return _Lost()

    # --- the zygote and its children ---

    async def _ready_zygote(self) -> _Zygote:
        async with self._starting:
            if self._closed:
                raise EngineUnavailable("the server is shutting down and takes no new requests", code="draining")
            if self._zygote is None or not self._zygote.alive:
                if self._zygote is not None:
                    log.warning("the process that workers are forked from has died; it is started again")
                    self._zygote.close()
                try:
                    self._zygote = await asyncio.to_thread(_start, self._world)
                except OSError as error:  # no descriptor, process or memory left, or it ended as it began
                    log.error("the process that workers are forked from cannot be started", kind=type(error).__name__)
                    raise _no_room(error.strerror or type(error).__name__) from None
                self._zygote.listen(asyncio.get_running_loop())
            return self._zygote

    async def _child(self, zygote: _Zygote) -> _Child:
        """A child for one task: the one kept in waiting, or a new one."""
        while zygote.standby:
            child = zygote.standby.popleft()
            if child.alive:
                return child
            child.end()
        return await self._fork(zygote)

    async def _fork(self, zygote: _Zygote) -> _Child:
        child = None
        try:
            child = await self._ask_for_one(zygote)
            await child.greet()
        except (asyncio.IncompleteReadError, ConnectionError):
            raise _Lost from None
        except OSError as error:
            raise _no_room(error.strerror or type(error).__name__) from None
        finally:
            if child is not None and child.pid is None:
                child.end()
        return child

    async def _ask_for_one(self, zygote: _Zygote) -> _Child:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(zygote.control, [b"+"], [theirs.fileno()])
            return _Child(*await asyncio.open_connection(sock=ours, limit=READ_LIMIT))
        except OSError as error:
            ours.close()
            if isinstance(error, ConnectionError):  # otherwise it lives, and there is no room for this one alone
                zygote.alive = False
            raise

    def _keep_one_waiting(self, zygote: _Zygote) -> None:
        async def fork() -> None:
            with contextlib.suppress(_Lost):
                child = await self._fork(zygote)
                if zygote.alive and not self._closed:
                    zygote.standby.append(child)
                else:
                    child.end()

        if not zygote.standby and (self._forking is None or self._forking.done()):
            self._forking = asyncio.create_task(fork())


def _start(world: Callable[[], Any]) -> _Zygote:
    ours, theirs = socket.socketpair()
    with theirs, contextlib.ExitStack() as failed:
        failed.callback(ours.close)
        where = f"import sys; sys.path[:] = {sys.path!r}; from prerope.server.workers.zygote import main"
        process = subprocess.Popen(
            [sys.executable, "-c", f"{where}; main({theirs.fileno()})"],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        zygote = _Zygote(process, ours)
        failed.callback(zygote.close)
        theirs.close()  # where it ends as it begins, sending fails
        ours.sendall(pack(world()))
        failed.pop_all()
    return zygote


def _too_much_memory(kind: Lane, param: str | None) -> InvalidRequest:
    return InvalidRequest(
        f"{kind.doing} took more than {kind.limits.memory_bytes // 2**20} MiB of memory, or crashed; send less of it, "
        "or something simpler",
        param=param,
        code="too_much_work",
    )
