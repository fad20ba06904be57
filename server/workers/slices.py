"""Work of a client's size that stays on the event loop: done in slices, one slice a turn, whoever it is for.

    async with turn() as left:
        while items and left():
            …

The loop calls everything that is ready before it looks for anything new. Had each of a thousand connections its slice
in the same turn, a stream's next token would wait for a thousand of them. So slices take turns, first come first
served, and after each the loop and the engine's thread, which needs the interpreter's lock too, have as much time to
themselves.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

SLICE_S = 0.001
MAX_REST_S = 0.005

INLINE_BYTES = 4096
"""Of a client's: a body that is larger is a worker's."""

LONGEST_S = 0.25
"""Of what runs on the loop at once, whatever it is: then it is cut off."""

T = TypeVar("T")


class TooLong(BaseException):
    """It was cut off. No Exception: what is cut off may catch those, and go on."""


_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


@asynccontextmanager
async def turn() -> AsyncIterator[Callable[[], bool]]:
    """One slice: yields a function that tells whether time is left. Waits only behind slices of others."""
    loop = asyncio.get_running_loop()
    lock = _locks.setdefault(loop, asyncio.Lock())
    await lock.acquire()
    began = time.perf_counter()
    try:
        yield lambda: time.perf_counter() - began < SLICE_S
    finally:
        loop.call_later(min(time.perf_counter() - began, MAX_REST_S), lock.release)


def cut_off(function: Callable[[], T], seconds: float = LONGEST_S) -> T:
    """What it returns; TooLong after so many seconds of this thread's CPU time, wherever in Python's code it is then.

    Only the main thread can be interrupted so: on another it takes as long as it takes.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()

    began, over = time.thread_time(), False

    def stop(*_signal: object) -> None:
        if over:  # the timer ran out after the function had returned: armed again it would end the process
            return
        if time.thread_time() - began >= seconds:
            raise TooLong
        signal.setitimer(signal.ITIMER_REAL, seconds)  # others had the core, or the machine slept

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return function()
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
