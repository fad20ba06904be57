"""Faults that a test puts into a running engine from outside: the product itself has no switch for them.

A `Point` takes the place of one method of one object. Calls pass through it until a test arms it to raise, to be slow,
to answer something else, or to hold the caller.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from prerope.server.engine.engine import Engine

HELD_S = 60
"""Nothing is held for longer, whatever a test forgets."""


class Point:
    """One method of one object, in a test's hands. `calls` counts those that came while it was not armed, too."""

    def __init__(self, owner: object, name: str) -> None:
        self._original = getattr(owner, name)
        self._error: BaseException | None = None
        self._seconds = 0.0
        self._answers: list[Any] = []
        self._open = threading.Event()
        self._open.set()
        self.entered = threading.Event()
        self.calls = 0
        setattr(owner, name, self)

    def fail(self, error: BaseException) -> None:
        """Every call raises, from now on."""
        self._error = error

    def slow_down(self, seconds: float) -> None:
        """Every call takes that much longer."""
        self._seconds = seconds

    def answer(self, *answers: Any) -> None:
        """The next calls return these, one after the other, and do nothing."""
        self._answers = list(answers)

    def hold(self) -> None:
        """The next call waits inside; `entered` is set once one does."""
        self.entered.clear()
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if not self._open.is_set():
            self.entered.set()
            self._open.wait(HELD_S)
        if self._seconds:
            time.sleep(self._seconds)
        if self._error is not None:
            raise self._error
        return self._answers.pop(0) if self._answers else self._original(*args, **kwargs)


class Faults:
    """The points of one engine: `forward` is the model's part of a step, `grow` the cache's."""

    def __init__(self, engine: Engine) -> None:
        self.forward = Point(engine, "_forward")
        self.grow = Point(engine.scheduler.cache, "grow")
