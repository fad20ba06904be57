"""POST /tokenize and /detokenize, in vLLM's shape."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from prerope.server.api.chat.tools import ToolUse
from prerope.server.api.logprobs import token_string
from prerope.server.api.requests.internal import Prompt
from prerope.server.api.requests.prompts import chat_ids, check_model, tokenized
from prerope.server.api.requests.schemas import DetokenizeRequest, TokenizeRequest
from prerope.server.engine.limits import check_vocabulary
from prerope.server.service import ReadyService

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", summary="Text or a chat as token ids")
async def tokenize(body: TokenizeRequest, service: ReadyService) -> dict[str, Any]:
    """The very ids that a generating endpoint would make of the same prompt or messages."""
    check_model(service, body.model)
    if body.messages is not None:
        chat = body.chat()
        use = ToolUse.of(service.tokenizer, chat)
        ids = await chat_ids(service, chat, tools=() if use is None else use.for_template)
    elif body.prompt:
        prompt = Prompt(given=body.prompt, add_special_tokens=body.add_special_tokens)
        ids = (await tokenized(service, prompt)).ids
    else:
        ids = []
    reply: dict[str, Any] = {"count": len(ids), "max_model_len": service.engine.info.max_model_len, "tokens": ids}
    if body.return_token_strs:
        reply["token_strs"] = [token_string(service.tokenizer, token_id) for token_id in ids]
    return reply


@router.post("/detokenize", summary="Token ids as text")
async def detokenize(body: DetokenizeRequest, service: ReadyService) -> dict[str, Any]:
    """The text of the ids, special tokens included, so that /tokenize gives the ids back."""
    check_model(service, body.model)
    check_vocabulary(body.tokens, service.engine.info, "tokens")
    text = await asyncio.to_thread(service.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return {"prompt": text}
