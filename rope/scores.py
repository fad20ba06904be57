"""The specification of every method: scores over raw keys in plain fp32 torch, one whole matrix a part.

Each part of a reading gives a score matrix as the papers write it; which one counts is picked by `Part.reads`.
"""

from __future__ import annotations

import torch
from prerope.rope.reading import AngleMap, PositionMethod, Reading
from prerope.rope.rotation import Table, rotate, table
from torch import Tensor


def method_scores(query: Tensor, key: Tensor, method: PositionMethod, start: int = 0, *, first_key: int = 0) -> Tensor:
    """Unscaled scores of rows start, start + 1, …: query [R, H, D] and key [n, H, D], raw fp32 → [H, R, n] fp32.

    The keys are those at first_key, first_key + 1, …

    −inf where a row does not read a key: keys after it, and keys that the method leaves out.
    """
    i = torch.arange(start, start + len(query))
    scale = method.query_scale(i)
    if scale is not None:
        query = query * scale[:, None, None].to(query)
    runs = [
        reading_scores(
            query[a - start : b - start], key, reading, a, first_key=first_key, interleaved=method.rotary.interleaved
        )
        for a, b, reading in method.runs(start, start + len(query))
    ]
    return torch.cat(runs, dim=1)


def reading_scores(
    query: Tensor, key: Tensor, reading: Reading, start: int, *, interleaved: bool, first_key: int = 0
) -> Tensor:
    """The scores of the rows of one run."""
    # Positions and frequencies meet on the CPU in fp64; the tables come back in fp32.
    i, j = torch.arange(start, start + len(query)), torch.arange(first_key, first_key + len(key))
    scores = query.new_full((query.shape[1], len(query), len(key)), float("-inf"))
    for part in reading.parts:
        turned_query = rotate(
            query, _rotation_table(reading, part.query, i, i - start, query.device), interleaved=interleaved
        )
        turned_key = rotate(key, _rotation_table(reading, part.key, j, start - j, key.device), interleaved=interleaved)
        product = torch.einsum("ihd,jhd->hij", turned_query, turned_key)
        scores = torch.where(part.reads(i, j).to(scores.device), product, scores)
    return scores


def _rotation_table(reading: Reading, angles: AngleMap, positions: Tensor, fade: Tensor, device: torch.device) -> Table:
    """cos and sin of [T] positions, times the attention factor, faded by exp(decay·fade).

    Decay meets in the product of query and key alone: any row may be the one from which both fade, and one near them
    keeps exp from overflowing.
    """
    turned = table(angles.angles(positions), reading.attention_factor, device)
    if reading.decay is None:
        return turned
    faded = torch.exp(fade.double()[:, None] * reading.decay).to(device)
    return Table((turned.cos * faded).float(), (turned.sin * faded).float())
