"""The processes that tasks run in, as the event loop sees them: a zygote, and children that it forks for one task each.

    Workers ─ child() ─ Zygote ── control socket ── server.workers.zygote ── fork ──┐
            ─ ask(order) ─ Child ───────────────── a socket of its own ───────── the child ── ends

A child is killed when its task is done, or when nobody waits for it any more. `standby` holds children in waiting.
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
from pathlib import Path
from typing import Any

from prerope.server.workers.messages import EXIT, HEADER, Order, Outcome, Unborn, pack, pieces

READ_LIMIT = 2**20
BEGIN_TIMEOUT_S = 60.0
"""Seconds in which a zygote that lives lets a child begin, however busy the machine is; else it is taken for lost."""
READ_AGAIN_S = 0.01
"""Seconds until a zygote that has not read what was sent to it is looked at again."""
EXIT_GRACE_S = 5.0
"""Seconds between the end of a child's socket and word of how it ended."""


LOOK_S, STILL_LOOKS = 30.0, 2
"""A child that has had no CPU time at so many looks, so many seconds apart, is lost. However busy the machine is, a
child has some; and at the first look after the whole server stood, none had any."""


class WorkerLost(Exception):
    """A child or its zygote has ended or cannot start, through no fault of the task, which may be begun again."""


def no_room(reason: str) -> WorkerLost:
    """The error of a machine that lets no process begin."""
    return WorkerLost(
        f"this machine lets no helper process begin ({reason}): try again in a moment; where it stays so, allow more "
        "processes (ulimit -u, pids.max), descriptors (ulimit -n) or memory"
    )


@dataclass(slots=True)
class Child:
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
            raise no_room(told.reason)
        self.pid = told
        with contextlib.suppress(AttributeError, OSError):
            self.handle = os.pidfd_open(told)

    async def receive(self) -> Any:
        size, _ = HEADER.unpack(await self.reader.readexactly(HEADER.size))  # a child sends no buffers
        return pickle.loads(await self.reader.readexactly(size))

    async def ask(self, order: Order) -> Outcome:
        """Let it run an order. WorkerLost where it stands still: stopped, say, so that no limit of CPU time ends it."""
        asked, before, still = asyncio.ensure_future(self._exchange(order)), self._cpu_time(), 0
        try:
            while not (await asyncio.wait({asked}, timeout=LOOK_S))[0]:
                now = self._cpu_time()
                still, before = still + 1 if now and now == before else 0, now
                if still == STILL_LOOKS:
                    raise WorkerLost("a helper process stood still: send the request again")
            return asked.result()
        finally:
            asked.cancel()

    def _cpu_time(self) -> list[bytes]:
        """As much as it has had of it, in the kernel's words; nothing where the kernel does not say."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].split()[11:13]
        except OSError:
            return []

    async def _exchange(self, order: Order) -> Outcome:
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
class Zygote:
    """The process that children are forked from. `ended`: exit statuses of children, as the zygote tells of them."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    standby: deque[Child] = field(default_factory=deque)
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

    async def child(self) -> Child:
        """A child for one task: the one kept in waiting, or a new one."""
        while self.standby:
            child = self.standby.popleft()
            if child.alive:
                return child
            child.end()
        return await self.fork()

    async def fork(self) -> Child:
        child = None
        try:
            async with asyncio.timeout(BEGIN_TIMEOUT_S):
                child = await self._ask_for_one()
                await child.greet()
        except (asyncio.IncompleteReadError, ConnectionError):
            raise WorkerLost from None
        except TimeoutError:
            self.alive = False  # the next task begins another, and ends this one
            raise WorkerLost("a helper process did not begin in time: try again") from None
        except OSError as error:
            raise no_room(error.strerror or type(error).__name__) from None
        finally:
            if child is not None and child.pid is None:
                child.end()
        return child

    async def _ask_for_one(self) -> Child:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                await self._send(theirs)
            return Child(*await asyncio.open_connection(sock=ours, limit=READ_LIMIT))
        except BaseException as error:  # whoever wanted it may have left
            ours.close()
            if isinstance(error, ConnectionError):  # otherwise it lives, and there is no room for this one alone
                self.alive = False
            raise

    async def _send(self, theirs: socket.socket) -> None:
        """Hand a child's socket over. A zygote that begins may not have read its world to the end."""
        while True:
            try:
                socket.send_fds(self.control, [b"+"], [theirs.fileno()])
            except BlockingIOError:
                await asyncio.sleep(READ_AGAIN_S)
            else:
                return

    def close(self) -> None:
        for child in self.standby:
            child.end()
        self.standby.clear()
        self._turn_away()
        self.control.close()
        self.process.kill()
        self.process.wait()


def start_zygote(world: Callable[[], Any]) -> Zygote:
    """A new zygote, which has `world()`. OSError where the system lets none begin, or it does not read in time."""
    ours, theirs = socket.socketpair()
    with theirs, contextlib.ExitStack() as failed:
        failed.callback(ours.close)
        where = f"import sys; sys.path[:] = {sys.path!r}; from prerope.server.workers.zygote import main"
        process = subprocess.Popen(
            [sys.executable, "-c", f"{where}; main({theirs.fileno()})"],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            process_group=0,  # no session of its own: where those have equal shares of cores, being nice is for nothing
        )
        zygote = Zygote(process, ours)
        failed.callback(zygote.close)
        theirs.close()  # where it ends as it begins, sending fails
        ours.settimeout(BEGIN_TIMEOUT_S)
        ours.sendall(pack(world()))
        failed.pop_all()
    return zygote
