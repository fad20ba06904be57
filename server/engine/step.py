"""One step on its way: what was launched, the tokens that it samples, and when these have come.

Nothing here waits for the device but `Arrival.wait`, and what is chosen on the host. The sequences of a step may
finish, be aborted or be preempted before it is collected. Their blocks are free at once all the same: the device runs
steps in their order, so whoever gets a block next writes to it only after this step has.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from prerope.cache.blocks.manager import BlockTable
from prerope.cache.blocks.states import StateRows
from prerope.cache.cuda.transfer import send
from prerope.server.engine.outputs import TokenLogprobs
from prerope.server.engine.sampling.device import sample_on_device
from prerope.server.engine.sampling.host import logprobs, sample, score_prompt
from prerope.server.engine.sequence import Sequence
from prerope.server.models.batch import Chunk
from torch import Tensor


class Scheduled(NamedTuple):
    """Tokens `start` … `stop` − 1 of a sequence that one step computes.

    Attributes:
        samples: whether the step samples the token after them.
        block_table: the blocks of the sequence when it was scheduled, which reach as far as `stop`.
        state: the slots of its state, where layers keep one.
    """

    sequence: Sequence
    num_new_tokens: int
    start: int
    num_logits: int
    samples: bool
    block_table: BlockTable
    state: StateRows | None = None

    @classmethod
    def of(cls, sequence: Sequence, num_new_tokens: int, start: int) -> Scheduled:
        """Of a sequence as it is before the launch, its blocks allocated."""
        num_tokens = len(sequence.token_ids)
        num_output_tokens = num_tokens - sequence.num_prompt_tokens
        samples = start + num_new_tokens == num_tokens and num_output_tokens < sequence.request.sampling.max_tokens
        num_logits = sequence.num_logits(start, num_new_tokens)
        return cls(sequence, num_new_tokens, start, num_logits, samples, sequence.block_table)

    @property
    def stop(self) -> int:
        return self.start + self.num_new_tokens

    @property
    def cached(self) -> bool:
        """Whether the sequence still has the K and V that the step computed for it: it was not preempted since."""
        return self.sequence.block_table is self.block_table

    def chunk(self, block_size: int) -> Chunk:
        """What the model's forward is given of it."""
        sequence, stop = self.sequence, self.start + self.num_new_tokens
        pending = sequence.num_pending > 0 and stop == len(sequence.token_ids)
        return Chunk(
            sequence.token_ids[self.start : stop],
            self.start,
            self.block_table.head(-(-stop // block_size)),
            sequence.positions,
            self.num_logits,
            sequence.pending_place if pending else None,
            self.state,
        )


class Arrival:
    """Token ids [N] int64 on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self._host = tokens
        self._event: torch.cuda.Event | None = None
        if tokens.device.type == "cuda":
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tokens.device))

    def wait(self) -> list[int]:
        """Until they are here, and all that was launched before them has run."""
        if self._event is not None:
            self._event.synchronize()
        ids: list[int] = self._host.tolist()
        return ids


@dataclass(frozen=True, slots=True)
class Step:
    """What was launched at `began`, in seconds of `time.monotonic()`.

    Attributes:
        arrival: a token for each that samples, in their order.
        scored: log-probabilities of those that asked for them.
        may_stay: the next step may be launched before the tokens of this one are known.
    """

    scheduled: list[Scheduled]
    arrival: Arrival
    scored: dict[Sequence, TokenLogprobs]
    may_stay: bool
    began: float

    @property
    def num_prefilled(self) -> int:
        return sum([one.num_new_tokens for one in self.scheduled if one.num_new_tokens > 1])


def finish_launch(
    scheduled: list[Scheduled], logits: Tensor, eos_token_ids: frozenset[int], *, on_device: bool, began: float
) -> Step:
    """After the forward: sample, and let each sequence be where the step will leave it.

    logits [N, V] fp32, rows in the order of `scheduled`; may be changed. on_device: sample there what need not be on
    the host.
    """
    sampled, rows, row, may_stay = [], [], 0, True
    for one in scheduled:
        sequence = one.sequence
        row += one.num_logits
        if one.num_logits and sequence.chosen_on_host:
            may_stay = False
        if sequence.request.sampling.prompt_logprobs is not None:
            score_prompt(sequence, one.start + one.num_new_tokens - one.num_logits, logits[row - one.num_logits : row])
        if one.samples:
            rows.append(row - 1)
            sampled.append(sequence)
    chosen = logits if len(rows) == row else rows_of(logits, rows)
    tokens, scored = choose(chosen, sampled, eos_token_ids, on_device=on_device)
    for one in scheduled:
        one.sequence.num_computed_tokens = one.start + one.num_new_tokens
    for place, sequence in enumerate(sampled):
        sequence.expect(place)
    return Step(scheduled, Arrival(tokens), scored, may_stay, began)


def choose(
    logits: Tensor, sequences: Rows[Sequence], eos_token_ids: frozenset[int], *, on_device: bool
) -> tuple[Tensor, dict[Sequence, TokenLogprobs]]:
    """(token ids [N] int64, log-probabilities asked for) of logits [N, V] fp32, one row a sequence; may be changed."""
    # Where a row is sampled is its own affair: a seeded request does not see its neighbours.
    on_host, rest, greedy = [], [], True
    for place, sequence in enumerate(sequences):
        drawn = sequence.request.sampling.temperature > 0
        if sequence.chosen_on_host or (drawn and not on_device):
            on_host.append(place)
        else:
            rest.append(place)
            greedy = greedy and not drawn
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
        if sequence.sampling.logprobs is not None
    }
    tokens = sample(logits, sequences, eos_token_ids)
    scored = {
        sequence: logprobs(raw[sequence], [token], sequence.sampling.logprobs or 0)[0]
        for sequence, token in zip(sequences, tokens, strict=True)
        if sequence in raw
    }
    return _sent(tokens, logits.device), scored
