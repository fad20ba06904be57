"""OpenAI's API as the official client speaks it: the router of all of it, and POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prerope.server.api.limits import admit, max_tokens_that_fit, sampling_params
from prerope.server.api.logprobs import completion_logprobs, prompt_tokens
from prerope.server.api.openai import chat as openai_chat
from prerope.server.api.openai import models as openai_models
from prerope.server.api.openai.replies import Head, usage
from prerope.server.api.openai.schemas import CompletionRequest
from prerope.server.api.ready import ReadyService
from prerope.server.api.requests.prompts import check_model, prompt_ids
from prerope.server.api.requests.structured import compiled
from prerope.server.api.stream.collect import in_turn, read_all
from prerope.server.api.stream.generation import Generation, Piece
from prerope.server.api.stream.sse import event_stream
from prerope.server.engine.sampling.params import SamplingParams
from prerope.server.service import Service
from prerope.server.structured.compile import CompiledGrammar

router = APIRouter(prefix="/v1", tags=["openai"])
router.include_router(openai_chat.router)
router.include_router(openai_models.router)

DEFAULT_MAX_TOKENS = 16


@router.post("/completions", summary="Complete one or several prompts")
async def completions(body: CompletionRequest, request: Request, service: ReadyService) -> Response:
    """OpenAI's completions: n choices a prompt, numbered prompt by prompt."""
    arrived = time.perf_counter()
    check_model(service, body.model)
    head = Head.new("cmpl", "text_completion", service.model_name)
    prompts = await _prompts(service, body)
    grammar = await compiled(service, body.wanted_grammar())
    generations = await admit(service, head.id, _choices(service, prompts, body, grammar), body, arrived=arrived)
    writer = _Writer(service, body, generations)
    if body.stream:
        return event_stream(_chunks(head, writer))
    replies = await read_all(request, generations)
    pieces = (Piece(r.text, r.tokens, r.prompt_logprobs, finish_reason=r.finish_reason) for r in replies)
    choices = [writer.choice(index, piece) for index, piece in enumerate(pieces)]
    return JSONResponse({**head.fields, "choices": choices, "usage": usage(generations, body.n)})


async def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    prompts = []
    for index, prompt in enumerate(body.prompt):
        param = "prompt" if len(body.prompt) == 1 else f"prompt[{index}]"
        prompts.append(await prompt_ids(service, prompt, param=param))
        await asyncio.sleep(0)  # a thousand short prompts are no reason to hold other streams up
    return prompts


def _choices(
    service: Service, prompts: Sequence[list[int]], body: CompletionRequest, grammar: CompiledGrammar | None
) -> list[tuple[list[int], SamplingParams]]:
    """Prompt and parameters of each choice, in the order of their index."""
    prompt_logprobs = None
    if body.echo and (body.logprobs is not None or body.max_tokens == 0):
        prompt_logprobs = body.logprobs or 0
    choices = []
    for ids in prompts:
        max_tokens = max_tokens_that_fit(service, len(ids), body.max_tokens, DEFAULT_MAX_TOKENS)
        for index in range(body.n):
            sampling = sampling_params(
                service,
                body,
                max_tokens,
                index=index,
                logprobs=body.logprobs,
                prompt_logprobs=prompt_logprobs,
                grammar=grammar,
            )
            choices.append((ids, sampling))
    return choices


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
