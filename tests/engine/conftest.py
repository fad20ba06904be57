"""The engine runs as it is served: with the C decode kernel where the machine can build it."""

from __future__ import annotations

import pytest

from cache.native import prepare


@pytest.fixture(scope="session", autouse=True)
def decode_kernel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """How preparing the kernel went."""
    return prepare(tmp_path_factory.mktemp("kernel"))
