"""POST /tokenize and /detokenize, and GET /tokenizer_info, in vLLM's shape."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from prerope.server.api.requests.reading import Read
from prerope.server.api.requests.tokenize import DetokenizeRequest, TokenizeRequest
from prerope.server.api.running import ReadyService, body_of

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", summary="Text or a chat as token ids")
async def tokenize(read: Annotated[Read[TokenizeRequest], Depends(body_of(TokenizeRequest))]) -> Response:
    """The very ids that a generating endpoint would make of the same prompt or messages."""
    return Response(read.reply, media_type="application/json")


@router.post("/detokenize", summary="Token ids as text")
async def detokenize(read: Annotated[Read[DetokenizeRequest], Depends(body_of(DetokenizeRequest))]) -> Response:
    """The text of the ids, special tokens included, so that /tokenize gives the ids back."""
    return Response(read.reply, media_type="application/json")


@router.get("/tokenizer_info", summary="The tokenizer's config")
async def tokenizer_info(service: ReadyService) -> dict[str, Any]:
    """Special tokens, chat template and the rest, for clients that render and count by themselves (lm-eval)."""
    return service.tokenizer.described()
