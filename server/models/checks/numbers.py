"""Whether a trial run gives numbers at all: where it does not, weights are at fault, or their dtype, not the type."""

from __future__ import annotations

import torch
from prerope.server.errors import ConfigurationError
from prerope.server.models.checks.trials import Seen
from prerope.server.models.raw_keys import RawKeyModel
from torch import Tensor


def check_numbers(raw: RawKeyModel, base: list[Seen]) -> None:
    """Raises ConfigurationError for keys that are no numbers, for keys of zeros alone, and for windows of no token."""
    names = {module: name for name, module in raw.model.named_modules()}
    for seen in base:
        window = seen.call.sliding_window
        if window is not None and window < 1:
            raise _refused(
                raw,
                f"{names[seen.module]} reads a sliding window of {window} tokens, and the least is 1: correct "
                "sliding_window in config.json, where null is no window",
            )
        if not all(bool(torch.isfinite(part).all()) for part in (seen.query, seen.key, seen.value)):
            raise _refused(
                raw,
                f"{names[seen.module]} meets NaN or infinity on a short prompt. Where DTYPE={_name(raw.model.dtype)} "
                "is narrower than what it was trained in, set DTYPE=bfloat16 or float32; else its weights are damaged: "
                "download them again",
            )
    if base and not any(bool(seen.key.any()) for seen in base):
        raise _refused(
            raw, "all its keys are zeros on a short prompt, so that its weights are damaged: download them again"
        )


def check_logits(raw: RawKeyModel, logits: Tensor) -> None:
    """Raises ConfigurationError where they tell no token from another. logits: [..., V]."""
    if torch.equal(logits, logits[..., :1].expand_as(logits)):
        raise _refused(raw, "its logits are the same for all tokens: its weights are damaged, download them again")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refused(raw: RawKeyModel, reason: str) -> ConfigurationError:
    return ConfigurationError(f"this {raw.family!r} model cannot be served: {reason}")
