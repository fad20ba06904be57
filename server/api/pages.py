"""The page to use the server from a browser, with nothing to download, and what a browser must not do with it.

It is one response, put together at its first request from the files in `playground/`: index.html, the style sheets, and
modules of plain JavaScript. Each module becomes a function whose exports are what it returns, so that no build tool is
needed, names stay apart, and editors and linters see ordinary modules.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

STYLES = ("base", "layout", "messages")
SCRIPTS = (
    *("dom", "markdown", "store", "api", "settings", "prompt", "documents", "tokens", "share", "positions"),
    *("shell", "chat", "main"),
)
"""The files in the order in which they stand: a module comes after those that it imports."""

IMPORT = re.compile(r'^import (\{.*?\}) from "\./(\w+)\.js";$', re.MULTILINE | re.DOTALL)
EXPORT = re.compile(r"^export ((?:async )?function\*? |const )([\w$]+)", re.MULTILINE)
INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@router.get("/", response_class=HTMLResponse)
async def playground() -> HTMLResponse:
    page, policy = _page()
    return HTMLResponse(page, headers={"Cache-Control": "no-cache", "Content-Security-Policy": policy})


@cache
def _page() -> tuple[str, str]:
    """(the page, its content security policy): its own script and style by their digests, and this server alone."""
    styles = "".join(_read(f"style/{name}.css") for name in STYLES)
    scripts = '"use strict";\n' + "".join(_as_function(name, _read(f"script/{name}.js")) for name in SCRIPTS)
    page = _read("index.html").replace("<style></style>", f"<style>{styles}</style>")
    page = page.replace("<script></script>", f"<script>{scripts}</script>")
    allowed = {kind: digest(text) for kind, text in INLINE.findall(page)}
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _read(name: str) -> str:
    folder = resources.files("prerope.server.api").joinpath("playground")
    return folder.joinpath(*name.split("/")).read_text(encoding="utf-8")


def _as_function(name: str, source: str) -> str:
    """A module as a function that returns its exports: `const _dom = (() => { …; return { $, el }; })();`."""
    exported = ", ".join(found[1] for found in EXPORT.findall(source))
    body = EXPORT.sub(r"\1\2", IMPORT.sub(r"const \1 = _\2;", source))
    return f"const _{name} = (() => {{\n{body}return {{ {exported} }};\n}})();\n"


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
