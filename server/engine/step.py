"""One step on its way: what was launched, the tokens that it samples, and when these have come.

Nothing here waits for the device but what is chosen on the host. The sequences of a step may finish, be aborted or be
preempted before it is collected. Their blocks are free at once all the same: the device runs
steps in their order, so whoever gets a block next writes to it only after this step has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from prerope.cache.blocks.manager import BlockTable
from prerope.cache.blocks.states import StateRows
from prerope.server.engine.outputs import TokenLogprobs
from prerope.server.engine.sampling.choose import Arrival, choose, rows_of
from prerope.server.engine.sampling.host import score_prompt
from prerope.server.engine.sampling.mask import MaskWait
from prerope.server.engine.sequence import Sequence
from prerope.server.engine.speculation.verification import Verification
from prerope.server.models.batch import Chunk
from torch import Tensor


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

    def with_drafts(self, block_size: int) -> Chunk:
        """The sequence's token and its drafts as one chunk."""
        own, last = self.chunk(block_size), self.stop + len(self.drafts)
        return replace(
            own,
            token_ids=[*own.token_ids, *self.drafts],
            block_table=self.block_table.head(-(-last // block_size)),
            num_logits=1 + len(self.drafts),
        )

    def one_by_one(self, block_size: int) -> list[Chunk]:
        """The sequence's token and its drafts as single rows, as if each came alone."""
        own = self.chunk(block_size)
        behind = [
            replace(
                own,
                token_ids=[draft],
                start=place,
                block_table=self.block_table.head(place // block_size + 1),
                num_logits=1,
                pending_place=None,
                state=None,
            )
            for place, draft in enumerate(self.drafts, self.stop)
        ]
        return [own, *behind]

    def chunk(self, block_size: int) -> Chunk:
        """The chunk that the model's forward is given, without drafts."""
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
            sequence.selects_from,
        )


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
    def num_rows(self) -> int:
        return sum([one.num_rows for one in self.scheduled])

    @property
    def num_prefilled(self) -> int:
        return sum([one.num_new_tokens for one in self.scheduled if one.num_new_tokens > 1])


def chunks_of(plan: list[Scheduled], block_size: int, *, single: bool) -> list[Chunk]:
    """What the model's forward is given of a step.

    single: drafts are single rows, which graphs want; else a chunk with the token before them, whose keys are turned
    once. The results are the same.
    """
    chunks: list[Chunk] = []
    for one in plan:
        if not one.drafts:
            chunks.append(one.chunk(block_size))
        else:
            chunks += one.one_by_one(block_size) if single else [one.with_drafts(block_size)]
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
