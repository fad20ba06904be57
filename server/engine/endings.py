"""What a new token does to a sequence: it goes on, it has ended, or its grammar cannot follow."""

from __future__ import annotations

from prerope.server.engine.outputs import FinishReason
from prerope.server.engine.sequence import Sequence
from prerope.server.errors import InvalidRequest


def follow_grammar(sequence: Sequence, token_id: int, eos_token_ids: frozenset[int]) -> InvalidRequest | None:
    """Advance the grammar, if there is one; why it cannot go on, where it cannot."""
    matcher = sequence.matcher
    if matcher is None:
        return None
    if token_id not in eos_token_ids:
        matcher.accept(token_id)
    if not matcher.failure:
        return None
    return InvalidRequest(f"the output cannot follow its grammar any further: {matcher.failure}", code="grammar_failed")


def finish_reason(sequence: Sequence, token_id: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
    """After `token_id`, the last that is known; None where it goes on."""
    sampling = sequence.sampling
    if sequence.matcher is not None and (token_id in eos_token_ids or sequence.matcher.finished):
        return FinishReason.STOP
    ends = sampling.stop_token_ids if sampling.ignore_eos else sampling.stop_token_ids | eos_token_ids
    if token_id in ends and sequence.num_generated_tokens >= sampling.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if sequence.num_generated_tokens >= sampling.max_tokens else None
