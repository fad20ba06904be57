"""What one sequence asks of every draw, as tensors: made at the first of them and kept.

A request may name each token of the vocabulary in a list, and a prompt may have them all. Made anew for each row and
each draft, such a list took 15 ms, as much as the rest of a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows

import torch
from prerope.server.engine.sequence import SamplingParams
from torch import Tensor


class Standing:
    """The constant tensors of one sequence's draws from logits [V].

    Attributes:
        bias: ids, and what is added to their logits; None where there is none.
        forbidden: bool [V], set where no token is allowed; None where all are.
        ends: ids of the tokens that end it.
    """

    def __init__(self, sampling: SamplingParams, row: Tensor, eos_token_ids: frozenset[int]) -> None:
        self._size, self._device = row.shape[0], row.device
        self.bias: tuple[Tensor, Tensor] | None = None
        if sampling.logit_bias:
            ids, bias = zip(*sampling.logit_bias.items(), strict=True)
            self.bias = torch.tensor(ids, device=row.device), torch.tensor(bias, dtype=row.dtype, device=row.device)
        self.forbidden: Tensor | None = None
        if sampling.allowed_token_ids is not None:
            self.forbidden = torch.ones(self._size, dtype=torch.bool, device=row.device)
            self.forbidden[self._ids(sampling.allowed_token_ids)] = False
        self.ends = self._ids(sampling.stop_token_ids | eos_token_ids)
        self._seen = torch.zeros(self._size, dtype=torch.bool, device=row.device)
        self._num_seen = 0

    def seen(self, token_ids: Rows[int]) -> Tensor:
        """Bool [V], set where a token is among these, which only become more."""
        self._seen[self._ids(token_ids[self._num_seen :])] = True
        self._num_seen = len(token_ids)
        return self._seen

    def _ids(self, token_ids: Iterable[int]) -> Tensor:
        """Those that have logits."""
        ids = [token_id for token_id in token_ids if token_id < self._size]
        return torch.tensor(ids, dtype=torch.int64, device=self._device)
