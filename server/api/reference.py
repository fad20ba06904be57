"""/docs: the endpoints as a page from which one can try them. Swagger UI's files come from this server, so the page
works without a network, and its policy lets it ask nobody else."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response
from prerope.server.api.pages import digest

router = APIRouter(include_in_schema=False)

SCRIPT, STYLE = "swagger-ui-bundle.js", "swagger-ui.css"
A_DAY = {"Cache-Control": "max-age=86400"}
NO_ICON = "data:,"

OWN_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


@router.get("/docs", response_class=HTMLResponse)
async def reference() -> HTMLResponse:
    page, policy = _page()
    return HTMLResponse(page, headers={"Content-Security-Policy": policy})


@router.get(f"/docs/{SCRIPT}", response_class=Response)
async def script() -> Response:
    return Response(_file(SCRIPT), media_type="text/javascript", headers=A_DAY)


@router.get(f"/docs/{STYLE}", response_class=Response)
async def style() -> Response:
    return Response(_file(STYLE), media_type="text/css", headers=A_DAY)


@cache
def _page() -> tuple[str, str]:
    """(the page, its content security policy). Its addresses are relative: it may stand behind a prefix."""
    answer = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="PreRoPE: endpoints",
        swagger_js_url=f"docs/{SCRIPT}",
        swagger_css_url=f"docs/{STYLE}",
        swagger_favicon_url=NO_ICON,
    )
    page = bytes(answer.body).decode()
    (own,) = OWN_SCRIPT.findall(page)
    policy = (
        f"default-src 'none'; script-src 'self' {digest(own)}; style-src 'self' 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )  # Swagger UI sets styles of single elements
    return page, policy


@cache
def _file(name: str) -> bytes:
    return resources.files("fastapi_offline").joinpath("static", name).read_bytes()
