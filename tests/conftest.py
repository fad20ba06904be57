"""Fixtures: the embedded default checkpoint, a tiny random one, and a server on a free loopback port."""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import pytest

from server.checkpoint import Checkpoint, resolve_checkpoint


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """SmolLM2-135M-Instruct, as `make serve` serves it; converted on first use."""
    return resolve_checkpoint(None, None, print)
