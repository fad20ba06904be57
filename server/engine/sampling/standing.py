"""What one sequence asks of every draw, as tensors: made at the first of them, kept, and added to as it grows.

A request may name each token of the vocabulary in a list, a prompt may have them all, and so may a reply. Made anew for
each row and each draft, such a list took 15 ms, as much as the rest of a step. Lists become tensors by way of NumPy,
which takes a fifth of the time that torch takes.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Rows
from functools import lru_cache

import numpy as np
import torch
from prerope.server.engine.sequence import SamplingParams
from torch import Tensor


class Standing:
    """The constant tensors of one sequence's draws from logits [V].

    Attributes:
        bias: ids, and what is added to their logits; None where there is none.
        forbidden: bool [V], set where no token is allowed; None where all are.
        ends: ids of the tokens that end it.
        never: ids of those that must not be drawn.
    """

    def __init__(self, sampling: SamplingParams, row: Tensor, eos_token_ids: frozenset[int]) -> None:
        self._size, self._device = row.shape[0], row.device
        self.bias: tuple[Tensor, Tensor] | None = None
        if given := sampling.logit_bias:
            values = torch.from_numpy(np.fromiter(given.values(), np.float32, len(given)))
            self.bias = self._ids(given), values.to(row.device, row.dtype)
        allowed = sampling.allowed_token_ids
        self.forbidden = None if allowed is None else _forbidden(_Same(allowed), self._size, row.device)
        self.ends = self._ids(sampling.stop_token_ids | eos_token_ids)
        self.never = self._ids([bad[0] for bad in sampling.bad_token_ids if len(bad) == 1])
        self._never_after: dict[int, list[tuple[int, ...]]] = {}
        for bad in sampling.bad_token_ids:
            if len(bad) > 1 and bad[-1] < self._size:
                self._never_after.setdefault(bad[-2], []).append(bad)
        self._seen = torch.zeros(self._size, dtype=torch.bool, device=row.device)
        self._num_seen = 0
        self._places: dict[int, int] = {}  # of each token of the reply, in the two arrays
        self._written, self._counts = np.empty(16, np.int64), np.empty(16, np.float32)
        self._num_counted = 0

    def banned(self, token_ids: Rows[int], first: int) -> Tensor:
        """Ids of the tokens that must not come next, behind what was written from the first on."""
        found = self._never_after.get(token_ids[-1], ()) if len(token_ids) > first else ()
        last = [bad[-1] for bad in found if tuple(token_ids[max(first, len(token_ids) + 1 - len(bad)) :]) == bad[:-1]]
        return torch.cat([self.never, self._ids(last)]) if last else self.never

    def seen(self, token_ids: Rows[int]) -> Tensor:
        """Bool [V], set where a token is among these, which only become more."""
        self._seen[self._ids(token_ids[self._num_seen :])] = True
        self._num_seen = len(token_ids)
        return self._seen

    def counted(self, token_ids: Rows[int], first: int) -> tuple[Tensor, Tensor]:
        """Which tokens are among these from the first on, and how often. They only become more."""
        places = self._places
        for token_id in token_ids[first + self._num_counted :]:
            place = places.get(token_id)
            if place is None:
                place = places[token_id] = len(places)
                if place == len(self._written):
                    self._written = np.resize(self._written, 2 * place).astype(np.int64)
                    self._counts = np.resize(self._counts, 2 * place).astype(np.float32)
                self._written[place], self._counts[place] = token_id, 0
            self._counts[place] += 1
        self._num_counted = len(token_ids) - first
        written, counts = (torch.from_numpy(one[: len(places)]) for one in (self._written, self._counts))
        return written.to(self._device), counts.to(self._device)

    def _ids(self, token_ids: Collection[int]) -> Tensor:
        return _ids(token_ids, self._size, self._device)


class _Same:
    """A list that is the same as itself alone: the choices of a request share one."""

    def __init__(self, ids: Rows[int]) -> None:
        self.ids = ids

    def __hash__(self) -> int:
        return id(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.ids is self.ids


@lru_cache(maxsize=16)
def _forbidden(allowed: _Same, size: int, device: torch.device) -> Tensor:
    forbidden = torch.ones(size, dtype=torch.bool, device=device)
    forbidden[_ids(allowed.ids, size, device)] = False
    return forbidden


def _ids(token_ids: Collection[int], size: int, device: torch.device) -> Tensor:
    """Those that have logits."""
    ids = np.fromiter(token_ids, np.int64, len(token_ids))
    return torch.from_numpy(ids[ids < size]).to(device)
