"""What the server and its workers say to each other over a socket: pickles, each with its length before it.

    length of the pickle, number of buffers · length of each buffer · the pickle · the buffers

A buffer is what a task holds as a `pickle.PickleBuffer`, such as the bytes of a body: it is sent as it lies, a piece at
a time. Copied into a pickle and that into a message, 16 MiB would keep the interpreter's lock for a tenth of a second.
Both ends are this program, on one machine, over socket pairs that nobody else can open.
"""

from __future__ import annotations

import pickle
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEADER = struct.Struct("!QI")
"""The length of a message's pickle in bytes, and how many buffers come after it."""

LENGTH = struct.Struct("!Q")

PIECE_BYTES = 256 * 2**10
"""What is given to a socket at once."""

EXIT = struct.Struct("!ii")
"""A child's process id, and its status as `os.waitstatus_to_exitcode` gives it."""


class Task(Protocol):
    """Work for a process of its own. A task is pickled on its way there, and so is its result."""

    def run(self, world: Any) -> Any:
        """Do the work. `world` is what `Workers` was given; a `RequestError` is raised again for whoever asked."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one task may use.

    Attributes:
        cpu_s: seconds of CPU time, whole ones.
        memory_bytes: beside what the process has before it begins.
        stack_bytes: of a thread that the task starts, beside its memory.
    """

    cpu_s: int
    memory_bytes: int
    stack_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """A task and its limits."""

    task: Task
    limits: Limits


@dataclass(frozen=True, slots=True)
class Outcome:
    """A task's result: its `value`; or `failure`, the error that it raised; or `out_of_memory`."""

    value: Any = None
    failure: BaseException | None = None
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Unborn:
    """Sent in place of a child's process id, where the system lets no child begin: the reason."""

    reason: str


def as_it_lies(data: bytes | memoryview) -> pickle.PickleBuffer:
    """Wraps bytes in a task's `__reduce__`, so that they are sent as a buffer of their own, without a copy."""
    return pickle.PickleBuffer(data)


def pieces(message: object) -> Iterator[memoryview]:
    """The message, ready to be sent, without a copy of its buffers."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    lengths = b"".join(LENGTH.pack(len(view)) for view in views)
    for view in (memoryview(HEADER.pack(len(data), len(views)) + lengths + data), *views):
        for start in range(0, len(view), PIECE_BYTES):
            yield view[start : start + PIECE_BYTES]


def pack(message: object) -> bytes:
    """A small message in one piece of bytes."""
    return b"".join(pieces(message))


def receive(channel: socket.socket) -> Any:
    """The next message. EOFError where the other end has closed."""
    size, count = HEADER.unpack(_exactly(channel.recv_into, HEADER.size))
    lengths = [LENGTH.unpack(_exactly(channel.recv_into, LENGTH.size))[0] for _ in range(count)]
    data, *buffers = [_exactly(channel.recv_into, length) for length in (size, *lengths)]
    return pickle.loads(data, buffers=map(bytes, buffers))  # of a bytearray it would make a view, which is no text


def _exactly(read: Callable[[memoryview], int], size: int) -> bytearray:
    data = bytearray(size)
    left = memoryview(data)
    while left:
        count = read(left)
        if not count:
            raise EOFError
        left = left[count:]
    return data
