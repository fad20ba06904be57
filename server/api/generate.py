"""POST /generate: our own endpoint, and the plainest."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prerope.server.api.limits import admit, max_tokens_that_fit, new_id, sampling_params
from prerope.server.api.logprobs import generate_logprobs
from prerope.server.api.ready import ReadyService
from prerope.server.api.requests.prompts import prompt_ids
from prerope.server.api.requests.schemas import GenerateRequest
from prerope.server.api.requests.structured import compiled
from prerope.server.api.stream.collect import in_turn, read_all
from prerope.server.api.stream.generation import Generation, Piece
from prerope.server.api.stream.sse import event_stream
from prerope.server.engine.outputs import FinishReason
from prerope.server.service import Service

router = APIRouter(tags=["generate"])

DEFAULT_MAX_TOKENS = 256


@router.post("/generate", summary="Continue a prompt")
async def generate(body: GenerateRequest, request: Request, service: ReadyService) -> Response:
    """Continue a prompt (text or token ids), as one JSON reply or as a stream of server-sent events."""
    arrived = time.perf_counter()
    reply_id = new_id("gen")
    ids = await prompt_ids(service, body.prompt)
    max_tokens = max_tokens_that_fit(service, len(ids), body.max_tokens, DEFAULT_MAX_TOKENS)
    grammar = await compiled(service, body.wanted_grammar())
    sampling = sampling_params(service, body, max_tokens, logprobs=body.logprobs, grammar=grammar)
    report_progress = body.stream and body.return_progress
    generations = await admit(
        service, reply_id, [(ids, sampling)], body, arrived=arrived, report_progress=report_progress
    )
    if body.stream:
        return event_stream(_events(service, reply_id, generations[0], body))
    (reply,) = await read_all(request, generations)
    whole = Piece(reply.text, reply.tokens, finish_reason=reply.finish_reason)
    return JSONResponse(
        {"id": reply_id, **_printed(service, whole, body), **_ending(generations[0], reply.finish_reason)}
    )


async def _events(
    service: Service, reply_id: str, generation: Generation, body: GenerateRequest
) -> AsyncGenerator[dict[str, Any], None]:
    """One event a step; `index` counts the tokens sent before it, so that a reader can tell a gap."""
    index = 0
    async with in_turn([generation]) as pieces:
        async for _, piece in pieces:
            if piece.progress is not None:
                yield {"progress": asdict(piece.progress)}
            if piece.text or piece.tokens:
                yield {"index": index, **_printed(service, piece, body)}
                index += len(piece.tokens)
            if piece.finish_reason is not None:
                yield {"id": reply_id, **_ending(generation, piece.finish_reason)}


def _printed(service: Service, piece: Piece, body: GenerateRequest) -> dict[str, Any]:
    printed: dict[str, Any] = {"text": piece.text, "token_ids": [token.token_id for token in piece.tokens]}
    if body.logprobs is not None:
        printed["logprobs"] = generate_logprobs(service.tokenizer, piece.tokens)
    return printed


def _ending(generation: Generation, finish_reason: FinishReason) -> dict[str, Any]:
    return {
        "finish_reason": finish_reason,
        "usage": asdict(generation.usage),
        "rope": generation.rope,
        "timings": None if generation.timings is None else asdict(generation.timings),
    }
