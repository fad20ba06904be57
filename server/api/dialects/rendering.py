"""POST …/render: prompts as token ids, by the bodies that would have them answered, as vLLM tells them.

It is what routers ask for that choose a server by the prefixes that it holds. Whatever an answer would refuse is
refused, but for want of room in the queue.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from prerope.server.api.dialects.kept_responses import with_history
from prerope.server.api.dialects.lowering.anthropic import MessagesRequest
from prerope.server.api.dialects.lowering.responses import ResponsesRequest
from prerope.server.api.openai.schemas import ChatRequest, CompletionRequest
from prerope.server.api.requests.reading import Read
from prerope.server.api.running import ReadyService, body_of, checked, engine_requests, new_id
from prerope.server.api.stream.printing import Many, json_response
from prerope.server.service import Service

router = APIRouter(prefix="/v1", tags=["openai"])


@router.post("/completions/render", summary="Prompts as token ids, by the body that would have them completed")
async def completions(
    read: Annotated[Read[CompletionRequest], Depends(body_of(CompletionRequest))], service: ReadyService
) -> Response:
    """A list: one of each prompt."""
    return await json_response(await _rendered(service, read, "cmpl"))


@router.post("/chat/completions/render", summary="A chat as token ids, by the body that would have it answered")
async def chat(read: Annotated[Read[ChatRequest], Depends(body_of(ChatRequest))], service: ReadyService) -> Response:
    """The prompt that the chat template writes."""
    return await json_response((await _rendered(service, read, "chatcmpl"))[0])


@router.post("/responses/render", include_in_schema=False)
async def responses(
    read: Annotated[Read[ResponsesRequest], Depends(body_of(ResponsesRequest, with_history))], service: ReadyService
) -> Response:
    return await json_response((await _rendered(service, read, "resp"))[0])


@router.post("/responses/input_tokens", include_in_schema=False)
async def input_tokens(
    read: Annotated[Read[ResponsesRequest], Depends(body_of(ResponsesRequest, with_history))],
    service: ReadyService,  # noqa: ARG001
) -> Response:
    """How many tokens the prompt of such a request has, with those that it goes on from."""
    (prompt,) = read.ready[1].prompts
    return await json_response({"object": "response.input_tokens", "input_tokens": len(prompt.ids)})


@router.post("/messages/render", include_in_schema=False)
async def messages(
    read: Annotated[Read[MessagesRequest], Depends(body_of(MessagesRequest))], service: ReadyService
) -> Response:
    return await json_response((await _rendered(service, read, "msg"))[0])


async def _rendered(service: Service, read: Read[Any], prefix: str) -> list[dict[str, Any]]:
    request, prepared = read.ready
    request_id = new_id(prefix)
    engine_requests(service, request_id, await checked(service, read), request, arrived=time.perf_counter())
    told = {"request_id": request_id, "model": service.model_name}
    return [{**told, "token_ids": Many.ids(prompt.ids)} for prompt in prepared.prompts]
