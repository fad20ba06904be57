"""The log: one structlog pipeline to stderr for our lines and for those of the libraries, as text or as JSON.

Lines carry the request's id where there is one (bound by `server.api.middleware`). No line ever carries a prompt, a
reply or an API key: callers log counts and names. What clients can cause as often as they like cannot fill a disk: of
each kind of line there are so many in so many seconds, and then a number (`KindLimit`).
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import structlog
from prerope.server.errors import one_line

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

NOISY = {
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "sse_starlette": logging.INFO,
    "asyncio": logging.INFO,
    "torchao": logging.ERROR,
    "torch.utils._pytree": logging.ERROR,
}
"""Libraries whose debug lines show bodies, or only their own workings (torchao warns of code for other machines)."""


TRACED_FRAMES = 8

LINES_OF_A_KIND, WINDOW_S = 50, 10.0
MAX_KINDS, KIND_CHARS = 1000, 100


@dataclass(slots=True)
class _Window:
    """How many lines of one kind came in the current window."""

    until: float
    lines: int = 0


class KindLimit(logging.Filter):
    """At most so many lines of a kind in a window; the first one after it says how many were left out.

    A kind is a logger, the words of the event, and its status where it has one. Requests that were served are the
    access log, and all there.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[tuple[Any, ...], _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        event = record.msg if isinstance(record.msg, dict) else {"event": record.msg}
        status = event.get("status")
        if isinstance(status, int) and 0 < status < 400:
            return True
        kind = (record.name, record.levelno, str(event.get("event"))[:KIND_CHARS], status)
        window = self._windows.get(kind)
        now, left_out = self._clock(), 0
        if window is None or now >= window.until:
            left_out = max(0, window.lines - LINES_OF_A_KIND) if window is not None else 0
            if len(self._windows) >= MAX_KINDS:
                self._windows.clear()
            window = self._windows[kind] = _Window(now + WINDOW_S)
        window.lines += 1
        if left_out:
            _note(record, f"{left_out} more of this kind were left out")
        elif window.lines == LINES_OF_A_KIND:
            _note(record, f"more of this kind are left out for up to {WINDOW_S:g} s")
        return window.lines <= LINES_OF_A_KIND


def _note(record: logging.LogRecord, note: str) -> None:
    if isinstance(record.msg, dict):
        record.msg = record.msg | {"note": note}
    else:
        record.msg, record.args = f"{record.getMessage()} ({note})", None


def configure_logging(level: str, log_format: str) -> None:
    """Send everything through structlog. `level` and `log_format` are LOG_LEVEL and LOG_FORMAT."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        _in_one_line,
        structlog.processors.TimeStamper(fmt="iso" if log_format == "json" else "%H:%M:%S", utc=log_format == "json"),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(KindLimit())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(log_format)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    for name, least in NOISY.items():
        logging.getLogger(name).setLevel(max(least, LEVELS[level]))


def _in_one_line(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A line is a line, whatever a model's files or a client's words put into it: none can be made to look like two."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = one_line(value)
    return event


def trace(error: BaseException) -> list[str]:
    """Where an error arose, innermost last, without its words: a tokenizer's or a template's may quote a prompt."""
    innermost = traceback.extract_tb(error.__traceback__)[-TRACED_FRAMES:]
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in innermost]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return [*(trace(cause) if cause is not None else ()), *frames, type(error).__name__]


def place_of(thread_id: int | None) -> list[str]:
    """Where a running thread is, innermost last."""
    frame = sys._current_frames().get(thread_id or 0)
    stack = [] if frame is None else traceback.extract_stack(frame)[-TRACED_FRAMES:]
    return [f"{one.filename}:{one.lineno} {one.name}" for one in stack]


def _renderers(log_format: str) -> list[structlog.types.Processor]:
    """Exceptions are printed without local variables, which both libraries show by default: they may hold a prompt."""
    if log_format == "json":
        frames = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        return [structlog.processors.ExceptionRenderer(frames), structlog.processors.JSONRenderer()]
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=plain)]


def route_transformers_log() -> None:
    """transformers' lines through our pipeline; its progress bars on a terminal only. Imports transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
