"""Which position methods the model takes, and what one does: for pickers and pictures."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from prerope.rope.offers import Offer, distance_map, offers, rotaries_of
from prerope.server.api.requests.reading import Read
from prerope.server.api.requests.schemas import MapRequest
from prerope.server.api.running import ReadyService, body_of, positions_of
from prerope.server.engine.limits import ModelInfo

router = APIRouter(prefix="/rope", tags=["positions"])


@router.get("/methods", summary="Methods that the model takes")
async def methods(service: ReadyService) -> dict[str, Any]:
    """Each method of this server that the model takes, as it resolves, and why it does not take the others."""
    info = service.engine.info
    found = offered(info)
    return {
        "default": info.positions.described,
        "per_request": service.settings.rope_per_request,
        "max_model_len": info.max_model_len,
        "train_length": info.train_length,
        "methods": [_described(offer) for offer in found if offer.positions is not None],
        "refused": [{"name": offer.name, "reason": offer.refusal} for offer in found if offer.positions is None],
    }


@lru_cache(maxsize=1)
def offered(info: ModelInfo) -> list[Offer]:
    """Each method, and what the model makes of it. They take milliseconds, and stay what they are."""
    return offers(rotaries_of(info.positions), info.max_model_len)


def _described(offer: Offer) -> dict[str, Any]:
    assert offer.positions is not None
    return {
        "name": offer.name,
        "summary": offer.summary,
        "use": offer.use,
        "takes": list(offer.takes),
        "parameters": offer.positions.described,
        "warning": " ".join(offer.positions.warnings()) or None,
    }


@router.post("/map", summary="The distances that a method shows")
async def show_map(
    read: Annotated[Read[MapRequest], Depends(body_of(MapRequest))], service: ReadyService
) -> dict[str, Any]:
    """The distance at which each query sees each key, on a small grid over a prompt of this length."""
    body = read.body
    spec = None if body.rope is None else body.rope.spec()
    positions = positions_of(service, spec) or service.engine.info.positions
    return {"length": body.length, **await asyncio.to_thread(distance_map, positions, body.length)}
