"""POST /v1/chat/completions: OpenAI's shapes of a chat's replies."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from prerope.server.api.chat.parts import ArgumentsPart, CallPart, ChatReply, Part, ReasoningPart, TextPart
from prerope.server.api.chat.replies import chat_reply, parts_of, reader_for
from prerope.server.api.chat.tool_calls import ChatReader
from prerope.server.api.logprobs import chat_logprobs, vllm_prompt_logprobs
from prerope.server.api.openai.replies import Head, documents_of, usage
from prerope.server.api.openai.schemas import ChatRequest
from prerope.server.api.requests.reading import Read
from prerope.server.api.running import ReadyService, Running, body_of, start
from prerope.server.api.stream.generation import Generation, Piece, Reply, Token, read_all, while_connected
from prerope.server.api.stream.printing import Many, event_stream, json_response
from prerope.server.api.stream.turns import in_turn
from prerope.server.engine.outputs import FinishReason
from prerope.server.service import Service

router = APIRouter()


@router.post("/chat/completions", summary="Answer a chat")
async def chat_completions(
    read: Annotated[Read[ChatRequest], Depends(body_of(ChatRequest))], request: Request, service: ReadyService
) -> Response:
    """OpenAI's chat completions: the model's chat template writes the prompt."""
    body = read.body
    running = await while_connected(request, start(service, read, "chatcmpl", time.perf_counter()))
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    head, writer = Head.new(running.id, kind, service.model_name), _Writer(service, body, running)
    if body.stream:
        return event_stream(_chunks(head, running.generations, writer))
    replies = await read_all(request, running.generations)
    printed = [writer.choice(index, reply) for index, reply in enumerate(replies)]
    used = {"usage": usage(running.generations, body.n), **documents_of(running.generations)}
    return await json_response({**head.fields, "choices": printed, **used, **writer.of_prompt(replies[0])})


class _Writer:
    """Prints replies and pieces as choices."""

    def __init__(self, service: Service, body: ChatRequest, running: Running) -> None:
        self.body = body
        self._tokenizer = service.tokenizer
        self._running = running
        self._readers: dict[int, ChatReader] = {}  # choice → the reader of its stream

    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        """A whole reply."""
        read = chat_reply(self._running, reply)
        choice = {
            "index": index,
            "message": {"role": "assistant", "refusal": None, **_message(read, thoughts=self.body.tells_thoughts)},
            "logprobs": self._logprobs(reply.tokens),
            "finish_reason": _finish_reason(reply.finish_reason, len(read.calls)),
        }
        return choice | self._token_ids(reply.tokens)

    def of_prompt(self, reply: Reply) -> dict[str, Any]:
        """The reply's fields about the prompt, which stand beside the choices."""
        told: dict[str, Any] = {}
        if self.body.prompt_logprobs is not None:
            told["prompt_logprobs"] = vllm_prompt_logprobs(self._tokenizer, reply.prompt_logprobs or ())
        if self.body.return_token_ids:
            told["prompt_token_ids"] = Many.ids(self._running.generations[0].prompt_token_ids)
        return told

    def _tells(self, part: Part) -> bool:
        return self.body.tells_thoughts or not isinstance(part, ReasoningPart)

    def _token_ids(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"token_ids": Many.ids([token.token_id for token in tokens])} if self.body.return_token_ids else {}

    def parts(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """What a piece adds to a choice of a stream; its log-probabilities go with the first delta."""
        reader = self._readers.setdefault(index, reader_for(self._running))
        deltas = [_delta(part) for part in parts_of(piece, reader) if self._tells(part)]
        if piece.tokens and not deltas:
            deltas = [{"content": ""}]
        logprobs = [self._logprobs(piece.tokens), *(self._logprobs(()) for _ in deltas[1:])]
        parts = [delta_part(index, delta, scored) for delta, scored in zip(deltas, logprobs, strict=False)]
        if parts:
            parts[0] |= self._token_ids(piece.tokens)
        if piece.finish_reason is not None:
            parts.append(delta_part(index, {}, reason=_finish_reason(piece.finish_reason, reader.num_calls)))
        return parts

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        num_alternatives = self.body.num_logprobs
        return None if num_alternatives is None else chat_logprobs(self._tokenizer, tokens, num_alternatives)


def _message(reply: ChatReply, *, thoughts: bool) -> dict[str, Any]:
    """A reply as a message: `tool_calls` where there are any, and then text only where there is some."""
    told = {"reasoning_content": reply.reasoning} if reply.reasoning and thoughts else {}
    if not reply.calls:
        return {"content": reply.text, **told}
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in reply.calls
    ]
    return {"content": reply.text or None, "tool_calls": calls, **told}


def _delta(part: Part) -> dict[str, Any]:
    match part:
        case TextPart(text):
            return {"content": text}
        case ReasoningPart(text):
            return {"reasoning_content": text}
        case CallPart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case ArgumentsPart(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _finish_reason(reason: FinishReason, num_calls: int) -> str:
    """OpenAI's: a reply that ends by itself and holds calls ends for them."""
    return "tool_calls" if num_calls and reason is FinishReason.STOP else str(reason)


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
        told = writer.of_prompt(Reply())
        for index in range(len(generations)):
            first = delta_part(index, {"role": "assistant", "content": "", "refusal": None})
            yield {**fields, "choices": [first], **told}
            told = {}
        async for index, piece in pieces:
            if body.usage_so_far:
                fields = {**fields, "usage": usage(generations, body.n)}
            for part in writer.parts(index, piece):
                yield {**fields, "choices": [part]}
    if body.include_usage:
        yield {**fields, "choices": [], "usage": usage(generations, body.n), **documents_of(generations)}
