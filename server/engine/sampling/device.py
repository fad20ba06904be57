"""Sampling where the logits are, for all rows at once: nothing here waits for the device.

For sequences that need no history: no grammar, bias, penalties or min_tokens. What a draw is,
`server.engine.sampling.host` says: one uniform number of the sequence's own, which inverts the distribution, by token
id or, where top-k or top-p asks for an order, best first (of equals the lowest id first). Probabilities are fp64.

Rows are drawn in groups: those by id, those of a small top-k, which look at their best tokens only, and those for which
the whole vocabulary is sorted. A row's group is its own affair, and its result does not depend on the others in it: a
seeded request does not see its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows

import numpy as np
import torch
from prerope.cache.transfer import send
from prerope.server.engine.sampling.host import uniform
from prerope.server.engine.sequence import Sequence
from torch import Tensor

SLICE_LOGITS = 2**23
"""Logits that are drawn from at once. Each takes about 50 bytes meanwhile: see `draw_rows`."""

MOST_CANDIDATES = 1024
"""A top-k up to this is found by selection, a larger one by sorting the vocabulary."""

COLUMNS = ("row", "temperature", "top_k", "top_p", "min_p", "point")
"""What one draw needs to know, fp64 each: where its logits are, its parameters and its uniform number."""

Draw = tuple[float, ...]


def sample_on_device(logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """logits [N, V] fp32, one row a sequence → token ids [N] int64 on the same device. logits stay as they are."""
    tokens = logits.argmax(dim=-1)
    groups = _groups(sequences, logits.shape[1])
    if not groups:
        return tokens
    sent = send(np.array([draw for _, group in groups for draw in group], dtype=np.float64), logits.device)
    most, begin = max(1, SLICE_LOGITS // logits.shape[1]), 0
    for width, group in groups:
        for first in range(0, len(group), most):
            row, *columns = sent.narrow(0, begin + first, min(most, len(group) - first)).unbind(1)
            rows = row.long()
            tokens.index_copy_(0, rows, draw_rows(logits.index_select(0, rows), columns, width))
        begin += len(group)
    return tokens


def draw_rows(logits: Tensor, columns: Rows[Tensor], width: int) -> Tensor:
    """logits [N, V], columns of draws [N] after the first → [N] int64.

    width: tokens that a row looks at, best first; 0 for all by id, when neither top-k nor top-p counts.
    """
    temperature, top_k, top_p, min_p, point = (column.unsqueeze(1) for column in columns)
    ids = None
    if width:
        logits, ids = best(logits, width)
    # The best is 0 whatever the temperature, so that nothing overflows.
    scores = (logits - logits.amax(dim=-1, keepdim=True)).double() / temperature
    if width:
        rank = torch.arange(scores.shape[1], device=scores.device)
        scores.masked_fill_(rank >= top_k, -math.inf)
    probabilities = scores.softmax(dim=-1)
    del scores
    if width:
        before = probabilities.cumsum(dim=-1).sub_(probabilities)
        probabilities.masked_fill_(before >= top_p, 0.0)  # before the best one is 0
        del before
    least = min_p * probabilities.amax(dim=-1, keepdim=True)
    probabilities.masked_fill_(probabilities < least, 0.0)
    places = invert(probabilities, point)
    return (places if ids is None else ids.gather(1, places)).squeeze(1)


def best(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The largest of logits [N, V] fp32 and their ids, [N, width] each; of equals the lowest id first."""
    size = logits.shape[1]
    if width == size:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values, ids
    # A selection does not say which of equals it takes: so no two keys are equal. Bits of floats are ordered as
    # integers, negative ones the wrong way round; zeros have one sign.
    bits = (logits + 0.0).view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (bits.long() << 32) + torch.arange(size - 1, -1, -1, device=logits.device)
    ids = size - 1 - (keys.topk(width, dim=-1).values & 0xFFFFFFFF)
    return logits.gather(1, ids), ids


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


def _groups(sequences: Rows[Sequence], vocab_size: int) -> list[tuple[int, list[Draw]]]:
    """`COLUMNS` of all rows that are not greedy, with how many tokens each group looks at: see `draw_rows`."""
    by_id: list[Draw] = []
    candidates: list[Draw] = []
    everything: list[Draw] = []
    for row, sequence in enumerate(sequences):
        sampling = sequence.sampling
        if sampling.greedy:
            continue
        cut = 0 < sampling.top_k < vocab_size
        top_k = sampling.top_k if cut else vocab_size
        top_p = sampling.top_p if sampling.top_p < 1.0 else math.inf
        draw = (row, sampling.temperature, top_k, top_p, sampling.min_p, uniform(sequence.generator))
        if cut and top_k <= MOST_CANDIDATES:
            candidates.append(draw)
        else:
            (everything if cut or sampling.top_p < 1.0 else by_id).append(draw)
    width = max((int(draw[2]) for draw in candidates), default=1)
    groups = (0, by_id), (width, candidates), (vocab_size, everything)
    return [(width, group) for width, group in groups if group]
