"""The C decode kernel, where the machine can build it."""

from __future__ import annotations

import pytest
from prerope.cache.kernels.build import library
from prerope.server.machine.places import default_cache_dir
from prerope.server.models.cpu.build import prepare


@pytest.fixture(scope="session")
def decode_kernel() -> None:
    """Skips where there is no C compiler: torch does the work of the kernel there."""
    told = prepare(default_cache_dir())
    if library() is None:
        pytest.skip(told)


@pytest.fixture(params=["torch", "kernel"])
def kernel(request: pytest.FixtureRequest) -> bool:
    """Whether single rows go through the C kernel."""
    if request.param == "kernel":
        request.getfixturevalue("decode_kernel")
    return bool(request.param == "kernel")
