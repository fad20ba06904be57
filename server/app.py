"""Puts the app together: settings in, FastAPI app out. The engine starts and stops with the app's lifespan."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prerope.cache.tier import folder_secret
from prerope.server import version
from prerope.server.api import generate, health, pages, positions, reference
from prerope.server.api import tokens as tokenize
from prerope.server.api.dialects import anthropic, kept_responses, ollama, others, rendering, responses
from prerope.server.api.errors import install_error_handlers
from prerope.server.api.fairness import Allowance, BodyLimit, HoldRequest
from prerope.server.api.keys import KeyCheck, KeyRing
from prerope.server.api.middleware import (
    ClientTimeout,
    FieldReport,
    HeadAsGet,
    HostCheck,
    OtherPrefix,
    RequestContext,
)
from prerope.server.api.openai import completions as openai
from prerope.server.api.openapi.document import install_document
from prerope.server.api.replies import Replies
from prerope.server.errors import ConfigurationError
from prerope.server.service import Service
from prerope.server.settings import Settings
from starlette.middleware.cors import CORSMiddleware

EXPOSED_HEADERS = ["x-request-id", "retry-after", "x-ignored-fields"]


def create_app(settings: Settings) -> FastAPI:
    """The whole server but for its socket. Importing and calling this loads no model; the lifespan does."""
    service = Service(settings)
    app = FastAPI(
        title="PreRoPE", version=version(), lifespan=_lifespan, openapi_url=None, docs_url=None, redoc_url=None
    )
    app.state.service = service
    for module in (generate, openai, rendering, tokenize, positions, health, pages, reference):
        app.include_router(module.router)
    for dialect in (anthropic, responses, kept_responses, ollama, others):
        app.include_router(dialect.router, include_in_schema=False)  # their own documentation says what they take
    install_error_handlers(app)
    install_document(app, needs_key=bool(settings.api_keys or settings.api_key_file))
    # The last added is the outermost.
    app.add_middleware(HeadAsGet)
    app.add_middleware(FieldReport, strict=settings.strict_fields)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    in_pieces = Replies(service.bodies.rest).in_pieces
    app.add_middleware(ClientTimeout, seconds=settings.client_timeout_s, in_pieces=in_pieces)
    app.add_middleware(HoldRequest, allowance=Allowance(settings.max_seqs_per_key, service.engine.retry_after_s))
    keys, metrics_keys = _keys(settings)
    if keys.asks or metrics_keys.asks:
        app.add_middleware(KeyCheck, keys=keys, metrics_keys=metrics_keys)
    app.add_middleware(HostCheck, allowed=settings.host_names, default_all=keys.asks)
    app.add_middleware(RequestContext, metrics=service.metrics)
    app.add_middleware(OtherPrefix)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    return app


def _keys(settings: Settings) -> tuple[KeyRing, KeyRing]:
    """The keys that open the server, and those that open /metrics alone."""
    return KeyRing(settings.api_keys, settings.api_key_file, secret=_tenants(settings)), KeyRing(settings.metrics_keys)


def _tenants(settings: Settings) -> bytes | None:
    """The secret that names tenants: kept with what is kept for them over restarts."""
    if settings.cache_tier_dir is None or not settings.asks_for_key:
        return None
    try:
        return folder_secret(settings.cache_tier_dir)
    except OSError as error:
        raise ConfigurationError(
            f"CACHE_TIER_DIR is {settings.cache_tier_dir}: it cannot be used ({error}); name a folder of your own"
        ) from error


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.engine.start()
    try:
        yield
    finally:
        service.workers.close()
        await service.engine.shutdown(service.settings.shutdown_timeout_s)
        await asyncio.to_thread(service.close)
