"""Which keys a layer lets its rows read, by transformers' own rule for it: all before a row, or a window of them."""

from __future__ import annotations

import torch
from prerope.rope.reading import UNBOUNDED
from prerope.server.models.attention.interface import HERE, NOT_HERE, WINDOW_BY_MASK
from prerope.server.models.checks.trials import PROBE_LENGTH, Seen, named_lengths
from prerope.server.models.raw_keys import RawKeyModel, cannot_serve
from torch import Tensor


def check_mask(raw: RawKeyModel, seen: Seen) -> None:
    """Refuse a layer that reads other keys than ours: all before a row, or a window of them.

    transformers' rule for it is asked at the edges of every length that the config names. A layer whose window is in
    that rule alone gets it from here on.
    """
    if seen.call.mask is None:
        return
    row, key = _edge_pairs(raw)
    device = seen.key.device
    try:
        theirs = seen.call.mask.reads(row.to(device), key.to(device)).cpu()
    except IndexError:  # a rule that also looks at the prompt, such as one for the blocks of images in it
        inside = row < PROBE_LENGTH
        row, key = row[inside], key[inside]
        theirs = seen.call.mask.reads(row.to(device), key.to(device)).cpu()
    causal, window = key <= row, seen.call.sliding_window
    ours = causal & (row - key < (UNBOUNDED if window is None else window))
    if torch.equal(ours, theirs):
        return
    named = getattr(raw.text_config, "sliding_window", None)
    if window is None and isinstance(named, int) and torch.equal(causal & (row - key < named), theirs):
        vars(seen.module).update({"sliding_window": named, WINDOW_BY_MASK: True})  # the probe shrinks the first
        return
    chunk = getattr(raw.text_config, "attention_chunk_size", None)
    if isinstance(chunk, int) and torch.equal(causal & (row // chunk == key // chunk), theirs):
        raise cannot_serve(
            raw, f"some of its layers attend inside chunks of {chunk} tokens, a token in its own alone, {HERE}"
        )
    place = int((ours != theirs).nonzero()[0])
    if key[place] > row[place]:
        raise cannot_serve(raw, NOT_HERE["is_causal"])
    verb = "reads" if theirs[place] else "does not read"
    raise cannot_serve(
        raw,
        f"row {int(row[place])} of a layer {verb} key {int(key[place])}, so which keys it reads is neither all "
        "before it nor a sliding window",
    )


def _edge_pairs(raw: RawKeyModel) -> tuple[Tensor, Tensor]:
    """Rows and keys on both sides of every length that the config names, and far beyond: [n] each."""
    edges = {0, *(length + step for length in named_lengths(raw) for step in (-1, 0, 1))}
    rows = torch.tensor(sorted(edges | {2 * max(edges), 4 * max(edges)}))
    shifts = torch.tensor(sorted({-1, 0, 1, *edges}))
    row = rows.repeat_interleave(len(shifts))
    key = row - shifts.repeat(len(rows))
    return row[key >= 0], key[key >= 0]
