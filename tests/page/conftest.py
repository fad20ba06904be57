"""A headless Chromium of this machine's, driven by Playwright: `pip install '.[browser]'` and Debian's `chromium`.

Without either these tests are skipped, and say so. Nothing is downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

WIDE, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: pip install '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH (Debian: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(serve_module: Any, tiny_checkpoint: Path) -> str:
    return str(serve_module(model_id=str(tiny_checkpoint), max_model_len=4096, kv_cache_memory="64MiB"))


Opener = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, url: str) -> Iterator[Opener]:
    """opened(size, colours) → the page, ready to be asked. It must end without an error or a blocked resource."""
    contexts, complaints = [], []

    def open_page(size: dict[str, int] = WIDE, colours: str = "light", at: str = url, ready: bool = True) -> Any:
        context = browser.new_context(viewport=size, color_scheme=colours, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.goto(at)
        if ready:
            page.wait_for_selector("#send:not([disabled])")
            page.evaluate("localStorage.clear()")
        return page

    yield open_page
    for context in contexts:
        context.close()
    expected = ("401", "400 (Bad Request)")  # the browser writes a line for each refusal, which the page then shows
    assert [text for text in complaints if not any(code in text for code in expected)] == []
