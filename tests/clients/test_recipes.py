"""Every recipe of docs/clients.md, run as it is written but for the address, where its package is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import ENVIRONMENTS

PAGE = (Path(__file__).parent.parent.parent / "docs" / "clients.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"


def package(recipe: str) -> str:
    return next(name for name in re.findall(r"^(?:from|import) (\w+)", recipe, flags=re.MULTILINE))


def test_the_page_has_recipes() -> None:
    assert len(RECIPES) >= 9
    assert all(ADDRESS in recipe for recipe in RECIPES)


ENVIRONMENT = {"langchain_openai": "agents", "litellm": "older-openai"}
"""Of packages that are not beside the tests: `conftest` says where."""


def cases() -> list[Any]:
    """Those that take seconds to import are slow."""
    named = [(one, package(one)) for one in RECIPES]
    slow = [pytest.mark.slow, pytest.mark.clients]
    return [
        pytest.param(one, id=f"{at}-{name}", marks=slow if name in ENVIRONMENT or name == "huggingface_hub" else ())
        for at, (one, name) in enumerate(named)
    ]


@pytest.mark.parametrize("recipe", cases())
def test_a_recipe_prints_a_reply(url: str, recipe: str, tmp_path: Path) -> None:
    of_its_own = ENVIRONMENT.get(package(recipe))
    python = ENVIRONMENTS / of_its_own / "bin" / "python" if of_its_own else Path(sys.executable)
    if not python.exists():
        pytest.skip(f"{python} is missing: make test-clients")
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    done = subprocess.run(
        [str(python), "-c", recipe.replace(ADDRESS, url)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
