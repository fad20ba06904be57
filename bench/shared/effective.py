"""Which group reads each share of the pairs of dims best: DPE's detection of effective lengths, by any score.

As in arXiv 2504.18857: all shares have one group, twice what the longest prompt needs, and one share at a time has
another. What is best for each share by itself is taken together. A function of scores alone: tasks and losses use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from prerope.rope.spec import RopeSpec

MULTIPLES = (1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 16)
"""Of the common group, that a share is tried with."""


def common_group(length: int, train_length: int) -> int:
    """The least power of two that is at least twice length ÷ trained length."""
    return 1 << max(0, math.ceil(math.log2(2 * length / train_length)))


def tried_groups(common: int) -> list[int]:
    return [group for group in (int(common * multiple) for multiple in MULTIPLES) if group >= 1]


def variant(shares: int, common: int, share: int, group: int) -> RopeSpec:
    groups = [common] * shares
    groups[share] = group
    return RopeSpec(method="dpe", groups=tuple(groups))


def variants(shares: int, common: int) -> list[RopeSpec]:
    """All that `best_groups` asks of, each once."""
    tried = (variant(shares, common, share, group) for share in range(shares) for group in tried_groups(common))
    return list(dict.fromkeys(tried))


def best_groups(shares: int, common: int, score: Callable[[RopeSpec], float]) -> RopeSpec:
    """Of each share the group with the highest score; of equals the nearest to the common one, then the larger."""

    def rank(share: int, group: int) -> tuple[float, float, int]:
        return score(variant(shares, common, share, group)), -abs(math.log2(group / common)), group

    best = (max(tried_groups(common), key=lambda group: rank(share, group)) for share in range(shares))
    return RopeSpec(method="dpe", groups=tuple(best))
