"""POST /generate: our own endpoint, and the plainest."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from prerope.server.api.dialects.lowering.others import AnyGenerateRequest, SglangRequest, TgiRequest
from prerope.server.api.dialects.others import other_dialect
from prerope.server.api.logprobs import generate_logprobs, vllm_prompt_logprobs
from prerope.server.api.requests.reading import Read
from prerope.server.api.requests.schemas import GenerateRequest
from prerope.server.api.running import ReadyService, Running, body_of, start
from prerope.server.api.stream.generation import Piece, read_all, while_connected
from prerope.server.api.stream.printing import Many, event_stream, json_response
from prerope.server.api.stream.turns import in_turn
from prerope.server.engine.outputs import FinishReason
from prerope.server.service import Service

router = APIRouter(tags=["generate"])


@router.post("/generate", summary="Continue a prompt")
async def generate(
    read: Annotated[Read[Any], Depends(body_of(AnyGenerateRequest))], request: Request, service: ReadyService
) -> Response:
    """Continue a prompt (text or token ids), as one JSON reply or as a stream of server-sent events."""
    body: GenerateRequest | TgiRequest | SglangRequest = read.body
    running = await while_connected(request, start(service, read, "gen", time.perf_counter()))
    if not isinstance(body, GenerateRequest):
        return await other_dialect(service, request, running, body)
    if body.stream:
        return event_stream(_events(service, running, body))
    (reply,) = await read_all(request, running.generations)
    whole = Piece(reply.text, reply.tokens, reply.prompt_logprobs, finish_reason=reply.finish_reason)
    return await json_response({**_printed(service, whole, body), **_last_fields(running, reply.finish_reason)})


async def _events(service: Service, running: Running, body: GenerateRequest) -> AsyncGenerator[dict[str, Any], None]:
    """One event a step; `index` counts the tokens sent before it, so that a reader can tell a gap."""
    index = 0
    async with in_turn(running.generations) as pieces:
        async for _, piece in pieces:
            if piece.progress is not None:
                yield {"progress": asdict(piece.progress)}
            if piece.text or piece.tokens:
                yield {"index": index, **_printed(service, piece, body)}
                index += len(piece.tokens)
            if piece.finish_reason is not None:
                yield _last_fields(running, piece.finish_reason)


def _printed(service: Service, piece: Piece, body: GenerateRequest) -> dict[str, Any]:
    printed: dict[str, Any] = {"text": piece.text, "token_ids": Many.ids([token.token_id for token in piece.tokens])}
    if body.logprobs is not None:
        printed["logprobs"] = generate_logprobs(service.tokenizer, piece.tokens)
    if piece.prompt_logprobs is not None:
        printed["prompt_logprobs"] = vllm_prompt_logprobs(service.tokenizer, piece.prompt_logprobs)
    return printed


def _last_fields(running: Running, finish_reason: FinishReason) -> dict[str, Any]:
    (generation,) = running.generations
    return {
        "id": running.id,
        "finish_reason": finish_reason,
        "usage": asdict(generation.usage),
        "rope": generation.rope,
        **({"documents": generation.documents} if generation.documents else {}),
        "timings": None if generation.timings is None else asdict(generation.timings),
    }
