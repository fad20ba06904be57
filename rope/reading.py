"""How rows read raw keys: a `Reading` for a run of rows, a `PositionMethod` for all rows of a model.

Every method is one shape. The keys that row i reads fall into parts, by where they lie and how far away they are, and
each part has one map from positions to angles for queries and one for keys:

    score(i, j) = ⟨ R(φ(i)) q_i · c_i , R(κ(j)) k_j ⟩        with φ, κ of the part that j belongs to

Plain RoPE has one part, ReRoPE two (near and far), dual-chunk attention three. Rows in a run share a `Reading`: all
rows of a static method are one run; a method whose θ or slope depends on the length gives *row i* the reading of *its
own* length, never that of the batch, the prompt or the chunk. That is what makes prefill, chunked prefill, decode,
preemption and prefix-cache hits agree.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from prerope.rope.frequencies import Rotary
from torch import Tensor

ROW_LENGTH_BUCKET = 256
"""Rows past the trained length share a row length in runs of this many: one θ a query tile."""

UNBOUNDED = 2**62


class MethodError(ValueError):
    """A method or a parameter that cannot be used with this model; the message says why and what is allowed."""


@dataclass(frozen=True, slots=True, eq=False)
class AngleMap:
    """Positions to angles: p ↦ min(⌊(p mod period)/group⌋ + shift, cap)·θ + offset.

    Attributes:
        theta: [D/2] fp64, radians a position.
        period: None does not wrap.
        group: tokens that share a position.
        cap: the largest position; None has none.
        offset: [D/2] fp64 radians; None is zero.
        groups: [D/2] int64, powers of two: each pair has a group of its own, p ↦ ⌊p/groups⌋·θ + offset, and there is no
            period, group, shift or cap. A tile of keys then begins with a group or lies inside one, so all tiles of
            as many keys as a power of two turn alike.
    """

    theta: Tensor
    period: int | None = None
    group: int = 1
    shift: int = 0
    cap: int | None = None
    offset: Tensor | None = None
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.groups is None or (self.period, self.group, self.shift, self.cap) == (None, 1, 0, None)

    def angles(self, positions: Tensor) -> Tensor:
        """[T] integer positions → [T, D/2] fp64."""
        if self.period is not None:
            positions = positions % self.period
        positions = positions // self.group + self.shift
        if self.cap is not None:
            positions = positions.clamp(max=self.cap)
        angles = self.turned(positions)
        return angles if self.offset is None else angles + self.offset

    def turned(self, places: Tensor) -> Tensor:
        """[…] places within the map, as integers → […, D/2] fp64: the angles from place 0 on."""
        places = places[..., None]
        return (places if self.groups is None else places // self.groups).to(torch.float64) * self.theta

    @property
    def unrotated(self) -> bool:
        """Turns nothing: keys are read as they lie in the cache."""
        return self.offset is None and not bool(self.theta.any())

    def digest(self) -> bytes:
        h = hashlib.blake2b(repr((self.period, self.group, self.shift, self.cap)).encode(), digest_size=16)
        h.update(self.theta.numpy().tobytes())
        for tensor in (self.offset, self.groups):
            if tensor is not None:
                h.update(tensor.numpy().tobytes())
        return h.digest()


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The keys first_key ≤ j < stop_key at distances d_min ≤ i − j < d_max, read through one pair of maps."""

    query: AngleMap
    key: AngleMap
    first_key: int = 0
    stop_key: int = UNBOUNDED
    d_min: int = 0
    d_max: int = UNBOUNDED

    def edges(self, reach: int = UNBOUNDED, longest: int = UNBOUNDED) -> tuple[int, int, int, int]:
        """(first_key, stop_key, d_min, d_max) where rows read keys with i − j < reach only; none is past `longest`."""
        d_max = min(self.d_max, reach, longest)
        return max(self.first_key, 0), min(self.stop_key, longest), min(max(self.d_min, 0), longest), d_max

    def keys(self, start: int, stop: int, reach: int = UNBOUNDED) -> tuple[int, int]:
        """The keys [first, last + 1) that any of the rows [start, stop) reads; empty where first ≥ last + 1.

        reach: rows read keys with i − j < reach only, a layer's sliding window.
        """
        first_key, stop_key, d_min, d_max = self.edges(reach)
        return max(first_key, start - d_max + 1), min(stop_key, stop - d_min)

    def reads(self, i: Tensor, j: Tensor) -> Tensor:
        """[R] rows and [n] keys → [R, n] bool."""
        distance = i[:, None] - j[None, :]
        return (distance >= self.d_min) & (distance < self.d_max) & (j >= self.first_key) & (j < self.stop_key)

    def digest(self) -> bytes:
        h = hashlib.blake2b(repr((self.first_key, self.stop_key, self.d_min, self.d_max)).encode(), digest_size=16)
        h.update(self.query.digest() + self.key.digest())
        return h.digest()


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """How the rows of one run read keys.

    Attributes:
        parts: disjoint; keys of no part are not read. The first holds the nearest keys, which in the rows' first run
            sit at their own positions.
        attention_factor: on the rotated dims of q and of k. It is applied to the query alone, squared: same score,
            and the keys stay raw.
        decay: [D/2] fp64, ≤ 0: pair m's share of the score fades by exp(decay_m·d) (xPos); None does not fade.
    """

    parts: tuple[Part, ...]
    attention_factor: float = 1.0
    decay: Tensor | None = None

    @property
    def theta(self) -> Tensor:
        """[D/2] fp64: of the nearest keys."""
        return self.parts[0].key.theta

    def digest(self) -> bytes:
        """Equal for equal readings, whatever the method that made them."""
        h = hashlib.blake2b(repr(self.attention_factor).encode(), digest_size=16)
        for part in self.parts:
            h.update(part.digest())
        if self.decay is not None:
            h.update(self.decay.numpy().tobytes())
        return h.digest()


def plain_reading(theta: Tensor, attention_factor: float = 1.0, decay: Tensor | None = None) -> Reading:
    """Every key at its exact distance."""
    positions = AngleMap(theta)
    return Reading((Part(positions, positions),), attention_factor, decay)


def everywhere(_position: int) -> int:
    """All rows are one run."""
    return UNBOUNDED


def switched(train_length: int) -> Callable[[int], int]:
    """Rows inside the trained length, and the rest."""
    return lambda position: train_length if position < train_length else UNBOUNDED


def bucketed(train_length: int) -> Callable[[int], int]:
    """Rows inside the trained length, then buckets: the end of row i's run is its row length n(i)."""
    size = ROW_LENGTH_BUCKET
    return lambda position: train_length if position < train_length else size * (position // size + 1)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a method's function returns.

    Attributes:
        parameters: resolved, JSON-ready.
        reading: of the run of rows that ends (exclusive) at the argument.
        run_end: row → the end of its run.
        warning: advice where the parameters are allowed but known to read badly.
    """

    parameters: dict[str, Any]
    reading: Callable[[int], Reading]
    run_end: Callable[[int], int] = everywhere
    warning: str | None = None


MAX_READINGS = 256
"""Readings that a method keeps: a length-dependent one makes another each 256 rows."""

READING_BYTES, MAP_BYTES = 512, 1024
"""Of a reading, and of an angle map with its tensor, as objects."""


@dataclass(frozen=True, slots=True, eq=False)
class PositionMethod:
    """A method resolved for one rotary group of one model: everything that attention needs, and nothing of the request.

    Attributes:
        name: of the registry.
        rotary: the model's own embedding: dims and pairing.
        train_length: L.
        logn: c_i = max(1, ln(i+1)/ln L) instead of 1.
    """

    name: str
    rotary: Rotary
    train_length: int
    rule: Rule
    logn: bool = False
    _readings: dict[int, Reading] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any]:
        """Resolved, JSON-ready."""
        return self.rule.parameters | ({"logn": True} if self.logn else {})

    def run_end(self, position: int) -> int:
        """One past the last row of the run that this row is in; the row length n(i) of a length-dependent method."""
        return self.rule.run_end(position)

    def reading(self, run_end: int) -> Reading:
        """The reading of the rows whose run ends here; the same object while it is among the last `MAX_READINGS`."""
        found = self._readings.get(run_end)
        if found is None:
            found = self._readings[run_end] = self.rule.reading(run_end)
            while len(self._readings) > MAX_READINGS:
                self._readings.pop(next(iter(self._readings)))
        return found

    @property
    def max_bytes(self) -> int:
        """What it takes once readings of all lengths have been asked for."""
        first = self.reading_of(0)
        count = 2 if self.run_end(self.train_length) >= UNBOUNDED else MAX_READINGS
        return count * (READING_BYTES + 2 * len(first.parts) * (MAP_BYTES + first.theta.nbytes))

    def reading_of(self, position: int) -> Reading:
        return self.reading(self.run_end(position))

    def runs(self, start: int, stop: int) -> list[tuple[int, int, Reading]]:
        """Rows [start, stop) cut where the reading changes: [(first, last + 1, reading)]."""
        runs = []
        while start < stop:
            end = self.run_end(start)
            runs.append((start, min(stop, end), self.reading(end)))
            start = end
        return runs

    @property
    def num_parts(self) -> int:
        """Parts of a reading far past the trained length, where no method has more anywhere."""
        return len(self.reading_of(16 * self.train_length).parts)

    def query_scale(self, positions: Tensor) -> Tensor | None:
        """c_i for [T] positions, fp64; None where every c_i is 1."""
        if not self.logn:
            return None
        return (torch.log(positions.to(torch.float64) + 1) / math.log(self.train_length)).clamp(min=1.0)

    @property
    def plain_rows(self) -> int:
        """Rows i < plain_rows read exactly as the plain reading with this θ would, so their K and V may be shared."""
        end = self.run_end(0)
        rows = min(end, self.reading(end).parts[0].d_max)
        return min(rows, self.train_length) if self.logn else rows

    def plain_digest(self) -> bytes:
        """The digest of the plain reading that the first `plain_rows` rows share with other methods."""
        first = self.reading_of(0)
        return plain_reading(first.theta, first.attention_factor, first.decay).digest()

    def digest(self) -> bytes:
        """A digest of everything that can change K and V."""
        identity: list[Any] = [self.logn and self.train_length]
        if self.run_end(0) < UNBOUNDED:
            identity += [self.name, self.train_length, sorted(self.rule.parameters.items())]
        return hashlib.blake2b(repr(identity).encode() + self.reading_of(0).digest(), digest_size=16).digest()
