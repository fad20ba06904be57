"""Zygotes that begin in a moment: forked from a process that has imported what each would import, once for all tests.

    python -c "from tests.zygotes import main; main(FD)"     forks a zygote for each control socket that FD is sent

Only for the world of a server (`server.workers.world`); what else tests give to workers begins as a server's does.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import Any, NoReturn

from prerope.server.workers import zygote
from prerope.server.workers.children import Zygote
from prerope.server.workers.messages import pack
from prerope.server.workers.world import World

PID = struct.Struct("!i")
START_TIMEOUT_S = 120.0


class Forked:
    """Of `subprocess.Popen`, what the owner of a zygote asks for, for a process that another has forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Zero once it has ended, however that was."""
        return 0 if select.select([self._handle], [], [], 0)[0] else None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def wait(self) -> None:
        select.select([self._handle], [], [])


class Ancestor:
    """The process that zygotes are forked from, which is begun at once, and ready when the first one is wanted."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_TIMEOUT_S)
        self._turn = threading.Lock()  # servers start on threads
        with theirs:
            where = f"import sys; sys.path[:] = {sys.path!r}; from tests.zygotes import main"
            command = [sys.executable, "-c", f"{where}; main({theirs.fileno()})"]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])

    def start(self, world: World) -> Zygote:
        """What `start_zygote` does."""
        ours, theirs = socket.socketpair()
        with theirs, self._turn:
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
            process: Any = Forked(*PID.unpack(self._control.recv(PID.size)))
        ours.settimeout(START_TIMEOUT_S)
        ours.sendall(pack(world))
        return Zygote(process, ours)

    def close(self) -> None:
        self._control.close()
        self._process.wait()


def main(control_fd: int) -> NoReturn:
    """Fork zygotes until the other end of the socket is closed."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # as a zygote does
    control = socket.socket(fileno=control_fd)
    with contextlib.redirect_stderr(io.StringIO()):
        _prepare()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            os._exit(0)
        if not (pid := os.fork()):
            control.close()
            os.setpgid(0, 0)
            zygote.main(*fds)
        os.close(*fds)
        control.sendall(PID.pack(pid))


def _prepare() -> None:
    """As for a world of a few letters: so nothing is named here that a zygote may one day not import."""
    from prerope.server.api.requests.reading import ModelText

    from tests.server.tasks import tokenizer_with

    tokenizer = tokenizer_with("{{ messages[0].content }}")
    World(ModelText(tokenizer, ("a",), True, 64, tokenizer.vocab_size)).prepare()


def _reap(*_: Any) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
