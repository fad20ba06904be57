"""The published formulas, written out a second time in plain Python floats: the oracle that `rope` is held to.

Nothing of `rope` is used to compute them. Notation as in the papers: D rotary dim, b base, L trained length, s scale,
n row length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from prerope.rope.frequencies import Rotary


def trained(
    dim: int = 64, base: float = 10000.0, length: int = 1024, *, interleaved: bool = False, head_dim: int | None = None
) -> Rotary:
    """A model with plain rotary embeddings."""
    return Rotary(head_dim or dim, dim, base, "default", length, length, {}, interleaved)


def rope(D: int, b: float) -> list[float]:
    return [b ** -(2 * m / D) for m in range(D // 2)]


def linear(D: int, b: float, s: float) -> list[float]:
    return [t / s for t in rope(D, b)]


def ntk(D: int, b: float, s: float) -> list[float]:
    return [(b * s ** (D / (D - 2))) ** -(2 * m / D) for m in range(D // 2)]


def ntk_fixed(D: int, b: float, s: float) -> list[float]:
    return [(b * s) ** -(2 * m / D) / s ** (2 / D) for m in range(D // 2)]


def ntk_mixed(D: int, b: float, s: float, beta: float = 0.625) -> list[float]:
    a = math.log(s) / (D / 2) ** beta
    return [t * math.exp(-a * (m + 1) ** beta) for m, t in enumerate(rope(D, b))]


def dynamic_ntk(D: int, b: float, f: float, n: int, L: int) -> list[float]:
    grown = b * (f * max(n, L) / L - (f - 1)) ** (D / (D - 2))
    return [grown ** -(2 * m / D) for m in range(D // 2)]


def yarn(D: int, b: float, s: float, L: int, fast: float = 32, slow: float = 1, truncate: bool = True) -> list[float]:
    low, high = (D * math.log(L / (2 * math.pi * beta)) / (2 * math.log(b)) for beta in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    thetas = []
    for m, t in enumerate(rope(D, b)):
        gamma = 1 - min(1.0, max(0.0, (m - low) / (high - low)))
        thetas.append(t / s * (1 - gamma) + t * gamma)
    return thetas


def llama3(D: int, b: float, s: float, L: int, low: float = 1, high: float = 4) -> list[float]:
    """As Meta's code has it: by wavelength, in three cases."""
    thetas = []
    for t in rope(D, b):
        wavelength = 2 * math.pi / t
        if wavelength < L / high:
            thetas.append(t)
        elif wavelength > L / low:
            thetas.append(t / s)
        else:
            smooth = (L / wavelength - low) / (high - low)
            thetas.append((1 - smooth) * t / s + smooth * t)
    return thetas


def longrope(D: int, b: float, extension: list[float]) -> list[float]:
    return [1 / (extension[m] * b ** (2 * m / D)) for m in range(D // 2)]


STATIC: dict[str, Callable[[int, float, float, int], list[float]]] = {
    "rope": lambda D, b, _s, _L: rope(D, b),
    "linear": lambda D, b, s, _L: linear(D, b, s),
    "ntk": lambda D, b, s, _L: ntk(D, b, s),
    "ntk_fixed": lambda D, b, s, _L: ntk_fixed(D, b, s),
    "ntk_mixed": lambda D, b, s, _L: ntk_mixed(D, b, s),
    "ntk_by_parts": yarn,
    "yarn": yarn,
    "llama3": llama3,
}
"""name → θ(D, b, s, L) of the methods that do not look at the row's length."""

DYNAMIC: dict[str, Callable[[int, float, int, int], list[float]]] = {
    "dynamic_linear": lambda D, b, n, L: [t * L / max(n, L) for t in rope(D, b)],
    "dynamic_ntk": lambda D, b, n, L: dynamic_ntk(D, b, 2.0, n, L),
    "dynamic_yarn": lambda D, b, n, L: yarn(D, b, max(n, L) / L, L),
}
"""name → θ(D, b, n, L) of the methods whose θ follows the row length n."""


def far_position(method: str, distance: int, *, w: int, L: int, n: int, k: float) -> float:
    """The distance at which a key at `distance` ≥ w is read: the table's far column, q minus k."""
    if method == "rerope":
        return w
    if method == "dynamic_rerope":
        farthest = min(L, w + (L - w) * max(0, n - 2 * L) / (3 * L))
        return w + (distance - w) * (farthest - w) / (n - w)
    if method == "string":  # STRING's eq. 3: shifted by S = w, and back by the local value
        return distance - w + min(128, w // 2)
    if method == "dynamic_leaky":
        k = max(1.0, (n - w) / (L - w))
    return (distance - w) / k + w


def dpe_position(pair: int, pairs: int, i: int, j: int, *, w: int, scales: list[int]) -> int:
    """The far distance that one pair sees under DPE's scale factors, each of an equal share of the pairs."""
    ends = [pairs * (number + 1) / len(scales) for number in range(len(scales))]
    s = next(scale for scale, end in zip(scales, ends, strict=True) if pair < end)
    return i // s - j // s + w - w // s


def row_length(i: int, L: int, bucket: int = 256) -> int:
    """n(i) = L for i + 1 ≤ L, else bucket·⌈(i + 1)/bucket⌉."""
    return L if i + 1 <= L else bucket * math.ceil((i + 1) / bucket)


def yarn_factor(s: float) -> float:
    """√(1/t) of the paper's eq. 22: on q and on k."""
    return 0.1 * math.log(s) + 1 if s > 1 else 1.0


LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}


def longrope_trained(dim: int = 16) -> Rotary:
    """A model whose config carries LongRoPE's factors, trained at 64 and meant to reach 512."""
    short = [1 + 0.05 * m for m in range(dim // 2)]
    long = [1 + 0.9 * m for m in range(dim // 2)]
    parameters = LONGROPE | {"short_factor": short, "long_factor": long}
    return Rotary(dim, dim, 10000.0, "longrope", 64, 512, parameters)
