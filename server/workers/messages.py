"""What the server and its workers say to each other over a socket: pickles, each with its length before it.

Both ends are this program, on one machine, over socket pairs that nobody else can open.
"""

from __future__ import annotations

import pickle
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = struct.Struct("!Q")
"""The length of a message in bytes."""

EXIT = struct.Struct("!ii")
"""A child's process id, and its status as `os.waitstatus_to_exitcode` gives it."""


class Task(Protocol):
    """Something to do in a process of its own. It is pickled on its way there, and so is what it returns."""

    def run(self, world: Any) -> Any:
        """`world` is what `Workers` was given. A `RequestError` goes back to whoever asked."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one task may use.

    Attributes:
        cpu_s: seconds of CPU time, whole ones.
        memory_bytes: beside what the process has before it begins.
        stack_bytes: of a thread that the task starts, beside its memory.
        nice: how much its process yields to the engine's.
    """

    cpu_s: int
    memory_bytes: int
    stack_bytes: int = 0
    nice: int = 10


@dataclass(frozen=True, slots=True)
class Order:
    """A task and its limits."""

    task: Task
    limits: Limits


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it: `value`; or `failure`, the error that it raised; or `out_of_memory`."""

    value: Any = None
    failure: BaseException | None = None
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Unborn:
    """Comes where a child's process id would: the system lets no child begin, and says why."""

    reason: str


def pack(message: object) -> bytes:
    """The message, ready to be sent."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(data)) + data


def receive(channel: socket.socket) -> Any:
    """The next message. EOFError where the other end has closed."""
    (size,) = HEADER.unpack(_exactly(channel.recv_into, HEADER.size))
    return pickle.loads(_exactly(channel.recv_into, size))


def _exactly(read: Callable[[memoryview], int], size: int) -> bytearray:
    data = bytearray(size)
    left = memoryview(data)
    while left:
        count = read(left)
        if not count:
            raise EOFError
        left = left[count:]
    return data
