"""Captures what the engine launches as CUDA graphs, and leaves the device as it was where that fails.

A call is run twice before it is captured: once as it is, so that kernels are compiled and work spaces made outside of
the graph, and once while torch refuses whatever would wait for the device. A call that would is never captured: inside
a capture it would leave the stream and torch's allocator in a state that no later call expects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Replay = Callable[[], Tensor]
"""Replays a captured computation: its result is computed again from what its input tensors hold now."""


class Capture:
    """Makes graphs that share a stream and their working memory: what one computes is good until any is replayed.

    One stream, because every stream that multiplies matrices keeps a work space of its own, of 32 MiB on sm_90.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        """A graph of `run`. Raises what `run` raises, and leaves the current stream and the allocator as they were."""
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        try:
            with torch.cuda.stream(self._stream):
                run()
                with never_waiting():
                    run()
                graph, result = self._record(run)
        finally:
            torch.cuda.set_stream(before)  # a capture that fails may leave its own
            before.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _record(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # the graphs' memory is theirs: what nobody uses is given back first
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = run()
            graph.capture_end()
        except BaseException:
            self._abandon(graph)
            raise
        return graph, result

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a failed capture: torch 2.11 leaves the allocator capturing where one ends badly."""
        for end in (graph.capture_end, lambda: torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)):
            try:
                end()
            except RuntimeError:  # it has ended already
                continue


@contextmanager
def never_waiting() -> Iterator[None]:
    """Inside, what would wait for the device raises a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
