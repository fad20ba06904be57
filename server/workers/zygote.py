"""The process that workers are forked from: it has imported and read what tasks need, once, and torch is not among it.

    server ── control ──▶ zygote      first the world, then a socket for each child that is wanted
                            └─ fork ─▶ child ◀── its socket ──▶ server      its id, an order, the outcome, the end

A child serves one task, so that the kernel can count what the task uses, and ends; what it did to its memory goes with
it. The zygote has one thread, so it may fork. It tells of every child that has ended, and how. When the server is
gone, so is the zygote, and when the zygote is gone, so are its children.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from prerope.server.machine.threads import ASIDE, yield_to_others
from prerope.server.workers.messages import EXIT, Limits, Order, Outcome, Unborn, pack, receive

SLACK_BYTES = 192 * 2**20
"""Of address space, which is what the kernel can limit: allocators reserve more of it than they use."""

PR_SET_PDEATHSIG = 1


def main(control_fd: int) -> NoReturn:
    """Serve the control socket until its other end is closed."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers goes without; nothing here needs it
    gc.disable()  # here and in children, each of which does one task
    control = socket.socket(fileno=control_fd)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    with contextlib.suppress(EOFError, OSError):
        with contextlib.redirect_stderr(io.StringIO()):  # transformers complains that there is no torch
            world = receive(control)
            world.prepare()
        yield_to_others(ASIDE)  # and its children from their birth, which takes a core for a while, too
        gc.collect()
        gc.freeze()  # children share these pages until they write to them
        while True:
            ready, _, _ = select.select([control.fileno(), wake], [], [])
            if wake in ready:
                os.read(wake, 4096)
                _tell_of_the_ended(control)
            if control.fileno() in ready and not _fork(control, world):
                break
    os._exit(0)


def ends_well(function: Callable[[], object], limits: Limits) -> bool:
    """Whether this ends within limits and without an error, tried in a child; for a process of one thread."""
    parent, pid = os.getpid(), os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _end_with(parent)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _limit(limits)
        function()
    except BaseException:
        os._exit(1)
    os._exit(0)


def _tell_of_the_ended(control: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            control.sendall(EXIT.pack(pid, os.waitstatus_to_exitcode(status)))


def _fork(control: socket.socket, world: Any) -> bool:
    """Wait for a socket and fork a child that serves it; False where the control socket is closed."""
    data, fds, _, _ = socket.recv_fds(control, 1, 1)
    if not data:
        return False
    parent = os.getpid()
    for fd in fds:  # none where there was no descriptor left: whoever sent the socket sees it closed
        with socket.socket(fileno=fd) as channel:
            try:
                born = os.fork() == 0
            except OSError as error:  # no process or memory left
                with contextlib.suppress(OSError):
                    channel.sendall(pack(Unborn(error.strerror or type(error).__name__)))
            else:
                if born:
                    control.close()
                    _serve(channel, world, parent)
    return True


def _serve(channel: socket.socket, world: Any, parent: int) -> NoReturn:
    """Run the one task of this child. Whatever happens, the process ends here."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _end_with(parent)
        with contextlib.suppress(OSError):  # rather it than the server, where memory ends
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a library that gives up may write a client's words
        channel.sendall(pack(os.getpid()))
        order: Order = receive(channel)
        channel.sendall(_packed(_run(order, world)))
    except (EOFError, OSError):
        os._exit(0)  # nobody wants it any more
    except BaseException:
        os._exit(1)
    os._exit(0)


def _run(order: Order, world: Any) -> Outcome:
    _limit(order.limits)
    try:
        return Outcome(order.task.run(world))
    except MemoryError:
        return Outcome(out_of_memory=True)
    except Exception as error:
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return Outcome(failure=error)


def _packed(outcome: Outcome) -> bytes:
    try:
        return pack(outcome)
    except MemoryError:
        return pack(Outcome(out_of_memory=True))
    except Exception as error:  # it would be so again: not an end for which the task is begun anew
        return pack(Outcome(failure=RuntimeError(f"what a task returned cannot be sent: {type(error).__name__}")))


def _limit(limits: Limits) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_s, limits.cpu_s + 1))
    if (used := address_space()) is not None:
        most = used + SLACK_BYTES + limits.memory_bytes + limits.stack_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def address_space() -> int | None:
    """Bytes of address space of this process; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except OSError:
        return None


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before this was said
            os._exit(0)
