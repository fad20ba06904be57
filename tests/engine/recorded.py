"""What a CUDA graph does, without a GPU: calls are recorded once, with their tensors and numbers, and made again.

What the host worked out in between stays as it was at the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


class _Recorder(TorchDispatchMode):
    """Appends a call for each operation that computes. Refuses those for which a host would wait for its GPU."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        assert not name.startswith(WAITS), f"{name} waits for the device"
        result = function(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        fresh = [place for place, leaf in enumerate(results) if leaf.untyped_storage().data_ptr() not in given]
        changes = function._schema.is_mutable
        if name not in ALLOCATIONS and (fresh or changes):
            self._calls.append(lambda: self._again(function, args, kwargs, results, fresh))
        return result

    @staticmethod
    def _again(function: Any, args: Any, kwargs: Any, results: list[Tensor], fresh: list[int]) -> None:
        again = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor)]
        for place in fresh:
            results[place].copy_(again[place])


class RecordedGraph:
    """As `server.engine.graphs.decode.CudaGraph`. num_replays: of all graphs."""

    num_replays = 0

    def __init__(self, run: Callable[[], Tensor]) -> None:
        from triton.runtime.interpreter import GridExecutor

        self._calls: list[Callable[[], object]] = []
        launch = GridExecutor.__call__

        def recorded(executor: Any, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                launch(executor, *args, **kwargs)
            self._calls.append(lambda: launch(executor, *args, **kwargs))

        run()
        with pytest.MonkeyPatch.context() as patch, _Recorder(self._calls):
            patch.setattr(GridExecutor, "__call__", recorded)
            self._result = run()

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        RecordedGraph.num_replays += 1
        for call in self._calls:
            call()
        return self._result
