"""POST /v1/chat/completions: free text, constrained text (`structured`) and tool calls (`tools`, `tool_calls`)."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prerope.server.api.chat.tool_calls import TextReader, ToolCallReader, joined
from prerope.server.api.chat.tools import ToolUse
from prerope.server.api.limits import admit, max_tokens_that_fit, sampling_params
from prerope.server.api.logprobs import chat_logprobs
from prerope.server.api.openai.replies import Head, usage
from prerope.server.api.openai.schemas import ChatRequest
from prerope.server.api.ready import ReadyService
from prerope.server.api.requests.prompts import chat_ids, check_model
from prerope.server.api.requests.structured import compiled
from prerope.server.api.stream.collect import in_turn, read_all
from prerope.server.api.stream.generation import Generation, Piece, Reply
from prerope.server.api.stream.sse import event_stream
from prerope.server.api.stream.transcript import Token
from prerope.server.errors import InvalidRequest
from prerope.server.service import Service
from prerope.server.structured.compile import GrammarText

router = APIRouter()


@router.post("/chat/completions", summary="Answer a chat")
async def chat_completions(body: ChatRequest, request: Request, service: ReadyService) -> Response:
    """OpenAI's chat completions: the model's chat template writes the prompt."""
    arrived = time.perf_counter()
    check_model(service, body.model)
    use = ToolUse.of(service.tokenizer, body)
    grammar = await compiled(service, _wanted_grammar(body, use))
    ids = await chat_ids(
        service,
        body.messages,
        tools=() if use is None else use.for_template,
        add_generation_prompt=body.add_generation_prompt,
        template_kwargs=body.chat_template_kwargs,
    )
    max_tokens = max_tokens_that_fit(service, len(ids), body.num_asked)
    choices = [
        (ids, sampling_params(service, body, max_tokens, index=index, logprobs=body.num_logprobs, grammar=grammar))
        for index in range(body.n)
    ]
    head = Head.new("chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion", service.model_name)
    shown = frozenset[int]() if use is None else frozenset(use.marks.values())
    generations = await admit(service, head.id, choices, body, arrived=arrived, shown_special_ids=shown)
    writer = _Writer(service, body, use)
    if body.stream:
        return event_stream(_chunks(head, generations, writer))
    replies = await read_all(request, generations)
    printed = [writer.choice(index, reply) for index, reply in enumerate(replies)]
    return JSONResponse({**head.fields, "choices": printed, "usage": usage(generations, body.n)})


def _wanted_grammar(body: ChatRequest, use: ToolUse | None) -> GrammarText | None:
    """What constrains the reply: a format of its text, or that it calls a tool."""
    wanted = body.wanted_grammar()
    if use is None:
        return wanted
    if wanted is not None:
        raise InvalidRequest(
            f"'{wanted.param}' constrains the reply's text and 'tools' lets the reply be a call: give one of them, or "
            "tool_choice 'none'",
            param=wanted.param,
        )
    return use.grammar


class _Writer:
    """Prints replies and pieces as choices."""

    def __init__(self, service: Service, body: ChatRequest, use: ToolUse | None) -> None:
        self.body = body
        self._tokenizer = service.tokenizer
        self._use = use
        self._readers: dict[int, TextReader | ToolCallReader] = {}  # choice → the reader of its stream

    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        """A whole reply."""
        reader = self._reader()
        message = joined([*reader.push(reply.text), *reader.finish()])
        return {
            "index": index,
            "message": {"role": "assistant", "refusal": None, **message},
            "logprobs": self._logprobs(reply.tokens),
            "finish_reason": reader.finish_reason(reply.finish_reason),
        }

    def parts(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """What a piece adds to a choice of a stream; its log-probabilities go with the first delta."""
        reader = self._readers.setdefault(index, self._reader())
        deltas = reader.push(piece.text)
        if piece.finish_reason is not None:
            deltas += reader.finish()
        if piece.tokens and not deltas:
            deltas = [{"content": ""}]
        logprobs = [self._logprobs(piece.tokens), *(self._logprobs(()) for _ in deltas[1:])]
        parts = [delta_part(index, delta, scored) for delta, scored in zip(deltas, logprobs, strict=False)]
        if piece.finish_reason is not None:
            parts.append(delta_part(index, {}, reason=reader.finish_reason(piece.finish_reason)))
        return parts

    def _reader(self) -> TextReader | ToolCallReader:
        use = self._use
        return TextReader() if use is None else ToolCallReader(use.form, use.names, parallel=use.parallel)

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        num_alternatives = self.body.num_logprobs
        return None if num_alternatives is None else chat_logprobs(self._tokenizer, tokens, num_alternatives)


def delta_part(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    """A choice of a chunk."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


async def _chunks(
    head: Head, generations: Sequence[Generation], writer: _Writer
) -> AsyncGenerator[dict[str, Any], None]:
    """For each choice a chunk with the role, its deltas as they come, one with the finish reason; then the usage."""
    body = writer.body
    fields = head.chunk_fields(body.include_usage)
    async with in_turn(generations) as pieces:
        for index in range(len(generations)):
            yield {**fields, "choices": [delta_part(index, {"role": "assistant", "content": "", "refusal": None})]}
        async for index, piece in pieces:
            for part in writer.parts(index, piece):
                yield {**fields, "choices": [part]}
    if body.include_usage:
        yield {**fields, "choices": [], "usage": usage(generations, body.n)}
