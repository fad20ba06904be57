"""How calls are timed and times compared, and the two rates that set a device's limits: of copies and of products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

REPEATS = 15
FLUSHED_BYTES = 256 * 2**20  # more than any L2 cache holds
COPIED_BYTES = 2**30
MATRIX = 8192


def clock_of(threads: int) -> Callable[[], float]:
    """Of one thread its CPU time, which a busy neighbour does not lengthen as it does wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


def seconds_of(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    call()
    return clock() - began


def over(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios, for what slows a round slows both; NaN where none has both."""
    return statistics.median([one / other for one, other in zip(ours, theirs, strict=False)] or [float("nan")])


class Clock:
    """Times calls on one device. On a CPU a call is timed once: that proves a program and measures nothing."""

    def __init__(self, device: torch.device, repeats: int = REPEATS) -> None:
        self.device, self._repeats = device, repeats
        self._on_gpu = device.type == "cuda"
        self._flushed = torch.zeros(FLUSHED_BYTES // 4 if self._on_gpu else 0, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        """The median of one call, captured in a CUDA graph and replayed with the L2 cache flushed before."""
        call()  # compiles, and plans the step
        if not self._on_gpu:
            return seconds_of(call)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        self._replay(graph)  # the first replay uploads the graph
        return statistics.median(self._replay(graph) for _ in range(self._repeats))

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flushed.sum()  # read, not written: changed lines would be written back while the call runs
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def warm(device: torch.device, seconds: float = 2.0) -> None:
    """Work for a GPU until its clocks are those of a busy one: an idle H100 ticks at a fifth of them."""
    if device.type != "cuda":
        return
    matrix, until = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device), time.perf_counter() + seconds
    while time.perf_counter() < until:
        for _ in range(50):
            matrix @ matrix
        torch.cuda.synchronize(device)


def copy_rate(clock: Clock) -> float:
    """Bytes read and written a second."""
    size = COPIED_BYTES if clock.device.type == "cuda" else 2**20
    source = torch.ones(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.seconds(lambda: target.copy_(source))


def matmul_rate(clock: Clock, dtype: torch.dtype) -> float:
    """FLOPs a second of a square product."""
    size = MATRIX if clock.device.type == "cuda" else 64
    one, other = (torch.randn(size, size, dtype=dtype, device=clock.device) for _ in range(2))
    return 2 * size**3 / clock.seconds(lambda: one @ other)
