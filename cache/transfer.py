"""Copies between host and device that nobody waits for: through pinned memory, which a copy holds until it is done."""

from __future__ import annotations

from collections.abc import Callable
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


def bring_back(values: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A tensor on the host, whole once the function has returned, which any thread may call. On the CPU: as it is."""
    if values.device.type != "cuda":
        return values, lambda: None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(values.device))
    return host, event.synchronize
