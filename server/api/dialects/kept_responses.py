"""Responses that are kept: how a conversation goes on, and GET and DELETE /v1/responses/{id}.

A conversation goes on by `previous_response_id` while its items are kept: in memory, up to `MAX_CONVERSATION_BYTES` of
all tenants together, each found by its own tenant alone; `ByteCache` says who gives up what where there is no room.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from prerope.server.api.dialects.lowering.items import Page
from prerope.server.api.fairness import current_hold
from prerope.server.api.requests.task import Pieces
from prerope.server.api.running import SMALL_BYTES, ReadyService
from prerope.server.api.stream.generation import while_connected
from prerope.server.api.stream.printing import printed
from prerope.server.errors import InvalidRequest, NotKept
from prerope.server.service import Kept, Service
from prerope.server.workers.lanes import LARGE_BODY, SMALL_BODY

router = APIRouter(prefix="/v1/responses", tags=["openai"])

MAX_KEPT_ITEMS_BYTES = 8 * 2**20
"""The most bytes of one conversation's items; a longer conversation is not kept."""

ENTRY_BYTES = 512
"""What a conversation takes beside its text."""

_PREVIOUS = re.compile(rb'"previous_response_id"\s*:\s*"(resp-[0-9a-f]{32})"')


def with_history(service: Service, raw: bytes) -> Pieces:
    """A body with the items that its `previous_response_id` stands for beside it, so that whoever reads it has both.

    They are where they are kept: each of a thousand bodies that wait to be read would have a copy of megabytes.
    """
    named = raw.find(b'"previous_response_id"')  # an expression takes ten times as long over a large body
    found = None if named < 0 else _PREVIOUS.search(raw, named)
    if found is None or not raw.rstrip().endswith(b"}"):
        return (raw,)
    kept = service.conversations.get((current_hold().tenant, found[1].decode()))
    if kept is None:
        return (raw,)
    between = b"," if len(kept.given) > len(b"[]") else b""
    items = (memoryview(kept.given)[:-1], between, memoryview(kept.output)[1:])
    return (raw.rstrip()[:-1], b',"_history":{"id":"', found[1], b'","items":', *items, b"}}")


async def keep(service: Service, tenant: str, line: str, given: str, response: Mapping[str, Any]) -> None:
    """Keep a response that ended, where it is small enough. given: the items that it answers, as JSON."""
    head = (await printed({name: value for name, value in response.items() if name != "output"})).encode()
    output = json.dumps(response["output"], separators=(",", ":")).encode()
    kept = Kept(given.encode(), output, head)
    if len(kept.given) + len(output) <= MAX_KEPT_ITEMS_BYTES:
        size = len(kept.given) + len(output) + len(head) + ENTRY_BYTES
        service.conversations.put((tenant, response["id"]), kept, size, line)


def _kept(service: Service, response_id: str) -> Kept:
    kept = service.conversations.get((current_hold().tenant, response_id))
    if kept is None:
        raise _not_kept()
    return kept


def _not_kept() -> NotKept:
    return NotKept(
        "that response is not kept here (any more, or for this key, or it was made with 'store': false)",
        param="response_id",
        code="response_not_found",
    )


@router.get("/{response_id}", summary="Tell a response again")
async def retrieve(service: ReadyService, response_id: str, *, stream: bool = False) -> Response:
    """The response as it ended, without log-probabilities."""
    if stream:
        raise InvalidRequest(
            "'stream' tells a response while it is made: ask for that in the POST that makes it", param="stream"
        )
    kept = _kept(service, response_id)
    return _json(kept.head[:-1] + b',"output":' + kept.output + b"}")


@router.delete("/{response_id}", summary="Forget a response")
async def delete(service: ReadyService, response_id: str) -> Response:
    """Whatever goes on from it is kept for itself."""
    if not service.conversations.remove((current_hold().tenant, response_id)):
        raise _not_kept()
    return _json(json.dumps({"id": response_id, "object": "response", "deleted": True}).encode())


@router.get("/{response_id}/input_items", summary="List what a response answers")
async def input_items(
    request: Request,
    service: ReadyService,
    response_id: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """A page of the conversation's items before the response: the newest first, unless `order` is asc."""
    kept = _kept(service, response_id)
    lane = SMALL_BODY if len(kept.given) <= SMALL_BYTES else LARGE_BODY
    task = Page(kept.given, limit, newest_first=order == "desc", after=after)
    work = service.workers.run(task, lane.name, line=current_hold().line)
    return _json(await while_connected(request, work))


def _json(text: bytes) -> Response:
    return Response(text, media_type="application/json")
