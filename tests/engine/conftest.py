"""The engine runs as it is served: on the device under test, with the C kernels where the machine can build them."""

from __future__ import annotations

import pytest
from prerope.cache.kernels.build import prepare

from tests.device import DEVICE

OF_THE_CPU = {"test_cpu_kernels", "test_cpu_stack", "test_quantization"}
OF_THE_INTERPRETER = {"test_cuda_graphs", "test_cuda_layers", "test_cuda_step"}
"""Modules that put models on the CPU and run what CUDA gets there, kernels under Triton's interpreter."""


@pytest.fixture(scope="module", autouse=True)
def device(request: pytest.FixtureRequest) -> None:
    """Skips, on a card, what is about the CPU."""
    name = request.module.__name__.rpartition(".")[2]
    if DEVICE != "cpu" and name in OF_THE_CPU | OF_THE_INTERPRETER:
        pytest.skip("runs on the CPU; without DEVICE")


@pytest.fixture(scope="session", autouse=True)
def decode_kernel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """How preparing the kernel went."""
    return prepare(tmp_path_factory.mktemp("kernel"))
