"""POST /tokenize and /detokenize, in vLLM's shape."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from prerope.server.api.bodies import body_of
from prerope.server.api.requests.reading import Read
from prerope.server.api.requests.schemas import DetokenizeRequest, TokenizeRequest

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", summary="Text or a chat as token ids")
async def tokenize(read: Annotated[Read[TokenizeRequest], Depends(body_of(TokenizeRequest))]) -> Response:
    """The very ids that a generating endpoint would make of the same prompt or messages."""
    return Response(read.reply, media_type="application/json")


@router.post("/detokenize", summary="Token ids as text")
async def detokenize(read: Annotated[Read[DetokenizeRequest], Depends(body_of(DetokenizeRequest))]) -> Response:
    """The text of the ids, special tokens included, so that /tokenize gives the ids back."""
    return Response(read.reply, media_type="application/json")
