"""The next tokens of a step, chosen where that is best: with the logits, or on the host.

Where a row is sampled is its own affair: a seeded request does not see its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from prerope.cache.transfer import bring_back, send
from prerope.server.engine.outputs import TokenLogprobs
from prerope.server.engine.sampling.device import sample_on_device
from prerope.server.engine.sampling.host import logprobs, sample
from prerope.server.engine.sequence import Sequence
from torch import Tensor


class Arrival:
    """Token ids [N] int64 on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self._host, self._whole = bring_back(tokens)

    def wait(self) -> list[int]:
        """The ids, once they are here: all that was launched before them has run by then."""
        self._whole()
        ids: list[int] = self._host.tolist()
        return ids


def needs_host(sequence: Sequence, *, on_device: bool) -> bool:
    """Whether a token is chosen on the host; on_device: draws that need nothing else are made where the logits are."""
    return sequence.chosen_on_host or (not sequence.request.sampling.greedy and not on_device)


def choose(
    logits: Tensor, sequences: Rows[Sequence], eos_token_ids: frozenset[int], *, on_device: bool
) -> tuple[Tensor, dict[Sequence, TokenLogprobs]]:
    """(token ids [N] int64, log-probabilities asked for) of logits [N, V] fp32, one row a sequence; may be changed."""
    on_host, rest, greedy = [], [], True
    for place, sequence in enumerate(sequences):
        if needs_host(sequence, on_device=on_device):
            on_host.append(place)
        else:
            rest.append(place)
            greedy = greedy and sequence.request.sampling.greedy
    if not on_host:
        return logits.argmax(dim=-1) if greedy else sample_on_device(logits, sequences), {}
    if not rest:
        return _choose_on_host(logits, sequences, eos_token_ids)
    tokens = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
    drawn_here = sample_on_device(rows_of(logits, rest), [sequences[place] for place in rest])
    tokens.index_copy_(0, _sent(rest, logits.device), drawn_here)
    theirs, scored = _choose_on_host(rows_of(logits, on_host), [sequences[place] for place in on_host], eos_token_ids)
    tokens.index_copy_(0, _sent(on_host, logits.device), theirs)
    return tokens, scored


def rows_of(logits: Tensor, rows: list[int]) -> Tensor:
    """These rows of logits. Indexing by a list would wait for the device."""
    return logits.index_select(0, _sent(rows, logits.device))


def _sent(places: list[int], device: torch.device) -> Tensor:
    return send(np.array(places, dtype=np.int64), device)


def _choose_on_host(
    logits: Tensor, sequences: Rows[Sequence], eos_token_ids: frozenset[int]
) -> tuple[Tensor, dict[Sequence, TokenLogprobs]]:
    # Log-probabilities are of the raw logits: keep those rows, since sampling changes its own.
    raw = {
        sequence: logits[row : row + 1].clone()
        for row, sequence in enumerate(sequences)
        if sequence.request.sampling.logprobs is not None
    }
    tokens = sample(logits, sequences, eos_token_ids)
    scored = {
        sequence: logprobs(raw[sequence], [token], sequence.request.sampling.logprobs or 0)[0]
        for sequence, token in zip(sequences, tokens, strict=True)
        if sequence in raw
    }
    return _sent(tokens, logits.device), scored
