"""How rows read raw keys: a `Reading` for the rows of one length, a `PositionMethod` for all rows of a model.

Every method is one shape. Row i reads key j at distance d = i − j through

    score(i, j) = ⟨ R(near(i)) q_i · c_i , R(near(j)) k_j ⟩                    d < w, or no window
                  ⟨ R((i−w)·θ_far + w·θ) q_i · c_i , R(j·θ_far) k_j ⟩          d ≥ w

so a method is a `Reading` (θ, θ_far, w, attention factor) for each row length, and the row scale c_i. Self-Extend
rounds far positions down to groups. Methods whose θ or slope depends on the length give *row i* the reading of *its
own* row length, never that of the batch, the prompt or the chunk: that is what makes prefill, chunked prefill, decode,
preemption and prefix-cache hits agree.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rope.frequencies import Rotary

ROW_LENGTH_BUCKET = 256
"""Rows past the trained length share a row length in runs of this many: one θ a query tile."""

UNBOUNDED = 2**62


class MethodError(ValueError):
    """A method or a parameter that cannot be used with this model; the message says why and what is allowed."""


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """How rows of one row length read keys.

    Attributes:
        theta: [D/2] fp64, radians a token.
        attention_factor: on the rotated dims of q and of k. It is applied to the query alone, squared: same score,
            and the keys stay raw.
        window: w; None reads every key at its exact distance.
        theta_far: [D/2] fp64, used where d ≥ w; zero reads far keys with no rotation at all.
        group: G, tokens that share a far position: ⌊i/G⌋ + w − ⌊w/G⌋ and ⌊j/G⌋ (Self-Extend); 1 is every other method.
    """

    theta: Tensor
    attention_factor: float = 1.0
    window: int | None = None
    theta_far: Tensor | None = None
    group: int = 1

    @property
    def far_keys_raw(self) -> bool:
        return self.theta_far is not None and not bool(self.theta_far.any())

    def near_angles(self, positions: Tensor) -> Tensor:
        """[T] integer positions of queries or keys → [T, D/2] fp64."""
        return positions.to(torch.float64)[:, None] * self.theta

    def far_query_angles(self, positions: Tensor) -> Tensor:
        """[T] positions of queries → [T, D/2] fp64: (i−w)·θ_far + w·θ, which meets the near part at d = w."""
        assert self.window is not None
        assert self.theta_far is not None
        if self.group > 1:
            positions = positions // self.group + self.window - self.window // self.group
            return positions.to(torch.float64)[:, None] * self.theta_far
        return (positions.to(torch.float64) - self.window)[:, None] * self.theta_far + self.window * self.theta

    def far_key_angles(self, positions: Tensor) -> Tensor:
        """[T] positions of keys → [T, D/2] fp64."""
        assert self.theta_far is not None
        return (positions // self.group).to(torch.float64)[:, None] * self.theta_far

    def digest(self) -> bytes:
        """Equal for equal readings, whatever the method that made them."""
        h = hashlib.blake2b(digest_size=16)
        h.update(self.theta.numpy().tobytes() + repr((self.attention_factor, self.window, self.group)).encode())
        if self.theta_far is not None:
            h.update(self.theta_far.numpy().tobytes())
        return h.digest()


@dataclass(frozen=True, slots=True)
class Rule:
    """What a method's function returns: its resolved parameters and its reading for each row length.

    row_length says which lengths the reading depends on: "static" none, "switch" only whether it exceeds L,
    "bucketed" the length in runs of `ROW_LENGTH_BUCKET`.
    """

    parameters: dict[str, Any]
    reading: Callable[[int], Reading]
    row_length: str = "static"


@dataclass(frozen=True, slots=True, eq=False)
class PositionMethod:
    """A method resolved for one rotary group of one model: everything that attention needs, and nothing of the request.

    Attributes:
        name: of the registry.
        rotary: the model's own embedding: dims and pairing.
        train_length: L.
        parameters: resolved, JSON-ready.
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
        return self.rule.parameters | ({"logn": True} if self.logn else {})

    @property
    def length_dependent(self) -> bool:
        return self.rule.row_length != "static"

    def row_length(self, position: int) -> int:
        """n(i) of row i = position: L inside the trained length, else the end of its bucket (L+1 for a switch)."""
        trained = self.train_length
        if self.rule.row_length == "static" or position < trained:
            return trained
        if self.rule.row_length == "switch":
            return trained + 1
        return ROW_LENGTH_BUCKET * math.ceil((position + 1) / ROW_LENGTH_BUCKET)

    def runs(self, start: int, stop: int) -> list[tuple[int, int, Reading]]:
        """Rows [start, stop) cut where the reading changes: [(first, last + 1, reading)]."""
        if not self.length_dependent:
            return [(start, stop, self.reading(self.train_length))]
        runs = []
        while start < stop:
            length = self.row_length(start)
            if length == self.train_length:
                end = min(stop, self.train_length)
            else:
                end = stop if self.rule.row_length == "switch" else min(stop, length)
            runs.append((start, end, self.reading(length)))
            start = end
        return runs

    def reading(self, row_length: int) -> Reading:
        """The reading of rows whose row length is this; the same object each time."""
        if row_length not in self._readings:
            self._readings[row_length] = self.rule.reading(row_length)
        return self._readings[row_length]

    def query_scale(self, positions: Tensor) -> Tensor | None:
        """c_i for [T] positions, fp64; None where every c_i is 1."""
        if not self.logn:
            return None
        return (torch.log(positions.to(torch.float64) + 1) / math.log(self.train_length)).clamp(min=1.0)

    @property
    def plain_rows(self) -> int:
        """Rows i < plain_rows read exactly as the windowless `reading(L)` would, so their K and V may be shared."""
        reading = self.reading(self.train_length)
        rows = UNBOUNDED if reading.window is None else reading.window
        if self.length_dependent:
            rows = self.train_length
        return min(rows, self.train_length) if self.logn else rows

    def plain_digest(self) -> bytes:
        """Of the reading that the first `plain_rows` rows share with other methods."""
        reading = self.reading(self.train_length)
        return Reading(reading.theta, reading.attention_factor).digest()

    def warning(self) -> str | None:
        """Advice where the parameters are allowed but known to read badly."""
        window = self.parameters.get("window")
        if window is None or window <= self.train_length // 2:
            return None
        return (
            f"window (ROPE_WINDOW) {window} is more than half the trained length {self.train_length}: large "
            f"distances are seen too rarely in training; {self.train_length // 4} to {self.train_length // 2} is best"
        )

    def digest(self) -> bytes:
        """Of everything that can change K and V."""
        identity: list[Any] = [self.logn and self.train_length]
        if self.length_dependent:
            identity += [self.name, self.train_length, sorted(self.rule.parameters.items())]
        return hashlib.blake2b(
            repr(identity).encode() + self.reading(self.train_length).digest(), digest_size=16
        ).digest()
