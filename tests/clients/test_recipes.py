"""Every recipe of docs/clients.md, run as it is written but for the address, where its package is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parent.parent.parent / "docs" / "clients.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url(serve_module: Any) -> str:
    return str(serve_module(max_model_len=4096, kv_cache_memory="256MiB"))


def package(recipe: str) -> str:
    return next(name for name in re.findall(r"^(?:from|import) (\w+)", recipe, flags=re.MULTILINE))


def test_the_page_has_recipes() -> None:
    assert len(RECIPES) >= 9
    assert all(ADDRESS in recipe for recipe in RECIPES)


HEAVY = ("huggingface_hub", "langchain_openai", "litellm")
"""What takes seconds to import."""


def cases() -> list[Any]:
    named = [(one, package(one)) for one in RECIPES]
    slow = [pytest.mark.slow]
    return [
        pytest.param(one, id=f"{at}-{name}", marks=slow if name in HEAVY else ())
        for at, (one, name) in enumerate(named)
    ]


@pytest.mark.parametrize("recipe", cases())
def test_a_recipe_prints_a_reply(url: str, recipe: str, tmp_path: Path) -> None:
    if find_spec(package(recipe)) is None:
        pytest.skip(f"{package(recipe)} is not installed (pip install '.[clients]')")
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    done = subprocess.run(
        [sys.executable, "-c", recipe.replace(ADDRESS, url)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
