"""The engine runs as it is served: on the device under test, with the C kernels where the machine can build them."""

from __future__ import annotations

import pytest
from prerope.server.machine.places import default_cache_dir
from prerope.server.models.cpu.build import prepare
from prerope.server.models.model import Model

from tests.device import DEVICE
from tests.engine.tiny_models import tiny

OF_THE_CPU = {"test_cpu_kernels", "test_cpu_stack", "test_quantization"}
OF_FAKE_TENSORS = {"test_cuda_step", "test_capture"}
"""Modules that stand in for a card."""


@pytest.fixture(scope="module", autouse=True)
def device(request: pytest.FixtureRequest) -> None:
    """Skips, on a card, what is about the CPU."""
    name = request.module.__name__.rpartition(".")[2]
    if DEVICE != "cpu" and name in OF_THE_CPU | OF_FAKE_TENSORS:
        pytest.skip("runs on the CPU; without DEVICE")


@pytest.fixture(scope="session", autouse=True)
def decode_kernel() -> str:
    """How preparing the kernel went. It is kept where servers keep theirs, so it is built once for all processes."""
    return prepare(default_cache_dir())


@pytest.fixture(scope="module")
def model() -> Model:
    """A Llama trained at 64 positions; modules that want another model have a fixture of the same name."""
    return Model(tiny("llama", max_position_embeddings=64))
