"""GET /v1/models: the one model served here, with what a page or a client needs to know of it."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from prerope.rope.spec import METHOD_NAMES
from prerope.server.api.requests.prompts import check_model
from prerope.server.service import ReadyService, Service

router = APIRouter()

_STARTED = int(time.time())


@router.get("/models", summary="List the model served")
async def list_models(service: ReadyService) -> dict[str, Any]:
    """A list of one."""
    return {"object": "list", "data": [_card(service)]}


@router.get("/models/{model:path}", summary="Describe a model")
async def retrieve_model(model: str, service: ReadyService) -> dict[str, Any]:
    """The model by its name, which may hold a slash."""
    check_model(service, model)
    return _card(service)


def _card(service: Service) -> dict[str, Any]:
    """OpenAI's fields, vLLM's `max_model_len`, and how positions are read."""
    info = service.engine.info
    return {
        "id": service.model_name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "prerope",
        "max_model_len": info.max_model_len,
        "train_length": info.train_length,
        "rope": info.positions.describe(),
        "rope_per_request": service.settings.rope_per_request,
        "rope_methods": list(METHOD_NAMES),
    }
