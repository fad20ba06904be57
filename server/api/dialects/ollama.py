"""Ollama's API: /api/chat, /api/generate, /api/tags, /api/show, /api/ps, /api/version. Replies stream as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from prerope.server.api.chat.parts import ArgumentsPart, CallPart, ChatReply, ReasoningPart, TextPart
from prerope.server.api.chat.replies import chat_reply
from prerope.server.api.dialects.common import (
    chat_events,
    check_complete,
)
from prerope.server.api.dialects.lowering.ollama import (
    OllamaChatRequest,
    OllamaFields,
    OllamaGenerateRequest,
    ShowRequest,
)
from prerope.server.api.logprobs import chat_logprobs
from prerope.server.api.requests.reading import Read
from prerope.server.api.running import ReadyService, Running, body_of, start
from prerope.server.api.stream.generation import Token, read_all, while_connected
from prerope.server.api.stream.printing import Many, json_response, line_stream
from prerope.server.engine.outputs import FinishReason
from prerope.server.service import Service

router = APIRouter(prefix="/api", tags=["ollama"])

LOADED = {"done": True, "done_reason": "load"}
"""The answer to a request without a prompt, by which Ollama's clients load a model ahead of time."""


@router.post("/chat", summary="Answer a chat, in Ollama's shape")
async def chat(
    read: Annotated[Read[OllamaChatRequest], Depends(body_of(OllamaChatRequest))],
    request: Request,
    service: ReadyService,
) -> Response:
    """Ollama's chat: JSON lines, or one object where `stream` is false."""
    if not read.ready[1].prompts:
        return JSONResponse({**_head(service), "message": {"role": "assistant", "content": ""}, **LOADED})
    running = await while_connected(request, start(service, read, "ollama", time.perf_counter()))
    if read.body.stream:
        return line_stream(_lines(service, running, read.body))
    (reply,) = await read_all(request, running.generations)
    check_complete(reply.finish_reason)
    parts = chat_reply(running, reply)
    calls = [_call(one.name, one.arguments) for one in parts.calls]
    thought = _thought(read.body, parts)
    printed = {"role": "assistant", "content": parts.text, **thought, **({"tool_calls": calls} if calls else {})}
    told = {"message": printed, **_scores(service, read.body, reply.tokens)}
    return await json_response({**_head(service), **told, **_last_fields(running, reply.finish_reason)})


@router.post("/generate", summary="Continue a prompt, in Ollama's shape")
async def generate(
    read: Annotated[Read[OllamaGenerateRequest], Depends(body_of(OllamaGenerateRequest))],
    request: Request,
    service: ReadyService,
) -> Response:
    """Ollama's generate: JSON lines, or one object where `stream` is false."""
    if not read.ready[1].prompts:
        return JSONResponse({**_head(service), "response": "", **LOADED})
    running = await while_connected(request, start(service, read, "ollama", time.perf_counter()))
    if read.body.stream:
        return line_stream(_lines(service, running, read.body))
    (reply,) = await read_all(request, running.generations)
    check_complete(reply.finish_reason)
    parts = chat_reply(running, reply)
    told = {"response": parts.text, **_thought(read.body, parts), **_scores(service, read.body, reply.tokens)}
    return await json_response({**_head(service), **told, **_last_fields(running, reply.finish_reason)})


def _thought(body: OllamaFields, parts: ChatReply) -> dict[str, str]:
    return {"thinking": parts.reasoning} if parts.reasoning and body.think is not False else {}


def _scores(service: Service, body: OllamaFields, tokens: Sequence[Token]) -> dict[str, Many]:
    """Log-probabilities, where they are asked for."""
    if body.num_logprobs is None or not tokens:
        return {}
    return {"logprobs": chat_logprobs(service.tokenizer, tokens, body.num_logprobs)["content"]}


async def _lines(service: Service, running: Running, body: OllamaFields) -> AsyncGenerator[dict[str, Any], None]:
    """A line for each piece of text and each whole call, then one with the counts."""
    head, calls, reason = _head(service), list[tuple[str, str]](), FinishReason.ABORT
    chat = isinstance(body, OllamaChatRequest)
    thoughts, untold = body.think is not False, list[Token]()

    def scores() -> dict[str, Any]:
        """The log-probabilities of the tokens whose text this event carries."""
        told = {name: list(many.items) for name, many in _scores(service, body, untold).items()}
        untold.clear()
        return told

    def line(text: str, **more: Any) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text, **more}} if chat else {"response": text, **more}
        return {**head, **content, "done": False}

    async for piece, parts in chat_events(running):
        untold += piece.tokens
        for part in parts:
            match part:
                case TextPart(text) if text:
                    yield line(text) | scores()
                case ReasoningPart(text) if thoughts:
                    yield line("", thinking=text)
                case CallPart(_, _, name):
                    calls.append((name, ""))
                case ArgumentsPart(index, text):
                    calls[index] = (calls[index][0], calls[index][1] + text)
        reason = piece.finish_reason or reason
    check_complete(reason)
    if calls:
        yield line("", tool_calls=[_call(*one) for one in calls])
    yield {**line(""), **scores(), **_last_fields(running, reason)}


def _call(name: str, arguments: str) -> dict[str, Any]:
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError:  # the reply ended before the call did
        parsed = {}
    return {"function": {"name": name, "arguments": parsed}}


def _head(service: Service) -> dict[str, Any]:
    return {"model": service.model_name, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}


def _last_fields(running: Running, reason: FinishReason) -> dict[str, Any]:
    """The fields that end a reply: counts, and times in nanoseconds."""
    (generation,) = running.generations
    usage, timings = generation.usage, generation.timings
    prefill, decode = (0.0, 0.0) if timings is None else (timings.queue_s + timings.prefill_s, timings.decode_s)
    return {
        "done": True,
        "done_reason": "stop" if reason is FinishReason.STOP else "length",
        "total_duration": int(1e9 * (prefill + decode)),
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": int(1e9 * prefill),
        "eval_count": usage.completion_tokens,
        "eval_duration": int(1e9 * decode),
    }


@router.get("/tags", summary="List the model served, in Ollama's shape")
async def tags(service: ReadyService) -> dict[str, Any]:
    """The models installed: a list of one."""
    return {"models": [_card(service)]}


@router.get("/ps", summary="List the model loaded, in Ollama's shape")
async def loaded(service: ReadyService) -> dict[str, Any]:
    """The models in memory: the same list as of those installed, as the one model is always loaded."""
    return {"models": [{**_card(service), "expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}]}


@router.get("/version", summary="The server's version, in Ollama's shape")
async def version() -> dict[str, str]:
    """PreRoPE's own version."""
    return {"version": metadata.version("prerope")}


@router.post("/show", summary="Describe the model, in Ollama's shape")
async def show(
    read: Annotated[Read[ShowRequest], Depends(body_of(ShowRequest))],  # noqa: ARG001 - there is one model
    service: ReadyService,
) -> dict[str, Any]:
    """What Ollama's clients ask before a chat: the context length, and what the model can do."""
    info = service.engine.info
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(),
        "model_info": {"general.architecture": "prerope", "prerope.context_length": info.max_model_len},
        "capabilities": ["completion", "tools"],
    }


def _details() -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": "prerope",
        "families": ["prerope"],
        "parameter_size": "",
        "quantization_level": "",
    }


def _card(service: Service) -> dict[str, Any]:
    return {
        "name": service.model_name,
        "model": service.model_name,
        "modified_at": "1970-01-01T00:00:00Z",
        "size": 0,
        "digest": "",
        "details": _details(),
    }


@router.post("/embed", summary="Not served here", include_in_schema=False)
@router.post("/embeddings", summary="Not served here", include_in_schema=False)
async def embeddings() -> JSONResponse:
    """The refusal of embeddings, with what to use instead."""
    return JSONResponse(
        {"error": "embeddings are not served here: this server writes text (/api/chat, /api/generate)"}, 501
    )
