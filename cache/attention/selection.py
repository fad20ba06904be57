"""Which far keys a row of a reply reads, where not all of them: the specification of selection by blocks.

Keys lie in units of `UNIT` at absolute places. Row i reads the first `SINKS` keys, the units of its window (the nearest
`WINDOW` keys, and what stands before them in their unit), and of the *far* units between those the `count` with the
highest scores, each KV head its own. Read keys are turned as the position method turns them: selection leaves keys
out, and moves none.

A unit's score says how large a raw product q·k in it may be, from the smallest and the largest value of each dim of its
raw keys (Quest, arXiv 2406.10774), whose bounds no position method changes:

    score(q, unit) = max over the query heads of the KV head of  Σ_d max(q_d · low_d, q_d · high_d)

Rows of a prompt read everything. So what a row reads depends on its query, the keys before it, its place and where the
prompt ends; never on chunks, prefix hits, preemption or neighbours.
"""

from __future__ import annotations

import torch
from prerope.rope.reading import UNBOUNDED
from torch import Tensor

UNIT = 16
"""Keys that are read or left out together; of kernels/c/attend.h, too."""
SINKS, WINDOW = 64, 1024
"""The first and the nearest keys, which a row reads anyway."""


def units_of(tokens: int) -> int:
    """How many units hold so many far tokens."""
    return -(-tokens // UNIT)


def far_units(position: int) -> tuple[int, int]:
    """[first, stop): the units that the row at this position may leave out."""
    return SINKS // UNIT, max(SINKS, position - WINDOW + 1) // UNIT


def selects_from(tokens: int | None, num_prompt_tokens: int) -> int:
    """The first row of a reply that leaves anything out, where it may read so many far tokens; None: all of them."""
    if tokens is None:
        return UNBOUNDED
    return max(num_prompt_tokens, SINKS + UNIT * (units_of(tokens) + 1) + WINDOW - 1)


def unit_scores(query: Tensor, key: Tensor) -> Tensor:
    """Scores of units for one row: query [Hq, D] and keys [n, Hkv, D] of whole units, raw fp32 → [Hkv, n / UNIT]."""
    units = key.view(-1, UNIT, *key.shape[1:])
    low, high = units.amin(1), units.amax(1)
    groups = query.view(key.shape[1], -1, key.shape[2])
    products = (torch.einsum("hgd,uhd->hgu", groups.clamp(max=0), low)) + (
        torch.einsum("hgd,uhd->hgu", groups.clamp(min=0), high)
    )
    return products.amax(1)


def selected_keys(query: Tensor, key: Tensor, position: int, tokens: int) -> Tensor:
    """Which keys one row reads: query [Hq, D] and the keys [n, Hkv, D] 0 … n − 1 → [Hkv, n] bool."""
    first, stop = far_units(position)
    read = torch.ones(key.shape[1], len(key), dtype=torch.bool, device=key.device)
    if stop - first <= units_of(tokens):
        return read
    scores = unit_scores(query, key[first * UNIT : stop * UNIT])
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, : units_of(tokens)]  # ties: the first
    far = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
    read[:, first * UNIT : stop * UNIT] = far.repeat_interleave(UNIT, dim=1)
    return read
