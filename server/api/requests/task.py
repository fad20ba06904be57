"""Reading a body as a task for a worker, which sends back a `Read` without the text that the ids stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prerope.server.api.chat.tools import Function, Tool
from prerope.server.api.requests.body import RequestBody, reporting
from prerope.server.api.requests.internal import Chat
from prerope.server.api.requests.reading import ModelText, Read, read_body
from prerope.server.workers.messages import as_it_lies

Pieces = Sequence[bytes | memoryview]
"""A body, from its beginning to its end."""


class HasText(Protocol):
    """What reading needs of the workers' world."""

    @property
    def text(self) -> ModelText: ...


@dataclass(frozen=True, slots=True)
class ReadTask:
    """A task for a worker. strict: of `current_report`, which a worker has none of."""

    model: type[RequestBody]
    pieces: Pieces
    strict: bool

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadTask, (self.model, [as_it_lies(piece) for piece in self.pieces], self.strict)

    def run(self, world: HasText) -> Read[Any]:
        with reporting(strict=self.strict) as report:
            read = _slim(read_body(self.model, b"".join(self.pieces), world.text))
        return dataclasses.replace(read, ignored=tuple(report.names))


def _slim(read: Read[Any]) -> Read[Any]:
    """Without what the ids stand for: the server would spend time on taking it in."""
    body = read.body
    body.slim()
    if read.request is None or read.prepared is None:
        return Read(body, reply=read.reply)
    use = read.prepared.tools
    if use is not None:
        named = [Tool(type="function", function=Function(name=name)) for name in use.names]
        use = dataclasses.replace(use, tools=named, grammar=None)
    prepared = dataclasses.replace(read.prepared, tools=use)
    given = read.request.input
    left: Chat | tuple[()] = ()
    if isinstance(given, Chat):
        left = dataclasses.replace(given, messages=(), tools=(), documents=(), template_kwargs={})
    sampling = dataclasses.replace(read.request.sampling, allowed_token_ids=None)
    return Read(body, dataclasses.replace(read.request, input=left, constraint=None, sampling=sampling), prepared)
