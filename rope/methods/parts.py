"""What windowed methods are made of: the model's own reading, two parts that meet at a window, and their parameters.

A parameter that cannot be used raises MethodError, with the variable, its value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from prerope.rope.reading import AngleMap, MethodError, Part, Reading, everywhere, plain_reading
from prerope.rope.registry import Target, own_rule
from prerope.rope.spec import MAX_GROUP
from torch import Tensor


def leaky_reading(own: Reading, window: int, theta_far: Tensor) -> Reading:
    """Far queries at (i−w)·θ_far + w·θ, which meets the near part at d = w, far keys at j·θ_far."""
    far_query = AngleMap(theta_far, offset=window * own.theta - window * theta_far)
    return two_parts(own, window, far_query, AngleMap(theta_far))


def two_parts(own: Reading, window: int, far_query: AngleMap, far_key: AngleMap) -> Reading:
    near = own.parts[0].key  # the same object in every run, so that its tables are made once
    return Reading((Part(near, near, d_max=window), Part(far_query, far_key, d_min=window)), own.attention_factor)


def constant(own: Reading, offset: int = 0) -> AngleMap:
    """One angle for all positions: that of position `offset`."""
    return AngleMap(torch.zeros_like(own.theta), offset=offset * own.theta if offset else None)


def own_reading(t: Target) -> Reading:
    """The model's own frequencies, as its config has them."""
    own = own_rule(t.rotary, t.train_length)
    if own.run_end is not everywhere:
        raise MethodError(
            f"{t.spec.method} cannot be laid over the model's own {t.rotary.rope_type} frequencies, which depend on "
            "the length; use ROPE_METHOD=model, or a frequency method such as yarn"
        )
    reading = own.reading(t.train_length)
    return plain_reading(reading.theta, reading.attention_factor)


def window_of(t: Target, default: int | None = None) -> int:
    """The window that was asked for, else the default, else a quarter of the trained length."""
    given = t.spec.window if default is None or t.spec.window is not None else default
    window = t.train_length // 4 if given is None else given
    if not 0 < window < t.train_length:
        raise MethodError(
            f"window (ROPE_WINDOW) is {window}: it must be between 1 and {t.train_length - 1}, one less than the "
            f"trained length; {t.train_length // 4} to {t.train_length // 2} reads best"
        )
    return window


def window_warning(window: int, t: Target) -> str | None:
    if window <= t.train_length // 2:
        return None
    return (
        f"window (ROPE_WINDOW) {window} is more than half the trained length {t.train_length}: large distances are "
        f"seen too rarely in training; {t.train_length // 4} to {t.train_length // 2} is best"
    )


def group_of(t: Target, default: Callable[[], int]) -> int:
    group = default() if t.spec.group is None else t.spec.group
    if group < 1:
        raise MethodError(f"group (ROPE_GROUP) is {group}: it must be at least 1, the tokens that share a position")
    return group


def groups_of(t: Target, window: int, pairs: int) -> tuple[int, ...]:
    """Those that were asked for, else for all pairs the smallest power of two that fits."""
    groups = t.spec.groups
    if groups is None:
        return (1 << (fitting_group(window, t) - 1).bit_length(),)
    if not 1 <= len(groups) <= pairs:
        raise MethodError(f"groups (ROPE_GROUPS) are {len(groups)}: there must be 1 to {pairs}, the pairs that turn")
    for group in groups:
        if not 1 <= group <= MAX_GROUP or group & (group - 1):
            raise MethodError(f"groups (ROPE_GROUPS) have {group}: each must be a power of two, 1 to {MAX_GROUP}")
    return groups


def fitting_group(window: int, t: Target) -> int:
    """The smallest G that keeps every far distance of the target length inside L."""
    last, trained = int(t.scale * t.train_length) - 1, t.train_length
    for group in range(1, MAX_GROUP + 1):
        if last // group + window - window // group < trained:
            return group
    raise MethodError(
        f"{t.spec.method}: no group up to {MAX_GROUP} brings {last + 1} tokens inside the trained length {trained} "
        f"past a window (ROPE_WINDOW) of {window}; use a smaller window or factor (ROPE_FACTOR)"
    )
