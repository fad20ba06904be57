"""The dependency of every endpoint that needs the model: a service that is ready, else a 503 that says why."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from prerope.server.service import Service, get_service


async def ready_service(request: Request) -> Service:  # async: FastAPI sends plain functions to a thread
    """Raises EngineUnavailable while loading, while draining, and once the engine is dead."""
    service = get_service(request)
    service.require_ready()
    return service


ReadyService = Annotated[Service, Depends(ready_service)]
