"""GET /v1/models: the one model served here, with what a page or a client needs to know of it."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from prerope.server.api.positions import offered
from prerope.server.api.running import ReadyService
from prerope.server.service import Service

router = APIRouter()

CAPABILITIES = {"completion_chat": True, "completion_fim": False, "function_calling": True, "fine_tuning": False}

_STARTED = int(time.time())


@router.get("/models", summary="List the model served")
async def list_models(service: ReadyService) -> dict[str, Any]:
    """One model, under each of its names."""
    return {"object": "list", "data": [_card(service, name) for name in service.served_names]}


@router.get("/models/{model:path}", summary="Describe a model")
async def retrieve_model(model: str, service: ReadyService) -> dict[str, Any]:
    """The model by its name, which may hold a slash."""
    if model not in service.served_names:
        raise service.text.not_served(model)
    return _card(service, model)


def _card(service: Service, name: str) -> dict[str, Any]:
    """OpenAI's fields, vLLM's `max_model_len`, what Mistral's client reads of a card, and how positions are read."""
    info = service.engine.info
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "prerope",
        "root": service.model_name,
        "parent": None,
        "type": "base",
        "capabilities": CAPABILITIES,
        "max_model_len": info.max_model_len,
        "train_length": info.train_length,
        "default_sampling_params": asdict(service.sampling_defaults),
        "rope": info.positions.described,
        "rope_per_request": service.settings.rope_per_request,
        "rope_methods": [offer.name for offer in offered(info) if offer.positions is not None],
    }
