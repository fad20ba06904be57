"""OpenAI's API as the official client speaks it: the router of all of it, and POST /v1/completions."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from prerope.server.api.logprobs import completion_logprobs, echoed_logprobs, vllm_prompt_logprobs
from prerope.server.api.openai import chat as openai_chat
from prerope.server.api.openai import models as openai_models
from prerope.server.api.openai.replies import Head, usage
from prerope.server.api.openai.schemas import CompletionRequest
from prerope.server.api.requests.reading import Read
from prerope.server.api.running import ReadyService, body_of, start
from prerope.server.api.stream.generation import Generation, Piece, Reply, read_all, while_connected
from prerope.server.api.stream.printing import Many, event_stream, json_response
from prerope.server.api.stream.turns import in_turn
from prerope.server.service import Service

router = APIRouter(prefix="/v1", tags=["openai"])
router.include_router(openai_chat.router)
router.include_router(openai_models.router)


@router.post("/completions", summary="Complete one or several prompts")
async def completions(
    read: Annotated[Read[CompletionRequest], Depends(body_of(CompletionRequest))],
    request: Request,
    service: ReadyService,
) -> Response:
    """OpenAI's completions: n choices a prompt, numbered prompt by prompt."""
    body = read.body
    running = await while_connected(request, start(service, read, "cmpl", time.perf_counter()))
    head = Head.new(running.id, "text_completion", service.model_name)
    writer = _Writer(service, body, running.generations)
    if body.stream:
        return event_stream(_chunks(head, writer))
    replies = await read_all(request, running.generations)
    choices = [writer.choice(place, _whole(replies[place])) for place in _best(replies, body)]
    for index, choice in enumerate(choices):
        choice["index"] = index
    return await json_response({**head.fields, "choices": choices, "usage": usage(running.generations, body.num_drawn)})


def _whole(reply: Reply) -> Piece:
    return Piece(reply.text, reply.tokens, reply.prompt_logprobs, finish_reason=reply.finish_reason)


def _best(replies: Sequence[Reply], body: CompletionRequest) -> list[int]:
    """The places of the replies that are given: of each prompt's the `n` likeliest by the mean of a token."""
    drawn, n = body.num_drawn, body.n
    if drawn == n:
        return list(range(len(replies)))
    scores = [_mean_logprob(reply) for reply in replies]
    firsts = range(0, len(replies), drawn)
    ranked = [sorted(range(first, first + drawn), key=lambda place: -scores[place]) for first in firsts]
    return [place for places in ranked for place in places[:n]]


def _mean_logprob(reply: Reply) -> float:
    scored = [token.logprobs.logprob for token in reply.tokens if token.logprobs is not None]
    return sum(scored) / len(scored) if scored else -math.inf


class _Writer:
    """Prints pieces as choices, and puts the echoed prompt before the first of each."""

    def __init__(self, service: Service, body: CompletionRequest, generations: Sequence[Generation]) -> None:
        self.generations = generations
        self.body = body
        self._tokenizer = service.tokenizer
        self._echoed: dict[int, int] = {}  # choice → characters of its prompt

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        first = index not in self._echoed
        prompt = str(self.body.prompt[index // self.body.num_drawn]) if first and self.body.echo else ""
        if first:
            self._echoed[index] = len(prompt)
        choice: dict[str, Any] = {
            "index": index,
            "text": prompt + piece.text,
            "logprobs": self._logprobs(index, piece),
            "finish_reason": piece.finish_reason,
        }
        if self.body.prompt_logprobs is not None:
            scored = piece.prompt_logprobs
            choice["prompt_logprobs"] = scored and vllm_prompt_logprobs(self._tokenizer, scored)
        if self.body.return_token_ids:
            choice["token_ids"] = Many.ids([token.token_id for token in piece.tokens])
            choice["prompt_token_ids"] = Many.ids(self.generations[index].prompt_token_ids) if first else None
        return choice

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        printed = completion_logprobs(self._tokenizer, piece.tokens, self.body.logprobs, self._echoed[index])
        if piece.prompt_logprobs is None or not self.body.echo:
            return printed
        ids = self.generations[index].prompt_token_ids
        before = echoed_logprobs(self._tokenizer, ids, piece.prompt_logprobs, self.body.logprobs)
        return {name: before[name] + printed[name] for name in printed}


async def _chunks(head: Head, writer: _Writer) -> AsyncGenerator[dict[str, Any], None]:
    body, generations = writer.body, writer.generations
    fields = head.chunk_fields(body.include_usage)
    async with in_turn(generations) as pieces:
        async for index, piece in pieces:
            if body.usage_so_far:
                fields = {**fields, "usage": usage(generations, body.n)}
            yield {**fields, "choices": [writer.choice(index, piece)]}
    if body.include_usage:
        yield {**fields, "choices": [], "usage": usage(generations, body.n)}
