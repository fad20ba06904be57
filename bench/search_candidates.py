"""Ways of reading far keys for `bench.search` to try: two are served methods, the rest are none yet.

The rest are rope inside the trained length L and read keys nearer than a window at their exact distance. They differ in
what a far key sees, and may differ between the lower and the upper half of the layers. Every far part is a line a pair
of dims: angles that are continuous in the distance, with frequencies θ/k of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Literal
from unittest.mock import patch

import torch
from prerope.cache.cpu import prefill
from prerope.cache.kernels import build as native
from prerope.rope.frequencies import Rotary, plain
from prerope.rope.methods import resolve
from prerope.rope.model import ModelPositions
from prerope.rope.reading import UNBOUNDED, AngleMap, Part, PositionMethod, Reading, Rule, bucketed, plain_reading
from prerope.rope.rotation import Table
from prerope.rope.spec import RopeSpec
from torch import Tensor

LOW, HIGH = "low", "high"
"""Names of the two halves of a model's layers, which are a rotary group each while a search runs."""

FAST_TURNS = 32  # within L: YaRN's ramp goes from 1 turn to this many


@dataclass(frozen=True, slots=True, kw_only=True)
class Far:
    """How the rows past L read far keys; lengths are shares of L. The defaults are dynamic_leaky's.

    Attributes:
        window: w, where near ends.
        farthest: the position at which a row's farthest key comes to sit.
        least_leak: the smallest k.
        fast: pairs that turn often within L: "leak" as all do, "keep" θ, or "still", which stay at w·θ. Pairs that turn
            at most once leak; between is YaRN's ramp.
        middle: (where it ends, its k): a third part between near and far.
        factor: on far scores, before the softmax.
        logn: on all scores.
        recent: nothing leaks: rows read the first 4 keys and the nearest L − 4 (streaming).
    """

    window: float = 1 / 4
    farthest: float = 1.0
    least_leak: float = 1.0
    fast: Literal["leak", "keep", "still"] = "leak"
    middle: tuple[float, float] | None = None
    factor: float = 1.0
    logn: bool = False
    recent: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """`low` and `high`: of the lower and the upper half of the layers; `served`: a method of the product instead."""

    label: str
    low: Far = field(default_factory=Far)
    high: Far = field(default_factory=Far)
    served: RopeSpec | None = None

    def positions(self, rotary: Rotary) -> ModelPositions:
        """For a model with this embedding whose layers are in the groups `LOW` and `HIGH`."""
        if self.served is not None:
            method = resolve(self.served, rotary)
            return ModelPositions({LOW: method, HIGH: method}, HIGH)
        low = far_method(self.low, rotary)
        return ModelPositions({LOW: low, HIGH: low if self.low == self.high else far_method(self.high, rotary)}, HIGH)

    def describe(self) -> Mapping[str, object]:
        """JSON-ready."""
        if self.served is not None:
            return asdict(self.served)
        return {LOW: asdict(self.low), HIGH: asdict(self.high)}


@dataclass(frozen=True, slots=True, eq=False)
class ScaledPart(Part):
    """A part whose scores are multiplied by `factor`. Attention knows it inside `scaled_parts` alone."""

    factor: float = 1.0


def everywhere(label: str, far: Far) -> Candidate:
    return Candidate(label, far, far)


BASELINE = everywhere("dynamic_leaky", Far())

CANDIDATES: dict[str, Candidate] = {
    candidate.label: candidate
    for candidate in (
        BASELINE,
        everywhere("window L/2", Far(window=1 / 2)),
        everywhere("window L/8", Far(window=1 / 8)),
        everywhere("window L/16", Far(window=1 / 16)),
        Candidate("window L/8 low, L/2 high", Far(window=1 / 8), Far(window=1 / 2)),
        Candidate("window L/2 low, L/8 high", Far(window=1 / 2), Far(window=1 / 8)),
        everywhere("far scores × 1.05", Far(factor=1.05)),
        everywhere("far scores × 0.95", Far(factor=0.95)),
        everywhere("fast pairs keep θ", Far(fast="keep")),
        everywhere("fast pairs still", Far(fast="still")),
        Candidate("nearest L low, leaky high", Far(recent=True), Far()),
        everywhere("k = 1.5 up to L, then steeper", Far(middle=(1.0, 1.5))),
        everywhere("k at least 4", Far(least_leak=4.0)),
        everywhere("log n", Far(logn=True)),
        everywhere("farthest key at ¾ L", Far(farthest=3 / 4)),
        Candidate("dual_chunk", served=RopeSpec(method="dual_chunk")),
        Candidate("self_extend, groups of 6", served=RopeSpec(method="self_extend", group=6)),
    )
}


def far_method(far: Far, rotary: Rotary) -> PositionMethod:
    """Raises ValueError for a model that has not plain RoPE."""
    if rotary.rope_type != "default":
        raise ValueError(f"the search is for models trained with plain RoPE; this one has {rotary.rope_type}")
    if far.recent:
        return resolve(RopeSpec(method="streaming", logn=far.logn), rotary)
    trained = rotary.train_length
    own = plain_reading(plain(rotary.dim, rotary.base))

    def reading(length: int) -> Reading:
        return own if length <= trained else Reading(far_parts(far, own.theta, trained, length))

    return PositionMethod("candidate", rotary, trained, Rule(asdict(far), reading, bucketed(trained)), far.logn)


def far_parts(far: Far, theta: Tensor, trained: int, length: int) -> tuple[Part, ...]:
    """Of rows of this row length, past the trained one."""
    window = int(far.window * trained)
    cuts: list[tuple[int, Tensor]] = []
    start, position = window, float(window)
    if far.middle is not None:
        stop, leak = int(far.middle[0] * trained), far.middle[1]
        cuts.append((window, leaking(theta, leak, far.fast, trained)))
        start, position = stop, window + (stop - window) / leak
    leak = max(far.least_leak, (length - start) / (far.farthest * trained - position))
    cuts.append((start, leaking(theta, leak, far.fast, trained)))
    return joined_parts(theta, cuts, far.factor)


def leaking(theta: Tensor, leak: float, fast: str, trained: int) -> Tensor:
    """Far frequencies, [D/2]."""
    if fast == "leak":
        return theta / leak
    turns = trained * theta / (2 * math.pi)
    kept = (turns.log() / math.log(FAST_TURNS)).clamp(0, 1)
    return torch.lerp(theta / leak, theta if fast == "keep" else torch.zeros_like(theta), kept)


def joined_parts(theta: Tensor, cuts: Sequence[tuple[int, Tensor]], factor: float = 1.0) -> tuple[Part, ...]:
    """Near keys at θ; then, from each distance in `cuts` on, frequencies of their own that meet the part before."""
    near = AngleMap(theta)
    parts: list[Part] = [Part(near, near, d_max=cuts[0][0])]
    angle = cuts[0][0] * theta
    stops = [*(start for start, _ in cuts[1:]), UNBOUNDED]
    for (start, own), stop in zip(cuts, stops, strict=True):
        query, key = AngleMap(own, offset=angle - start * own), AngleMap(own)
        parts.append(ScaledPart(query, key, d_min=start, d_max=stop, factor=factor))
        angle = angle + (stop - start) * own
    return tuple(parts)


@contextmanager
def scaled_parts() -> Iterator[None]:
    """Inside, the CPU's chunk kernel multiplies the scores of a `ScaledPart`, by way of its table of query angles.

    A `Reading` has one factor for all its parts, and the product gets another one only if this search finds a use for
    it. Raises RuntimeError where chunks do not go through that kernel.
    """
    if native.library() is None:
        raise RuntimeError("the search reads through the C kernel for chunks, which could not be built here")
    tables: Callable[[Reading, Part, int, int, int], Table] = prefill.query_table  # type: ignore[attr-defined]

    def query_table(reading: Reading, part: Part, start: int, stop: int, origin: int) -> Table:
        rows = tables(reading, part, start, stop, origin)
        if isinstance(part, ScaledPart) and part.factor != 1.0:
            return Table(rows.cos * part.factor, rows.sin * part.factor)
        return rows

    with patch.object(prefill, "query_table", query_table):
        yield
