"""POST /v1/chat/completions.

Free text only. Where the rest would go: tools are handed to the chat template here and parsed out of a reply in
`_Writer`; a response format becomes a grammar among the sampling parameters.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api.admission import admit, max_tokens_that_fit, sampling_params
from server.api.generation import Generation, Reply
from server.api.logprobs import chat_logprobs
from server.api.openai_replies import Head, usage
from server.api.openai_schemas import ChatRequest
from server.api.prompts import chat_ids, check_model
from server.api.reading import in_turn, read_all
from server.api.ready import ReadyService
from server.api.sse import event_stream
from server.api.transcript import Token
from server.engine.outputs import FinishReason
from server.service import Service

router = APIRouter()


@router.post("/chat/completions", summary="Answer a chat")
async def chat_completions(body: ChatRequest, request: Request, service: ReadyService) -> Response:
    """OpenAI's chat completions: the model's chat template writes the prompt."""
    arrived = time.perf_counter()
    check_model(service, body.model)
    ids = await chat_ids(
        service,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        template_kwargs=body.chat_template_kwargs,
    )
    max_tokens = max_tokens_that_fit(service, len(ids), body.num_asked)
    choices = [
        (ids, sampling_params(service, body, max_tokens, index=index, logprobs=body.num_logprobs))
        for index in range(body.n)
    ]
    head = Head.new("chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion", service.model_name)
    generations = await admit(service, head.id, choices, body, arrived=arrived)
    if body.stream:
        return event_stream(_chunks(service, head, generations, body))
    replies = await read_all(request, generations)
    printed = [_choice(service, index, reply, body) for index, reply in enumerate(replies)]
    return JSONResponse({**head.fields, "choices": printed, "usage": usage(generations, body.n)})


def _choice(service: Service, index: int, reply: Reply, body: ChatRequest) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": reply.text, "refusal": None},
        "logprobs": _logprobs(service, reply.tokens, body),
        "finish_reason": reply.finish_reason,
    }


def _logprobs(service: Service, tokens: Sequence[Token], body: ChatRequest) -> dict[str, Any] | None:
    return None if body.num_logprobs is None else chat_logprobs(service.tokenizer, tokens, body.num_logprobs)


async def _chunks(
    service: Service, head: Head, generations: Sequence[Generation], body: ChatRequest
) -> AsyncGenerator[dict[str, Any], None]:
    """For each choice a chunk with the role, its text as it comes, and one with the finish reason; then the usage."""
    fields = head.chunk_fields(body.include_usage)

    def chunk(
        index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: FinishReason | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**fields, "choices": [choice]}

    async with in_turn(generations) as pieces:
        for index in range(len(generations)):
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
        async for index, piece in pieces:
            if piece.text or piece.tokens:
                yield chunk(index, {"content": piece.text}, _logprobs(service, piece.tokens, body))
            if piece.finish_reason is not None:
                yield chunk(index, {}, reason=piece.finish_reason)
    if body.include_usage:
        yield {**fields, "choices": [], "usage": usage(generations, body.n)}
