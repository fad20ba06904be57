"""/generate as TGI's and SGLang's clients write it, told from ours by their fields."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from importlib import metadata
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from prerope.server.api.dialects.lowering.others import SglangRequest, TgiRequest
from prerope.server.api.logprobs import finite
from prerope.server.api.requests.reading import Read
from prerope.server.api.running import ReadyService, Running, body_of, start
from prerope.server.api.stream.generation import Reply, Token, read_all, while_connected
from prerope.server.api.stream.printing import Many, event_stream, json_response
from prerope.server.api.stream.turns import in_turn
from prerope.server.engine.outputs import FinishReason, TokenLogprobs
from prerope.server.service import Service

router = APIRouter(tags=["others"])


def logprob_of(token: Token) -> float | None:
    return None if token.logprobs is None else token.logprobs.logprob


def tgi_reply(service: Service, running: Running, body: TgiRequest, reply: Reply) -> dict[str, Any]:
    """A whole reply."""
    full = body.inputs if body.parameters.return_full_text else ""
    printed: dict[str, Any] = {"generated_text": full + reply.text}
    if body.parameters.details:
        tokens = (_tgi_token(service, token.token_id, logprob_of(token)) for token in reply.tokens)
        many = Many(tokens, len(reply.tokens))
        printed["details"] = {**_tgi_details(running, reply.finish_reason), "prefill": [], "tokens": many}
        if body.parameters.top_n_tokens:
            top = (_tgi_top(service, token) for token in reply.tokens)
            printed["details"]["top_tokens"] = Many(top, len(reply.tokens))
    return printed


def _tgi_token(service: Service, token_id: int, logprob: float | None) -> dict[str, Any]:
    special = token_id in service.tokenizer.special_ids
    return {"id": token_id, "text": service.tokenizer.token_text(token_id), "logprob": logprob, "special": special}


def _tgi_top(service: Service, token: Token) -> list[dict[str, Any]]:
    return [_tgi_token(service, *one) for one in _top(token.logprobs)]


def _top(logprobs: TokenLogprobs | None) -> list[tuple[int, float | None]]:
    """The alternatives of a token: id and log-probability, best first."""
    return [] if logprobs is None else [(token_id, finite(logprob)) for token_id, logprob in logprobs.top]


def _tgi_details(running: Running, reason: FinishReason) -> dict[str, Any]:
    (generation,) = running.generations
    reasons = {FinishReason.STOP: "eos_token", FinishReason.LENGTH: "length"}
    return {
        "finish_reason": reasons.get(reason, "length") if generation.stop_string is None else "stop_sequence",
        "generated_tokens": generation.usage.completion_tokens,
        "input_length": generation.usage.prompt_tokens,
        "seed": running.request.sampling.seed,
    }


async def tgi_events(service: Service, running: Running, body: TgiRequest) -> AsyncGenerator[dict[str, Any], None]:
    """An event a token; the last one has the whole text. Text that a token does not complete is empty until it does."""
    text, index, last = body.inputs if body.parameters.return_full_text else "", 0, None
    async with in_turn(running.generations) as pieces:
        async for _, piece in pieces:
            for place, token in enumerate(piece.tokens):
                if last is not None:
                    yield last
                index += 1
                printed = _tgi_token(service, token.token_id, logprob_of(token))
                printed["text"] = piece.text if place == len(piece.tokens) - 1 else ""
                last = {"index": index, "token": printed, "generated_text": None, "details": None}
                if body.parameters.top_n_tokens:
                    last["top_tokens"] = _tgi_top(service, token)
            text += piece.text
            if piece.finish_reason is not None:
                last = last or {"index": 0, "token": {"id": 0, "text": "", "logprob": 0.0, "special": True}}
                yield {**last, "generated_text": text, "details": _tgi_details(running, piece.finish_reason)}


def sglang_reply(
    service: Service, running: Running, body: SglangRequest, reply: Reply, index: int = 0
) -> dict[str, Any]:
    """A whole reply; a stream's events have this shape too, with the text so far."""
    generation = running.generations[index]
    info: dict[str, Any] = {
        "id": running.id,
        "finish_reason": {"type": str(reply.finish_reason)},
        "prompt_tokens": generation.usage.prompt_tokens,
        "completion_tokens": generation.usage.completion_tokens,
        "cached_tokens": generation.usage.cached_tokens,
    }
    if body.return_logprob:
        scored = ((logprob_of(token), token.token_id, None) for token in reply.tokens)
        info["output_token_logprobs"] = Many(scored, len(reply.tokens))
        if body.top_logprobs_num:
            info["output_top_logprobs"] = Many(
                (_sglang_top(token.logprobs) for token in reply.tokens), len(reply.tokens)
            )
    if body.scores_prompt and reply.prompt_logprobs is not None:
        ids = generation.prompt_token_ids
        first = min(body.logprob_start_len, len(ids))
        rows = islice(zip(ids, reply.prompt_logprobs, strict=True), first, None)
        info["input_token_logprobs"] = Many((_sglang_scored(service, *row) for row in rows), len(ids) - first)
        if body.top_logprobs_num:
            top = (_sglang_top(logprobs) for logprobs in islice(reply.prompt_logprobs, first, None))
            info["input_top_logprobs"] = Many(top, len(ids) - first)
    return {"text": reply.text, "output_ids": Many.ids([token.token_id for token in reply.tokens]), "meta_info": info}


def _sglang_scored(service: Service, token_id: int, logprobs: TokenLogprobs | None) -> tuple[float | None, int, str]:
    """A token of the prompt; nothing is said before the first one."""
    logprob = None if logprobs is None else finite(logprobs.logprob)
    return logprob, token_id, service.tokenizer.token_text(token_id)


def _sglang_top(logprobs: TokenLogprobs | None) -> list[tuple[float | None, int, None]] | None:
    """Alternatives; null before the first token of a prompt."""
    return [(logprob, token_id, None) for token_id, logprob in _top(logprobs)] or None


async def sglang_events(
    service: Service, running: Running, body: SglangRequest
) -> AsyncGenerator[dict[str, Any], None]:
    """An event a step with all text so far, as SGLang streams."""
    reply = Reply()
    async with in_turn(running.generations) as pieces:
        async for _, piece in pieces:
            reply.add(piece)
            if piece.text or piece.tokens or piece.finish_reason is not None:
                printed = sglang_reply(service, running, body, reply)
                if piece.finish_reason is None:
                    printed["meta_info"]["finish_reason"] = None
                yield printed


async def other_dialect(
    service: Service, request: Request, running: Running, body: TgiRequest | SglangRequest
) -> Response:
    """The reply to a body of /generate that is not ours."""
    if isinstance(body, TgiRequest):
        if body.stream:
            return event_stream(tgi_events(service, running, body))
        (reply,) = await read_all(request, running.generations)
        return await json_response(tgi_reply(service, running, body, reply))
    if body.stream:
        return event_stream(sglang_events(service, running, body))
    replies = await read_all(request, running.generations)
    printed = [sglang_reply(service, running, body, reply, index) for index, reply in enumerate(replies)]
    return await json_response(printed if body.is_list else printed[0])


@router.post("/generate_stream", summary="Continue a prompt as a stream, in TGI's shape")
async def generate_stream(
    read: Annotated[Read[TgiRequest], Depends(body_of(TgiRequest))], request: Request, service: ReadyService
) -> Response:
    """TGI's stream of tokens."""
    running = await while_connected(request, start(service, read, "tgi", time.perf_counter()))
    return event_stream(tgi_events(service, running, read.body))


@router.post("/", summary="Continue a prompt, in TGI's shape")
async def compatible(
    read: Annotated[Read[TgiRequest], Depends(body_of(TgiRequest))], request: Request, service: ReadyService
) -> Response:
    """What huggingface_hub's text_generation sends to a server's address: a list of one reply, or a stream."""
    running = await while_connected(request, start(service, read, "tgi", time.perf_counter()))
    if read.body.stream:
        return event_stream(tgi_events(service, running, read.body))
    (reply,) = await read_all(request, running.generations)
    return await json_response([tgi_reply(service, running, read.body, reply)])


@router.get("/info", summary="Describe the model, in TGI's shape")
async def info(service: ReadyService) -> dict[str, Any]:
    """What huggingface_hub asks a text generation server."""
    limits = service.engine.info
    return {
        "model_id": service.model_name,
        "model_dtype": limits.dtype,
        "model_device_type": limits.device,
        "max_input_tokens": limits.max_model_len - 1,
        "max_total_tokens": limits.max_model_len,
        "max_concurrent_requests": service.settings.max_queued_requests,
        "version": metadata.version("prerope"),
    }


@router.get("/get_model_info", summary="Describe the model, in SGLang's shape")
async def model_info(service: ReadyService) -> dict[str, Any]:
    """What SGLang's clients ask first."""
    return {"model_path": service.model_name, "tokenizer_path": service.model_name, "is_generation": True}
