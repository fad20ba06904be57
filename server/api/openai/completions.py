"""OpenAI's API as the official client speaks it: the router of all of it, and POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prerope.server.api.connected import while_connected
from prerope.server.api.logprobs import completion_logprobs, prompt_tokens
from prerope.server.api.openai import chat as openai_chat
from prerope.server.api.openai import models as openai_models
from prerope.server.api.openai.replies import Head, usage
from prerope.server.api.openai.schemas import CompletionRequest
from prerope.server.api.running import start
from prerope.server.api.stream.collect import in_turn, read_all
from prerope.server.api.stream.generation import Generation, Piece
from prerope.server.api.stream.sse import event_stream
from prerope.server.service import ReadyService, Service

router = APIRouter(prefix="/v1", tags=["openai"])
router.include_router(openai_chat.router)
router.include_router(openai_models.router)


@router.post("/completions", summary="Complete one or several prompts")
async def completions(body: CompletionRequest, request: Request, service: ReadyService) -> Response:
    """OpenAI's completions: n choices a prompt, numbered prompt by prompt."""
    running = await while_connected(request, start(service, body.lowered(), "cmpl", time.perf_counter()))
    head = Head.new(running.id, "text_completion", service.model_name)
    writer = _Writer(service, body, running.generations)
    if body.stream:
        return event_stream(_chunks(head, writer))
    replies = await read_all(request, running.generations)
    pieces = (Piece(r.text, r.tokens, r.prompt_logprobs, finish_reason=r.finish_reason) for r in replies)
    choices = [writer.choice(index, piece) for index, piece in enumerate(pieces)]
    return JSONResponse({**head.fields, "choices": choices, "usage": usage(running.generations, body.n)})


class _Writer:
    """Prints pieces as choices, and puts the echoed prompt before the first of each."""

    def __init__(self, service: Service, body: CompletionRequest, generations: Sequence[Generation]) -> None:
        self.generations = generations
        self.body = body
        self._tokenizer = service.tokenizer
        self._echoed: dict[int, int] = {}  # choice → characters of its prompt

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        first = index not in self._echoed
        prompt = self._prompt(index) if first and self.body.echo else ""
        if first:
            self._echoed[index] = len(prompt)
        return {
            "index": index,
            "text": prompt + piece.text,
            "logprobs": self._logprobs(index, piece),
            "finish_reason": piece.finish_reason,
        }

    def _prompt(self, index: int) -> str:
        """The prompt as it was given, or as its ids read."""
        given = self.body.prompt[index // self.body.n]
        return given if isinstance(given, str) else self._tokenizer.decode(given)

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        printed = completion_logprobs(self._tokenizer, piece.tokens, self.body.logprobs, self._echoed[index])
        if piece.prompt_logprobs is None:
            return printed
        echoed = prompt_tokens(self._tokenizer, self.generations[index].prompt_token_ids, piece.prompt_logprobs)
        before = completion_logprobs(self._tokenizer, echoed, self.body.logprobs)
        return {name: before[name] + printed[name] for name in printed}


async def _chunks(head: Head, writer: _Writer) -> AsyncGenerator[dict[str, Any], None]:
    body, generations = writer.body, writer.generations
    fields = head.chunk_fields(body.include_usage)
    async with in_turn(generations) as pieces:
        async for index, piece in pieces:
            yield {**fields, "choices": [writer.choice(index, piece)]}
    if body.include_usage:
        yield {**fields, "choices": [], "usage": usage(generations, body.n)}
