"""For probes, routers and scrapers.

/live     200 while the process runs and no step hangs (STEP_TIMEOUT_S), while it loads, too: for whoever restarts it
/health   200 while requests are taken, 503 while loading, draining, hung or dead: what routers and balancers read
/ready    the same, with the reason and the model's name
/ping     as /health, by SageMaker's name for it
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from prerope.server.service import Service
from prometheus_client import CONTENT_TYPE_LATEST

router = APIRouter(tags=["health"])


def get_service(request: Request) -> Service:
    """The service, in whatever state it is."""
    service: Service = request.app.state.service
    return service


AnyService = Annotated[Service, Depends(get_service)]

NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "loading, draining, hung or dead"}}
HUNG: dict[int | str, dict[str, Any]] = {503: {"description": "a step does not end"}}


@router.get("/live", summary="Does the process run", responses=HUNG)
async def live(service: AnyService) -> dict[str, str]:
    """200 from the first second on, while the model loads too; 503 while a step of the engine hangs."""
    service.engine.require_alive()
    return {"status": "ok"}


@router.get("/health", summary="Are requests taken", responses=NOT_READY)
async def health(service: AnyService) -> dict[str, str]:
    """200 while requests are taken; 503 while the model loads, while draining, and where the engine hangs or died."""
    service.require_open()
    return {"status": "ok"}


@router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
async def ping(service: AnyService) -> dict[str, str]:
    """The same answer as /health, where SageMaker looks for it."""
    return await health(service)


@router.get("/version", summary="The server's version")
async def version(request: Request) -> dict[str, str]:
    """The version of this package."""
    return {"version": request.app.version}


@router.get("/ready", summary="Are requests taken", responses=NOT_READY)
async def ready(service: AnyService) -> dict[str, str]:
    """200 once the model is loaded and the engine is alive; until then, and while draining, 503 with the reason."""
    service.require_open()
    return {"status": "ready", "model": service.model_name}


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(service: AnyService) -> Response:
    """vLLM's metric names, and `prerope:` for what vLLM does not have."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)
