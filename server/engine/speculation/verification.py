"""Whether drafts come true: the tokens that a sequence has at each of them, in order."""

from __future__ import annotations

from prerope.server.engine.outputs import TokenLogprobs
from prerope.server.engine.sampling.choose import Arrival, choose, needs_host
from prerope.server.engine.sampling.host import uniform
from prerope.server.engine.sampling.mask import MaskWait
from prerope.server.engine.sequence import Sequence
from torch import Tensor


class Verification:
    """The tokens behind the drafts of one sequence, one after the other, as far as they are asked for.

    Each is what a step of its own would have chosen: by the history that it has by then, and with the number that comes
    next from its generator. Where a choice takes no more than logits, all are made at once, and what was drawn for rows
    that nobody asked for is given back.
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
