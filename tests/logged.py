"""What loggers of the standard library are told, for tests that look at it.

pytest's own plugin for that is left out (pyproject.toml): six times a test it goes through the thousand loggers of what
is imported, and hands a handler to some, which takes longer than many a test.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def logged(name: str | None = None, level: int = logging.WARNING) -> Iterator[list[logging.LogRecord]]:
    """The records of a logger, or of all whose records reach the root, from this level on, which it has meanwhile."""
    records = list[logging.LogRecord]()
    handler, logger = logging.Handler(level), logging.getLogger(name)
    handler.emit = records.append  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield records
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
