"""The policy that fairness is measured against, and the bound that the product's own keeps; see `bench.fairness`.

FIFO prefill is what a chunked-prefill scheduler does that orders prompts by arrival alone: the oldest gets the whole
budget, and the next what is left once it is done. It exists here only, and is no option of the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from prerope.server.engine import engine
from prerope.server.engine.scheduler import OLDEST_SHARE, Scheduler
from prerope.server.engine.step import Scheduled

POLICIES = ("ours", "fifo")


class FifoScheduler(Scheduler):
    """Decodes first, as in the product; then prefills strictly in order of arrival."""

    def _schedule_prefills(self, budget: int, plan: list[Scheduled]) -> None:
        if budget <= 0:
            return
        for sequence in sorted((s for s in self.running.values() if not s.decoding), key=lambda s: s.rank):
            num_tokens = min(sequence.num_remaining_tokens, budget)
            known = sequence.num_computed_tokens
            if num_tokens and sequence.request_id in self.running and self._grow(sequence, known + num_tokens, plan):
                plan.append(Scheduled.of(sequence, num_tokens, known))
                budget -= num_tokens


@contextmanager
def scheduling(policy: str) -> Iterator[None]:
    """Engines made within the block have this policy's scheduler; "ours" changes nothing."""
    if policy not in POLICIES:
        raise ValueError(f"there is no policy {policy!r}; only {', '.join(POLICIES)}")
    if policy == "ours":
        yield
        return
    with patch.object(engine, "Scheduler", FifoScheduler):
        yield


def most_steps(budget: int, num_decodes: int, num_short_tokens: int) -> int:
    """Steps from a short request's arrival to its first token, at most, the step that runs when it comes included.

    budget: tokens of a step, B. num_decodes: running streams, D. num_short_tokens: of all prompts that are not longer
    than what is left of it, its own included, n: those are served before it. Each step leaves B − D − ⌊(B − D) ÷ 4⌋
    tokens to them. This supposes that the request is admitted at once: the cache has room, and no more than
    MAX_NUM_SEQS run.
    """
    left = budget - num_decodes
    share = left - max(1, left // OLDEST_SHARE)
    if share < 1:
        raise ValueError(f"a budget of {budget} tokens leaves nothing to prefill beside {num_decodes} decodes")
    return 1 + -(-num_short_tokens // share)
