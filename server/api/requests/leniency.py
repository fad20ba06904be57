"""What becomes of fields that are not honoured: refused, or with STRICT_FIELDS=false left out, logged and named in the
reply's header.

The middleware opens a report for each request; request models, which know neither settings nor headers, write to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

HEADER = "x-ignored-fields"
"""The reply's header that names fields of the request which were not honoured, separated by commas."""

MAX_NAMED = 16
MAX_CHARS = 64


@dataclass(slots=True)
class Report:
    """Which fields of one request were left out. `strict`: a field that would change the reply is refused instead."""

    strict: bool = True
    names: list[str] = field(default_factory=list)

    def ignore(self, name: str) -> None:
        """Note that a field was left out; a client's own words are cut down to what a header can carry.

        That ends in no blank: a name of no letter at its end would make one, and the reply would be lost.
        """
        shown = re.sub(r"[^\w.\[\]-]", "_", name, flags=re.ASCII)[:MAX_CHARS] or "_"
        if shown not in self.names and len(self.names) < MAX_NAMED:
            self.names.append(shown)


_report: ContextVar[Report | None] = ContextVar("report", default=None)


def current_report() -> Report:
    """This request's; outside of one, a strict report that nobody reads."""
    return _report.get() or Report()


@contextmanager
def reporting(*, strict: bool) -> Iterator[Report]:
    """A context in which `current_report` returns the report that it yields."""
    report = Report(strict)
    token = _report.set(report)
    try:
        yield report
    finally:
        _report.reset(token)
