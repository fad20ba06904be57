"""One step on its way: what was launched, the tokens that are chosen from its logits, and when these have come.

    Scheduled ─ chunks_of ─ forward ─ finish_launch: choose, Verification of drafts ─ Step ─ Arrival: ids on the host

A token is chosen where that is best, with the logits or on the host; where is its own affair, and a seeded request does
not see its neighbours. Nothing here waits for the device but what is chosen on the host. The sequences of a step may
finish, be aborted or be preempted before it is collected. Their blocks are free at once all the same: the device runs
steps in their order, so whoever gets a block next writes to it only after this step has.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from prerope.cache.blocks.manager import BlockTable
from prerope.cache.blocks.states import StateRows
from prerope.cache.transfer import bring_back, send
from prerope.server.engine.outputs import TokenLogprobs
from prerope.server.engine.sampling.device import sample_on_device
from prerope.server.engine.sampling.host import logprobs, sample, score_prompt, uniform
from prerope.server.engine.sampling.mask import MaskWait
from prerope.server.engine.sequence import Sequence
from prerope.server.models.model import Chunk
from torch import Tensor


class Arrival:
    """Token ids [N] int64 on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self._host: Tensor = tokens
        self._whole: Callable[[], None] | None = None
        if tokens.device.type != "cpu":
            self._host, self._whole = bring_back(tokens)

    def wait(self) -> list[int]:
        """The ids, once they are here: all that was launched before them has run by then."""
        if self._whole is not None:
            self._whole()
        ids: list[int] = self._host.tolist()
        return ids


def needs_host(sequence: Sequence, *, on_device: bool) -> bool:
    """Whether a token is chosen on the host; on_device: draws that need nothing else are made where the logits are."""
    return sequence.chosen_on_host or (not sequence.request.sampling.greedy and not on_device)


def choose(
    logits: Tensor, sequences: Several[Sequence], eos_token_ids: frozenset[int], *, on_device: bool
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
    logits: Tensor, sequences: Several[Sequence], eos_token_ids: frozenset[int]
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


class Verification:
    """The tokens behind the drafts of one sequence, one after the other, as far as they are asked for.

    Each is what a step of its own would have chosen: by the history that it has by then, and with its generator's next
    number. Where a choice takes no more than logits, all are made at once; what was drawn in vain is given back.
    """

    def __init__(
        self, sequence: Sequence, logits: Tensor, eos_token_ids: frozenset[int], masks: MaskWait, *, on_device: bool
    ) -> None:
        """logits [K, V] fp32 of the rows of the drafts; may be changed. masks: of the step."""
        self._sequence, self._logits, self._ends = sequence, logits, eos_token_ids
        self._masks, self._on_device = masks, on_device
        self._chosen: Arrival | None = None
        self._generator_before: Tensor | None = None
        self._num_asked = 0

    def begin(self) -> None:
        """After the row before them was drawn."""
        sequence = self._sequence
        if needs_host(sequence, on_device=self._on_device):
            return
        if sequence.generator is not None and not sequence.sampling.greedy:
            self._generator_before = sequence.generator.get_state()
        same = [sequence] * len(self._logits)
        self._chosen = Arrival(choose(self._logits, same, self._ends, on_device=self._on_device)[0])

    def next(self) -> tuple[int, TokenLogprobs | None] | None:
        """The token behind the next draft, which came true; None where its mask is late."""
        number, sequence = self._num_asked, self._sequence
        self._num_asked += 1
        if self._chosen is not None:
            return self._chosen.wait()[number], None
        if not self._masks.ready(sequence):
            return None
        tokens, scored = choose(self._logits[number : number + 1], [sequence], self._ends, on_device=self._on_device)
        return int(tokens), scored.get(sequence)

    def end(self) -> None:
        """Nothing more is asked for."""
        generator = self._sequence.generator
        if generator is not None and self._generator_before is not None and self._num_asked < len(self._logits):
            generator.set_state(self._generator_before)
            for _ in range(self._num_asked):
                uniform(generator)


class Scheduled(NamedTuple):
    """Tokens `start` … `stop` − 1 of a sequence that one step computes.

    Attributes:
        samples: whether the step samples the token after them.
        block_table: the blocks of the sequence when it was scheduled, which reach as far as its last row.
        state: the slots of its state, where layers keep one.
        drafts: what may follow the token at `stop` − 1, a row each: its logits count where the drafts come true.
        awaited: there will be drafts as soon as its token is known.
    """

    sequence: Sequence
    num_new_tokens: int
    start: int
    num_logits: int
    samples: bool
    block_table: BlockTable
    state: StateRows | None = None
    drafts: tuple[int, ...] = ()
    awaited: bool = False

    @classmethod
    def of(cls, sequence: Sequence, num_new_tokens: int, start: int) -> Scheduled:
        """The next `num_new_tokens` of a sequence as it is before the launch, its blocks allocated."""
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

    @property
    def num_rows(self) -> int:
        """Rows of the step, drafts included."""
        return self.num_new_tokens + len(self.drafts)

    def behind(self, number: int) -> Scheduled:
        """The row of draft `number`, which came true, as if a step had been scheduled for it."""
        return self._replace(start=self.stop + number, num_new_tokens=1, num_logits=1, samples=True, drafts=())

    def with_drafts(self, block_size: int, first: int) -> Chunk:
        """The sequence's token and its drafts as one chunk, from packed row `first` on."""
        own, stop = self.chunk(block_size, first), self.stop + len(self.drafts)
        return replace(
            own,
            count=own.count + len(self.drafts),
            token_ids=[*own.token_ids, *self.drafts],
            block_table=self._blocks(stop, block_size),
            num_logits=1 + len(self.drafts),
        )

    def one_by_one(self, block_size: int, first: int) -> list[Chunk]:
        """The sequence's token and its drafts as single rows, as if each came alone, from packed row `first` on."""
        own = self.chunk(block_size, first)
        behind = [
            replace(
                own,
                first=first + own.count + number,
                count=1,
                token_ids=[draft],
                start=self.stop + number,
                block_table=self._blocks(self.stop + number + 1, block_size),
                num_logits=1,
                pending_place=None,
                state=None,
            )
            for number, draft in enumerate(self.drafts)
        ]
        return [own, *behind]

    def _blocks(self, stop: int, block_size: int) -> Tensor:
        return torch.from_numpy(self.block_table.head(-(-stop // block_size)))

    def chunk(self, block_size: int, first: int = 0) -> Chunk:
        """The chunk that the model's forward is given, without drafts; `first`: its packed row."""
        sequence, stop = self.sequence, self.start + self.num_new_tokens
        pending = sequence.num_pending > 0 and stop == len(sequence.token_ids)
        return Chunk(
            first,
            self.num_new_tokens,
            self.start,
            self._blocks(stop, block_size),
            sequence.positions,
            sequence.selects_from,
            token_ids=sequence.token_ids[self.start : stop],
            num_logits=self.num_logits,
            pending_place=sequence.pending_place if pending else None,
            state=self.state,
        )


class Rows(NamedTuple):
    """How many rows a step has: all, those of prompts, of these the scored ones; and how many keys are before one's."""

    num_all: int
    num_prefilled: int = 0
    num_scored: int = 0
    num_keys: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """What was launched at `began`, in seconds of `time.monotonic()`.

    Attributes:
        cpu_began: the same in CPU time of this thread; None where that is not what a step takes.
        arrival: a token for each that samples, in their order.
        scored: log-probabilities of those that asked for them.
        verifications: of those with drafts.
        may_stay: the next step may be launched before the tokens of this one are known.
    """

    scheduled: list[Scheduled]
    arrival: Arrival
    scored: dict[Sequence, TokenLogprobs]
    verifications: dict[Sequence, Verification]
    may_stay: bool
    began: float
    cpu_began: float | None

    @property
    def rows(self) -> Rows:
        prompts = [s for s in self.scheduled if s.num_new_tokens > 1 or s.start < s.sequence.num_prompt_tokens]
        scored = [one.num_logits for one in prompts if one.sequence.request.sampling.prompt_logprobs is not None]
        num_all, num_read = sum([one.num_rows for one in self.scheduled]), sum([one.num_new_tokens for one in prompts])
        return Rows(num_all, num_read, sum(scored), max([one.start for one in prompts], default=0))


def chunks_of(plan: list[Scheduled], block_size: int, *, single: bool) -> list[Chunk]:
    """What the model's forward is given of a step.

    single: drafts are single rows, which graphs want; else a chunk with the token before them, whose keys are turned
    once. The results are the same.
    """
    chunks: list[Chunk] = []
    first = 0
    for one in plan:
        if not one.drafts:
            chunks.append(one.chunk(block_size, first))
        else:
            chunks += one.one_by_one(block_size, first) if single else [one.with_drafts(block_size, first)]
        first += one.num_rows
    return chunks


def finish_launch(
    scheduled: list[Scheduled],
    logits: Tensor,
    eos_token_ids: frozenset[int],
    *,
    on_device: bool,
    began: float,
    cpu_began: float | None,
) -> Step:
    """After the forward: sample, and let each sequence be where the step will leave it.

    logits [N, V] fp32, rows in the order of `scheduled`; may be changed. on_device: sample there what need not be on
    the host.
    """
    sampled, rows, row, may_stay = [], [], 0, True
    verifications: dict[Sequence, Verification] = {}
    masks: MaskWait | None = None
    for one in scheduled:
        sequence = one.sequence
        row += one.num_logits
        if one.drafts or one.awaited or (one.num_logits and sequence.chosen_on_host):
            may_stay = False
        if sequence.request.sampling.prompt_logprobs is not None:
            score_prompt(sequence, one.start + one.num_new_tokens - one.num_logits, logits[row - one.num_logits : row])
        if one.samples:
            rows.append(row - 1)
            sampled.append(sequence)
        if one.drafts:
            behind, masks = logits[row : row + len(one.drafts)], masks or MaskWait()
            verifications[sequence] = Verification(sequence, behind, eos_token_ids, masks, on_device=on_device)
            sequence.num_drafted += len(one.drafts)
            row += len(one.drafts)
    chosen = logits if len(rows) == row else rows_of(logits, rows)
    tokens, scored = choose(chosen, sampled, eos_token_ids, on_device=on_device)
    for verification in verifications.values():
        verification.begin()
    _move_on(scheduled, sampled)
    return Step(scheduled, Arrival(tokens), scored, verifications, may_stay, began, cpu_began)


def _move_on(scheduled: list[Scheduled], sampled: list[Sequence]) -> None:
    """Advance each sequence to where the step leaves it; the sampled token is still to come."""
    for one in scheduled:
        one.sequence.num_computed_tokens = one.stop
    for place, sequence in enumerate(sampled):
        sequence.expect(place)
