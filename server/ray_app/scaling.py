"""How many replicas there are to be: by the prompt tokens that wait, since a long prompt is many short ones.

Ray applies the least and the most, the delays and the means over time. The controller runs it, and knows no more of
this package than this class, which is sent to it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

QUEUED_TOKENS, BUSY = "queued_tokens", "busy"
"""What replicas report: prompt tokens still to be read, and the share of MAX_NUM_SEQS that runs."""

FULL = 0.9


class QueuedTokens:
    """One replica for every `most` tokens, and enough of them that no one's sequences are more than FULL."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        metrics = context.aggregated_metrics or {}
        tokens, busy = (sum(metrics.get(name, {}).values()) for name in (QUEUED_TOKENS, BUSY))
        return max(1, math.ceil(tokens / self._most), math.ceil(busy / FULL)), {}
