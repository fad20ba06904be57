"""One server of the embedded model, as its users start it, and the environments in which clients of others run.

Clients want each other's dependencies in other releases, so each group has an environment of its own: `make
test-clients` makes them in the folder .clients from the lists in `venvs`, and node's packages in .clients/js. What is
not there is skipped.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("CLIENTS", HERE.parent.parent / ".clients"))
LIMIT_S = 280

Runner = Callable[..., str]


@pytest.fixture(scope="module")
def url(serve_module: Any) -> str:
    """The embedded model with a small cache; all else is as `make serve` has it."""
    return str(serve_module(max_model_len=4096, kv_cache_memory="256MiB"))


@pytest.fixture
def run(url: str, tmp_path: Path) -> Runner:
    """run("agents", "python", "-c", …) → what it printed. A program that fails fails the test."""

    def run_one(environment: str, program: str, *arguments: str) -> str:
        folder = ENVIRONMENTS / environment
        node = program == "node"
        there = folder / "node_modules" if node else folder / "bin" / program
        if not there.exists():
            pytest.skip(f"{there} is missing: make test-clients")
        outside = {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "URL": url,
        }
        done = subprocess.run(
            ["node" if node else str(there), *arguments],
            capture_output=True, text=True, timeout=LIMIT_S, check=False,
            cwd=folder if node else tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **outside},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return run_one
