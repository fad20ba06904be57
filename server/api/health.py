"""For probes and scrapers: /health (the process is up), /ready (requests are taken), /metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from prerope.server.service import Service, get_service
from prometheus_client import CONTENT_TYPE_LATEST

router = APIRouter(tags=["health"])

ServiceDependency = Annotated[Service, Depends(get_service)]


@router.get("/health", summary="Is the process up")
async def health() -> dict[str, str]:
    """200 from the first second on, while the model loads too."""
    return {"status": "ok"}


@router.get("/ready", summary="Are requests taken", responses={503: {"description": "loading, draining or dead"}})
async def ready(service: ServiceDependency) -> dict[str, str]:
    """200 once the model is loaded and the engine is alive; until then, and while draining, 503 with the reason."""
    service.require_ready()
    return {"status": "ready", "model": service.model_name}


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(service: ServiceDependency) -> Response:
    """vLLM's metric names, and `prerope:` for what vLLM does not have."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)
