"""Sampling where the logits are, for all rows at once: nothing here waits for the device.

For sequences that need no history: no grammar, bias, penalties or min_tokens. What a draw is, `server.engine.sampler`
says: one uniform number of the sequence's own, which inverts the distribution, by token id or, where top-k or top-p
asks for an order, best first (of equals the lowest id first). Which of both depends on the row alone, so that a
seeded request does not see its neighbours. Probabilities are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Rows

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.transfer import send
from server.engine.sampler import uniform
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Sequence

SLICE_LOGITS = 2**23
"""Logits that are drawn from at once. Each takes about 50 bytes meanwhile: see `draw_rows`."""

COLUMNS = ("row", "temperature", "top_k", "top_p", "min_p", "point")
"""What one draw needs to know, fp64 each: where its logits are, its parameters and its uniform number."""


def sample_on_device(logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """logits [N, V] fp32, one row a sequence → token ids [N] int64 on the same device. logits stay as they are."""
    tokens = logits.argmax(dim=-1)
    draws, num_by_id = _draws(sequences, logits.shape[1])
    if not len(draws):
        return tokens
    sent = send(draws, logits.device)
    most = max(1, SLICE_LOGITS // logits.shape[1])
    for begin, end in (*_slices(0, num_by_id, most), *_slices(num_by_id, len(draws), most)):
        row, *columns = sent.narrow(0, begin, end - begin).unbind(1)
        rows = row.long()
        tokens.index_copy_(0, rows, draw_rows(logits.index_select(0, rows), columns, ordered=begin >= num_by_id))
    return tokens


def draw_rows(logits: Tensor, columns: Rows[Tensor], *, ordered: bool) -> Tensor:
    """logits [N, V], columns of draws [N] after the first → [N] int64. ordered: top-k and top-p count, best first."""
    temperature, top_k, top_p, min_p, point = (column.unsqueeze(1) for column in columns)
    ids = None
    if ordered:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    # The best is 0 whatever the temperature, so that nothing overflows.
    scores = (logits - logits.amax(dim=-1, keepdim=True)).double() / temperature
    rank = torch.arange(scores.shape[1], device=scores.device)
    if ordered:
        scores.masked_fill_(rank >= top_k, -math.inf)
    probabilities = scores.softmax(dim=-1)
    del scores
    if ordered:
        before = probabilities.cumsum(dim=-1).sub_(probabilities)
        probabilities.masked_fill_((before >= top_p) & (rank > 0), 0.0)
        del before
    least = min_p * probabilities.amax(dim=-1, keepdim=True)
    probabilities.masked_fill_(probabilities < least, 0.0)
    places = invert(probabilities, point)
    return (places if ids is None else ids.gather(1, places)).squeeze(1)


def invert(probabilities: Tensor, points: Tensor) -> Tensor:
    """probabilities [N, V], of any sum; points [N, 1] in [0, 1) → places [N, 1] int64, none of probability zero.

    A parallel sum may grow by rounding where nothing is added: so zeros are left out, not only passed over.
    """
    cumulative = probabilities.cumsum(dim=-1)
    possible = probabilities > 0
    total = cumulative.narrow(1, cumulative.shape[1] - 1, 1)
    reached = (cumulative > points * total) & possible
    # The first place that is true; rounding at the very end may leave none.
    first = reached.view(torch.uint8).argmax(dim=-1, keepdim=True)
    last = possible.shape[1] - 1 - possible.flip(-1).view(torch.uint8).argmax(dim=-1, keepdim=True)
    return torch.where(reached.any(dim=-1, keepdim=True), first, last)


def _draws(sequences: Rows[Sequence], vocab_size: int) -> tuple[NDArray[np.float64], int]:
    """`COLUMNS` of all rows that are not greedy [n, 6], those drawn by token id first; and how many these are."""
    by_id: list[tuple[float, ...]] = []
    ordered: list[tuple[float, ...]] = []
    for row, sequence in enumerate(sequences):
        sampling = sequence.sampling
        if sampling.greedy:
            continue
        top_k = sampling.top_k if 0 < sampling.top_k < vocab_size else vocab_size
        top_p = sampling.top_p if sampling.top_p < 1.0 else math.inf
        one = (row, sampling.temperature, top_k, top_p, sampling.min_p, uniform(sequence.generator))
        (ordered if _needs_order(sampling, vocab_size) else by_id).append(one)
    return np.array(by_id + ordered, dtype=np.float64).reshape(-1, len(COLUMNS)), len(by_id)


def _needs_order(sampling: SamplingParams, vocab_size: int) -> bool:
    return 0 < sampling.top_k < vocab_size or sampling.top_p < 1.0


def _slices(begin: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + most, end)) for first in range(begin, end, most))
