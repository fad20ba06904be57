"""Host to device without waiting: what is sent is staged in pinned memory, which the copy holds until it is done."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def send(values: NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """A host array or tensor on `device`. On the CPU it is the same memory, not a copy."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
