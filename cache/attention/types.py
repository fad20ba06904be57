"""What attention is given: `AttentionMetadata`, one step's plan, and `AttentionOptions`, what one layer asks for.

The plan is shared by all layers: which packed rows belong to which sequence, where their new K and V go, and which
position method reads them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prerope.rope.model import ModelPositions
from prerope.rope.reading import UNBOUNDED, PositionMethod
from torch import Tensor

if TYPE_CHECKING:
    from prerope.cache.cpu.bounds import KeyBounds


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """The rows of one sequence in a step: `count` of them from packed row `first`, at positions `start`, `start` + 1, …

    block_table: [blocks] int64, on the host whatever the device: where positions 0 … start + count − 1 live.
    selects_from: rows from this position on choose the far keys that they read (`cache.attention.selection`).
    """

    first: int
    count: int
    start: int
    block_table: Tensor
    positions: ModelPositions
    selects_from: int = UNBOUNDED

    @property
    def length(self) -> int:
        """Keys that the last row reads."""
        return self.start + self.count

    def selected(self, options: AttentionOptions) -> int | None:
        """Far tokens that its rows read in a layer; None: all, as in layers that reach no further than a window."""
        if self.length <= self.selects_from or options.sliding_window is not None:
            return None
        return self.positions.select

    def same_sequence(self, other: SequenceRows) -> bool:
        """Whether both are of one sequence: of its one table of blocks."""
        return self.block_table.data_ptr() == other.block_table.data_ptr() and self.positions is other.positions


@dataclass(slots=True)
class AttentionMetadata:
    """One step.

    Attributes:
        sequences: in packed order.
        slot_mapping: [T] int64: block·block_size + offset, where each packed row's K and V are stored.
        plans: what a backend works out once a step, whatever the layer; keyed by the backend.
        bounds: of keys, as far as rows choose by them, where a backend wants them made; see `cache.cpu.bounds`.
    """

    sequences: Sequence[SequenceRows]
    slot_mapping: Tensor
    block_size: int
    plans: dict[Hashable, Any] = field(default_factory=dict)
    bounds: KeyBounds | None = None

    @property
    def num_rows(self) -> int:
        """T."""
        return sum(sequence.count for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """One layer.

    Attributes:
        scale: on the scores.
        group: the rotary group whose method reads this layer's keys; None: the layer has no positions.
        sliding_window: row i reads keys with i − j < sliding_window only; None reads all.
        softcap: c·tanh(score/c); None is off.
        sinks: [Hq] logits that take part in the softmax and carry no value; None is off.
        slopes: [Hq] fp32: a score falls by slope·(i − j), before any soft-cap (ALiBi); None is off.
    """

    scale: float
    group: str | None
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None

    def method(self, sequence: SequenceRows) -> PositionMethod | None:
        return None if self.group is None else sequence.positions.methods[self.group]
