"""The ranks that compute one model together: which of them this process is, and what they exchange.

Tensors alone go between them, never pickles. On CUDA steps go by NCCL and what the host knows by gloo, on the CPU all
of it by gloo, over the loopback interface: the ranks of one model are processes of one machine.

A collective that fails is a rank that has ended; `lost` says which.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from prerope.server.errors import RankLost
from torch import Tensor

Ints = NDArray[np.int64]
Group: TypeAlias = Any
"""A process group of torch's, whose stubs know no ancestor that all of them have."""

NEVER = timedelta(days=3650)
"""A rank may wait that long for the next step: whether the others live, their process says, not the clock."""

FIRST_PIECE = 2048
"""Numbers of a message that are sent at once; what is longer is sent in a second piece."""


class Ranks:
    """All ranks of one model, as one of them sees them. One process alone exchanges nothing.

    Attributes:
        lost: an error of a collective → which rank has ended.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.lost: Callable[[BaseException], BaseException] = _unknown
        self._host: Group | None = None
        self._device: Group | None = None

    @classmethod
    def join(cls, folder: Path, rank: int, size: int, *, on_gpus: bool) -> Ranks:
        """Wait until all ranks have joined; `folder` is where they find each other, and nobody else's."""
        ranks = cls(rank, size)
        store = dist.FileStore(str(folder / "ranks"), size)  # type: ignore[attr-defined]
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # of loopback alone: there is no other way
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = NEVER
        try:
            ranks._host = dist.ProcessGroupGloo(_within("host", store), rank, size, options)
            ranks._device = _nccl(_within("device", store), rank, size) if on_gpus else ranks._host
        except RuntimeError as error:
            raise ranks.lost(error) from error
        return ranks

    @property
    def alone(self) -> bool:
        return self.size == 1

    # --- of tensors on the device, within a step ---

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what every rank has, in place where x is contiguous."""
        if self._device is None:
            return x
        x = x.contiguous()
        self._wait(lambda group: group.allreduce([x]), self._device)
        return x

    def gather(self, x: Tensor, widths: list[int]) -> Tensor:
        """x [..., widths[rank]] of every rank, side by side in the last dim."""
        if self._device is None:
            return x
        widest, shape = max(widths), x.shape[:-1]
        own = torch.nn.functional.pad(x, (0, widest - x.shape[-1])).contiguous()
        parts = [torch.empty((*shape, widest), dtype=x.dtype, device=x.device) for _ in widths]
        self._wait(lambda group: group.allgather([parts], [own]), self._device)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    def hand_on(self, x: Tensor) -> None:
        """Broadcast rank 0's x to all others, in place."""
        if self._device is not None:
            self._wait(lambda group: group.broadcast(x, 0), self._device)

    # --- of what the host knows ---

    def least(self, number: int) -> int:
        """The smallest number that any rank gives."""
        return -self._most(-number)

    def first(self, number: int) -> int:
        """Rank 0's number."""
        shared = torch.tensor([number])
        if self._host is not None:
            self._wait(lambda group: group.broadcast(shared, 0), self._host)
        return int(shared[0])

    def all(self, verdict: bool) -> bool:
        """Whether all ranks say so."""
        return verdict if self.alone else self.least(int(verdict)) == 1

    def _most(self, number: int) -> int:
        shared = torch.tensor([number])
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        if self._host is not None:
            self._wait(lambda group: group.allreduce([shared], options), self._host)
        return int(shared[0])

    def tell(self, message: Ints) -> None:
        """Send a message from rank 0 to all ranks, which `hear` it."""
        piece = np.zeros(FIRST_PIECE, dtype=np.int64)
        piece[0] = len(message)
        head = message[: FIRST_PIECE - 1]
        piece[1 : 1 + len(head)] = head
        self._broadcast(piece)
        if len(message) > len(head):
            self._broadcast(message[len(head) :].copy())

    def hear(self) -> Ints:
        """The next message of rank 0, however long it takes."""
        piece = np.zeros(FIRST_PIECE, dtype=np.int64)
        self._broadcast(piece)
        count, head = int(piece[0]), piece[1:]
        if count <= len(head):
            return head[:count]
        rest = np.zeros(count - len(head), dtype=np.int64)
        self._broadcast(rest)
        return np.concatenate([head, rest])

    def _broadcast(self, numbers: Ints) -> None:
        assert self._host is not None
        shared = torch.from_numpy(numbers)
        self._wait(lambda group: group.broadcast(shared, 0), self._host)

    def _wait(self, start: Callable[[Group], dist.Work], group: Group) -> None:
        try:
            start(group).wait()
        except RuntimeError as error:
            raise self.lost(error) from error


def _within(name: str, store: Any) -> Any:
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def _nccl(store: Any, rank: int, size: int) -> Group:
    torch.cuda.set_device(rank)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = NEVER
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _unknown(error: BaseException) -> BaseException:
    return RankLost(f"the processes that compute this model have lost each other: {error}")


ALONE = Ranks()
"""One process computes the whole model."""


def shares(count: int, size: int, unit: int = 1) -> list[range]:
    """`count` things over `size` ranks, as evenly as whole units allow; the last ranks have more."""
    units = count // unit
    edges = [rank * units // size * unit for rank in range(size)] + [count]
    return [range(begin, end) for begin, end in pairwise(edges)]
