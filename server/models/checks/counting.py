"""Whether a model counts its rows itself, from the first of a forward on, and lets queries or keys depend on it.

transformers' own forward then agrees with ours on any prompt that a check can afford, since both count alike; a chunk
that begins later is read wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
from prerope.server.models.checks.trials import Seen, mixed, probe_ids, run_trial
from prerope.server.models.raw_keys import RawKeyModel
from torch.overrides import TorchFunctionMode

FAR = 2**20
PARTS = ("query", "key", "value")


def counts_positions(raw: RawKeyModel, base: list[Seen]) -> bool:
    """Whether queries, keys or values change where counted rows begin far beyond what any config names.

    Such as a scale of scores that grows with the number of a row (Llama 4). No prompt of a trial is long enough to
    show it. Counts of `PROBE_LENGTH` may be of something else, so those of another number of rows decide.
    """
    return _changes_where_counted(raw, base) and _changes_where_counted(raw, None)


def _changes_where_counted(raw: RawKeyModel, base: list[Seen] | None) -> bool:
    ids = probe_ids(raw.text_config.vocab_size, raw.model.device)
    ids = ids if base else ids[:-1]
    positions = torch.arange(len(ids))
    base = base or run_trial(raw, {}, ids, positions)
    try:
        with _CountedFrom(FAR, len(ids)):
            far = run_trial(raw, {}, ids, positions)
    except (IndexError, RuntimeError):  # it was an index
        return False
    pairs = [(getattr(was, part), getattr(now, part)) for was, now in zip(base, far, strict=True) for part in PARTS]
    return any(mixed(was, now) for was, now in pairs)


@torch.inference_mode()
def counts_from_zero(raw: RawKeyModel) -> bool:
    """Whether transformers' own forward is the same given positions 0, 1, … and given none, as people run it."""
    vocab, padding = raw.text_config.vocab_size, getattr(raw.text_config, "pad_token_id", None)
    ids = probe_ids(vocab, raw.model.device)
    ids[ids == padding] = 1 if padding == 0 else 0  # some count those that are not padding
    with raw.stock():
        given, none = (
            raw.model(input_ids=ids[None], use_cache=False, **options).logits
            for options in ({"position_ids": torch.arange(len(ids), device=ids.device)[None]}, {})
        )
    return not mixed(given, none)


class _CountedFrom(TorchFunctionMode):
    """Inside, `torch.arange` of `count` numbers begins at another one."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self._first, self._count = first, count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result + self._first if func is torch.arange and result.shape == (self._count,) else result
