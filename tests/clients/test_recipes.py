"""Every recipe of docs/clients.md, run as it is written but for the address, where its package is installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

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


SLOW = {*ENVIRONMENT, "huggingface_hub"}
"""They take seconds to import."""

RUN_ALL = """
import contextlib, io, json, sys
for recipe in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(recipe, {})
    print(json.dumps(printed.getvalue()))
"""


@pytest.mark.slow
def test_recipes_print_replies(url: str, tmp_path: Path) -> None:
    """One process for all, whose imports take longer than they do."""
    recipes = [one.replace(ADDRESS, url) for one in RECIPES if package(one) not in SLOW]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(recipes),
        capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(printed) == len(recipes) >= 6
    assert all(one.strip() for one in printed), printed


@pytest.mark.slow
@pytest.mark.clients
@pytest.mark.parametrize("recipe", [one for one in RECIPES if package(one) in SLOW], ids=package)
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
