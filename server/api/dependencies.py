"""FastAPI's dependencies: the service, once it is ready, and the request's body, read.

Small bodies are read where they came, larger ones by a worker. What reading takes grows with the body, by a client's
choice of what is in it up to ten microseconds a byte, and most of it with the interpreter's lock held: on the event
loop or a thread it would stop every stream.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import structlog
from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from prerope.server.api.fairness import TooLong, current_hold, cut_off, turn
from prerope.server.api.openai.schemas import CompletionRequest
from prerope.server.api.requests.body import RequestBody, current_report
from prerope.server.api.requests.reading import Read, ReadTask, read_body
from prerope.server.api.requests.schemas import GenerateRequest
from prerope.server.api.stream.generation import while_connected
from prerope.server.engine.async_engine import EngineState
from prerope.server.service import Service
from prerope.server.workers.lanes import INLINE_BYTES, LARGE_BODY, SMALL_BODY

log = structlog.get_logger(__name__)

B = TypeVar("B", bound=RequestBody)

INLINE_ITEMS, INLINE_DIGITS = 160, 1024
"""Beside `INLINE_BYTES`, of a body that is read on the event loop, in two or three milliseconds: a worker takes ten. A
message or a prompt costs for its being there, and tokenizers take long over long numbers."""

OF_TEXT = (CompletionRequest, GenerateRequest)
"""What no chat template has a part in."""

DIGITS = b"0123456789"


def any_service(request: Request) -> Service:
    """The service of an endpoint that answers in every state."""
    service: Service = request.app.state.service
    return service


async def ready_service(request: Request) -> Service:  # async: FastAPI sends plain functions to a thread
    """The service of an endpoint that needs the model: EngineUnavailable, saying why, unless requests are taken."""
    service: Service = request.app.state.service
    if service.engine.state is not EngineState.READY:
        raise service.unavailable()
    return service


AnyService = Annotated[Service, Depends(any_service)]
ReadyService = Annotated[Service, Depends(ready_service)]

SMALL_BYTES = 256 * 2**10
"""Bodies up to this size do not wait for larger ones."""


def body_of(
    model: type[B], completed: Callable[[Service, bytes], bytes] = lambda _, raw: raw
) -> Callable[[Request, ReadyService], Awaitable[Read[B]]]:
    """A dependency: the request's body as a `model`, and what follows from it. Raises what `read_body` raises.

    completed: adds to a body what the server knows of it.
    """

    async def read(request: Request, service: ReadyService) -> Read[B]:
        async with service.bodies.body(request) as came:
            _check_kind(request)
            raw = completed(service, came)
            if not _is_little(raw) or not (service.reads_inline or issubclass(model, OF_TEXT)):
                return await _read_by_worker(model, raw, request, service)
            async with turn():
                try:
                    return cut_off(lambda: read_body(model, raw, service.text))
                except (TooLong, MemoryError):  # such as a chat template that goes round in circles for some chats
                    service.reads_inline = False
                    log.warning(
                        "a little body took long or much memory to read, so all are read by workers from now on"
                    )
            return await _read_by_worker(model, raw, request, service)

    return read


async def _read_by_worker(model: type[B], raw: bytes, request: Request, service: Service) -> Read[B]:
    lane = SMALL_BODY if len(raw) <= SMALL_BYTES else LARGE_BODY
    report = current_report()
    task = ReadTask(model, raw, report.strict)
    work = service.workers.run(task, lane.name, line=current_hold().line)
    result: Read[B] = await while_connected(request, work)
    for name in result.ignored:
        report.ignore(name)
    return result


def _is_little(raw: bytes) -> bool:
    """Whether reading it takes no longer than to ask a worker."""
    return (
        len(raw) <= INLINE_BYTES
        and raw.count(b'"') // 2 + raw.count(b"{") <= INLINE_ITEMS
        and len(raw) - len(raw.translate(None, DIGITS)) <= INLINE_DIGITS
    )


def _check_kind(request: Request) -> None:
    """JSON, as it is. (A page of another site may send text unasked, but not this type.)"""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    plain = request.headers.get("content-encoding", "identity").strip().lower() in ("", "identity")
    if not plain or not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        complaint = {"type": "dict_type", "loc": ("body",), "msg": "The body must be a JSON object.", "input": None}
        raise RequestValidationError([complaint])
