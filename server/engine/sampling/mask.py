"""Constrained output as the engine knows it: which token ids may come next. No text, no grammar library.

    Grammar ─ matcher() ─ Matcher, one a sequence ─ mask() before each draw ─ accept() after it ─ finished

Only sampled tokens advance a matcher: a preempted sequence is computed again, and its matcher stays where it was.
A mask may take longer than a step. It is computed beside the steps, and a row whose mask is late is left out of them.
How a grammar meets the other parameters: bias and penalties come first, and what is forbidden stays forbidden;
temperature, top-k, top-p and min-p choose among what is allowed. End-of-sequence is allowed exactly where the grammar
accepts. `min_tokens` and `ignore_eos` put the end off while another token is allowed, and no longer. Stop ids end a
sequence as ever, where the grammar allows them at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from prerope.server.errors import InvalidRequest
from torch import Tensor

if TYPE_CHECKING:
    from prerope.server.engine.sequence import Sequence


MASK_WAIT_S = 0.005
"""How long a step waits for masks, all of its rows together; rows that are late stay out of the step."""

IDLE_WAIT_S = 0.05
"""How long a step waits for masks where no other row can run. Commands to the engine wait so long, too."""


class Matcher(Protocol):
    """How far one sequence has come in its grammar. Raises nothing: what goes wrong is in `failure`."""

    @property
    def begun(self) -> bool:
        """Whether its next mask is being computed, or there."""

    @property
    def ready(self) -> Future[bytes]:
        """Done when `mask` need not wait; begins it."""

    def mask(self) -> bytes:
        """A bit for each token id, lowest first, set where it may come next. Ids past the end may not.

        What it says of end-of-sequence ids does not count: `accepting` does.
        """

    def accept(self, token_id: int) -> None:
        """Take in a sampled token, end-of-sequence excepted."""

    @property
    def accepting(self) -> bool:
        """What was accepted so far is complete, though more may follow."""

    @property
    def finished(self) -> bool:
        """It is complete, and nothing can follow."""

    @property
    def failure(self) -> str:
        """Why it cannot go on (a limit of the grammar library); empty while it can."""


def advance(matcher: Matcher, token_id: int, eos_token_ids: frozenset[int]) -> InvalidRequest | None:
    """Take a sampled token into a sequence's grammar; why its output cannot go on, where it cannot."""
    if token_id not in eos_token_ids:
        matcher.accept(token_id)
    if not matcher.failure:
        return None
    return InvalidRequest(f"the output cannot follow its grammar any further: {matcher.failure}", code="grammar_failed")


class Grammar(Protocol):
    """A compiled grammar, shared by sequences."""

    def matcher(self) -> Matcher:
        """A new one, at the beginning."""


def wait_for_masks(sequences: Iterable[Sequence]) -> None:
    """Give masks that are being computed a moment, before a step is scheduled: other rows do not wait for slow ones."""
    late, others = [], False
    for sequence in sequences:
        matcher = sequence.matcher
        if matcher is not None and matcher.begun and not matcher.ready.done():
            late.append(matcher.ready)
        else:
            others = True
    if late and not wait(late, MASK_WAIT_S).done and not others:
        wait(late, IDLE_WAIT_S, FIRST_COMPLETED)


class MaskWait:
    """`MASK_WAIT_S`, for all drafts of a step together."""

    def __init__(self) -> None:
        self._left_s = MASK_WAIT_S

    def ready(self, sequence: Sequence) -> bool:
        """Whether it is known what may come next, now or within what is left."""
        matcher = sequence.matcher
        if matcher is None or matcher.ready.done():
            return True
        began = time.monotonic()
        done = bool(wait([matcher.ready], max(0.0, self._left_s)).done)
        self._left_s -= time.monotonic() - began
        return done


def constrain(logits: Tensor, sequences: Rows[Sequence], eos_token_ids: frozenset[int]) -> None:
    """Put −inf where a sequence's grammar forbids the token; logits [N, V], one row a sequence, in place.

    The model may have more logits than the tokenizer has tokens: those are forbidden.
    """
    rows = [index for index, sequence in enumerate(sequences) if sequence.matcher is not None]
    if not rows:
        return
    size = logits.shape[1]
    packed = np.stack([allowed(sequences[row], size, eos_token_ids) for row in rows])
    bits = np.unpackbits(~packed, axis=1, count=size, bitorder="little").view(np.bool_)
    for row, forbidden in zip(rows, torch.from_numpy(bits).to(logits.device), strict=True):
        logits[row].masked_fill_(forbidden, float("-inf"))


def allowed(sequence: Sequence, vocab_size: int, eos_token_ids: frozenset[int]) -> NDArray[np.uint8]:
    """The tokens that may come next, as bits [⌈V/8⌉], lowest first."""
    matcher, sampling = sequence.matcher, sequence.sampling
    assert matcher is not None
    bits = np.zeros(-(-vocab_size // 8), dtype=np.uint8)
    mask = np.frombuffer(matcher.mask(), dtype=np.uint8)[: bits.shape[0]]
    bits[: mask.shape[0]] = mask
    _clear(bits, eos_token_ids)
    early = sequence.num_output_tokens < sampling.min_tokens
    if early or sampling.ignore_eos:
        going_on = bits.copy()
        _clear(going_on, sampling.stop_token_ids if early else ())
        if going_on.any():
            return going_on
    if matcher.accepting:
        for end in eos_token_ids:
            if end < vocab_size:
                bits[end >> 3] |= 1 << (end & 7)
    return bits


def _clear(bits: NDArray[np.uint8], token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        if token_id >> 3 < bits.shape[0]:
            bits[token_id >> 3] &= 0xFF ^ (1 << (token_id & 7))
