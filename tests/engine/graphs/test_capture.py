"""How a step is captured: what comes before, and what is put back where it fails. torch.cuda is stood in for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from prerope.server.engine.graphs.capture import Capture
from torch import Tensor

DEVICE = torch.device("cuda", 0)


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        pass


class Card:
    """What was asked of torch.cuda, in order, and the state that a failure may leave wrong."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.stream = self.own = Stream("engine")
        self.sync_mode, self.capturing, self.num_streams, self.num_pools = 0, False, 0, 0
        self.broken: str | None = None
        for name in ("Stream", "stream", "set_stream", "graph_pool_handle", "CUDAGraph"):
            patch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        patch.setattr(torch.cuda, "current_stream", lambda _=None: self.stream)
        patch.setattr(torch.cuda, "synchronize", lambda _=None: None)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.sync_mode)
        patch.setattr(torch.cuda, "set_sync_debug_mode", self._set_mode)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_allocating, raising=False)

    def _Stream(self, _device: object) -> Stream:
        self.num_streams += 1
        return Stream("side")

    @contextmanager
    def _stream(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield  # as torch: a body that raises out of capture_end may leave the stream
        self.stream = before

    def _set_stream(self, stream: Stream) -> None:
        self.stream = stream

    def _graph_pool_handle(self) -> tuple[int, int]:
        self.num_pools += 1
        return (0, self.num_pools)

    def _set_mode(self, mode: int | str) -> None:
        self.sync_mode = 2 if mode == "error" else int(mode)

    def _end_allocating(self, _device: int, _pool: object) -> None:
        if not self.capturing:
            raise RuntimeError("not currently recording")
        self.capturing = False

    def _CUDAGraph(self) -> Graph:
        return Graph(self)

    def run(self) -> Tensor:
        assert self.stream.name == "side"
        how = "captured" if self.capturing else "refusing waits" if self.sync_mode == 2 else "warm"
        self.log.append(how)
        if how == self.broken:
            raise RuntimeError(f"broken while {how}")
        return torch.ones(1)


class Graph:
    def __init__(self, card: Card) -> None:
        self.card = card

    def capture_begin(self, *, pool: tuple[int, int], capture_error_mode: str) -> None:
        assert (pool, capture_error_mode) == ((0, 1), "thread_local")
        self.card.capturing = True

    def capture_end(self) -> None:
        if self.card.broken == "captured":
            raise RuntimeError("the capture was invalidated")  # as torch 2.11 does, the allocator still capturing
        self.card.capturing = False

    def replay(self) -> None:
        self.card.log.append("replayed")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def test_a_call_is_warmed_up_twice_and_then_captured(card: Card) -> None:
    capture = Capture(DEVICE)
    for _ in range(3):
        assert capture(card.run)() is not None
    assert card.log == ["warm", "refusing waits", "captured", "replayed"] * 3
    assert (card.num_streams, card.num_pools) == (1, 1), "for all graphs"


@pytest.mark.parametrize("broken", ["warm", "refusing waits", "captured"])
def test_a_failure_leaves_nothing_behind(card: Card, broken: str) -> None:
    """What would wait is not captured; what fails in a capture ends it, and the next one works."""
    capture, card.broken = Capture(DEVICE), broken
    with pytest.raises(RuntimeError, match=f"broken while {broken}"):
        capture(card.run)
    assert "captured" not in card.log or broken == "captured"
    assert (card.stream, card.sync_mode, card.capturing) == (card.own, 0, False)
    card.broken = None
    capture(card.run)()
    assert card.log[-2:] == ["captured", "replayed"]
