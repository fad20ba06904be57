"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients speak them."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from prerope.server.api.chat.parts import ArgumentsPart, CallPart, ChatReply, ReasoningPart, TextPart
from prerope.server.api.chat.replies import chat_reply
from prerope.server.api.dialects.common import chat_events, check_complete
from prerope.server.api.dialects.lowering.anthropic import CountTokensRequest, MessagesRequest
from prerope.server.api.requests.reading import Read
from prerope.server.api.running import ReadyService, Running, body_of, start
from prerope.server.api.stream.generation import read_all, while_connected
from prerope.server.api.stream.printing import event_stream
from prerope.server.engine.outputs import FinishReason
from prerope.server.service import Service

router = APIRouter(tags=["anthropic"])


@router.post("/v1/messages", summary="Answer a chat, in Anthropic's shape")
async def messages(
    read: Annotated[Read[MessagesRequest], Depends(body_of(MessagesRequest))], request: Request, service: ReadyService
) -> Response:
    """Anthropic's messages: text and tool use, whole or as events."""
    running = await while_connected(request, start(service, read, "msg", time.perf_counter()))
    if read.body.stream:
        return event_stream(_events(service, running, thoughts=read.body.tells_thoughts), named=True)
    (reply,) = await read_all(request, running.generations)
    check_complete(reply.finish_reason)
    parts = chat_reply(running, reply)
    return JSONResponse(
        {
            **_head(service, running),
            "content": _content(parts, thoughts=read.body.tells_thoughts),
            **_stop(reply.finish_reason, bool(parts.calls), running),
            "usage": _usage(running),
        }
    )


@router.post("/v1/messages/count_tokens", summary="Tokens of a chat, in Anthropic's shape")
async def count_tokens(
    read: Annotated[Read[CountTokensRequest], Depends(body_of(CountTokensRequest))],
    service: ReadyService,  # noqa: ARG001
) -> JSONResponse:
    """How many tokens the prompt of such a request has."""
    (prompt,) = read.ready[1].prompts
    return JSONResponse({"input_tokens": len(prompt.ids)})


def _head(service: Service, running: Running) -> dict[str, Any]:
    return {"id": running.id, "type": "message", "role": "assistant", "model": service.model_name}


def _content(reply: ChatReply, *, thoughts: bool) -> list[dict[str, Any]]:
    thought = [_thinking(reply.reasoning)] if thoughts and reply.reasoning else []
    uses = [
        {"type": "tool_use", "id": one.id, "name": one.name, "input": json.loads(one.arguments or "{}")}
        for one in reply.calls
        if _whole(one.arguments)
    ]
    text = [{"type": "text", "text": reply.text}] if reply.text or not uses else []
    return [*thought, *text, *uses]


def _thinking(text: str) -> dict[str, Any]:
    """Without a signature: thoughts that come back are not read again."""
    return {"type": "thinking", "thinking": text, "signature": ""}


def _whole(arguments: str) -> bool:
    """Whether a call was written to its end: Anthropic's shape has no place for half an object."""
    try:
        return isinstance(json.loads(arguments or "{}"), dict)
    except ValueError:
        return False


def _stop(reason: FinishReason, has_calls: bool, running: Running) -> dict[str, str | None]:
    """Why a reply ended, and by which stop string, if by one."""
    said, string = "max_tokens", running.generations[0].stop_string
    if reason is FinishReason.STOP:
        ended = "tool_use" if has_calls else "end_turn"
        said = ended if string is None else "stop_sequence"
    return {"stop_reason": said, "stop_sequence": string}


def _usage(running: Running) -> dict[str, int]:
    usage = running.generations[0].usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


async def _events(service: Service, running: Running, *, thoughts: bool) -> AsyncGenerator[dict[str, Any], None]:
    """message_start, blocks one after the other, message_delta with the reason, message_stop."""
    start_of: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": {**_usage(running)}}
    yield {"type": "message_start", "message": {**_head(service, running), **start_of}}
    index, kind, num_calls, reason = -1, "", 0, FinishReason.ABORT

    def begin(block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        nonlocal index, kind
        if index >= 0:
            yield {"type": "content_block_stop", "index": index}
        index, kind = index + 1, block["type"]
        yield {"type": "content_block_start", "index": index, "content_block": block}

    async for piece, parts in chat_events(running):
        for part in parts:
            match part:
                case TextPart(text):
                    if kind != "text":
                        for event in begin({"type": "text", "text": ""}):
                            yield event
                    yield _delta(index, {"type": "text_delta", "text": text})
                case ReasoningPart(text) if thoughts:
                    if kind != "thinking":
                        for event in begin(_thinking("")):
                            yield event
                    yield _delta(index, {"type": "thinking_delta", "thinking": text})
                case CallPart(_, call_id, name):
                    num_calls += 1
                    for event in begin({"type": "tool_use", "id": call_id, "name": name, "input": {}}):
                        yield event
                case ArgumentsPart(_, text):
                    yield _delta(index, {"type": "input_json_delta", "partial_json": text})
        reason = piece.finish_reason or reason
    check_complete(reason)
    if index < 0:
        for event in begin({"type": "text", "text": ""}):
            yield event
    yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": _stop(reason, num_calls > 0, running), "usage": _usage(running)}
    yield {"type": "message_stop"}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}
