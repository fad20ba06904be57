"""The page to try the server from a browser, with nothing to download, and what a browser must not do with it."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@router.get("/", response_class=HTMLResponse)
async def playground() -> HTMLResponse:
    page, policy = _page()
    return HTMLResponse(page, headers={"Cache-Control": "no-cache", "Content-Security-Policy": policy})


@cache
def _page() -> tuple[str, str]:
    """(the page, its content security policy): its own script and style by their digests, and this server alone."""
    page = resources.files("prerope.server.api").joinpath("playground.html").read_text(encoding="utf-8")
    allowed = {kind: _digest(text) for kind, text in INLINE.findall(page)}
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
