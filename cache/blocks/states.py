"""States of sequences: which slot holds which, for layers that keep one of all tokens so far beside keys and values.

    tokens   0 ──────────────── edge ─────── edge ── stop          edges: ends of blocks
    slots    source?            kept         kept    own slot

A running sequence holds one slot, its own. A step reads the state that it begins with from there, from a kept one, or
from nowhere, and leaves what it ends with in the sequence's own slot. On its way it keeps states at a few block edges,
under the hash of the block that ends there: equal hashes mean equal states. A prefix hit reaches as far as the last
edge at which a state is kept. Kept slots that nobody reads are free: the least recently used is taken first.

Which edges: where the known blocks of a prompt end (others begin alike), the last one of the prompt, and the latest one
that a sequence has passed, in place of the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from prerope.cache.blocks.manager import BlockPool


class StateRows(NamedTuple):
    """Slots of one sequence in one step.

    Attributes:
        source: of the state before the first of its rows; None: it begins with nothing.
        target: of the state behind the last of them.
        kept: (position, slot): of the states before the token at a position, in order.
    """

    source: int | None
    target: int
    kept: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class SequenceState:
    """The slots that one sequence holds.

    Attributes:
        slot: its own.
        source: of the kept state that it begins with, until its first step; None: nothing, or its own slot.
        edges: positions at which its state is kept until its slot is wanted, least recently used first.
        started: whether its own slot has its state.
        written: position → slot, of states that steps in flight keep.
        latest: the hash of the latest state that it has kept, unless that is for good.
    """

    slot: int
    source: int | None
    edges: frozenset[int]
    started: bool = False
    written: dict[int, int] = field(default_factory=dict)
    latest: bytes | None = None

    @property
    def slots(self) -> list[int]:
        return [self.slot, *([] if self.source is None else [self.source]), *self.written.values()]


class StateCache:
    """Slots of one storage, which a pool of its own hands out. Touches no tensor."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self._block_size = block_size

    def usable(self, hashes: Sequence[bytes]) -> int:
        """The most of these blocks, from the first on, behind which a state is kept; 0: none."""
        return next((count for count in range(len(hashes), 0, -1) if self.pool.find(hashes[count - 1]) is not None), 0)

    def open(self, block_hash: bytes | None, edges: frozenset[int]) -> SequenceState:
        """For a sequence that begins with the state kept under `block_hash`, or with nothing. A slot is free for it."""
        source = None if block_hash is None else self.pool.find(block_hash)
        if source is not None:
            self.pool.share([source])
        (slot,) = self.pool.allocate(1)
        return SequenceState(slot, source, edges)

    def can_open(self, block_hash: bytes | None) -> bool:
        """Whether a slot is free beside the one kept under `block_hash`."""
        source = None if block_hash is None else self.pool.find(block_hash)
        return self.pool.num_free > (source is not None and self.pool.is_free(source))

    def rows_of_step(self, steps: Sequence[tuple[SequenceState, int, int]], *, keep: bool) -> list[StateRows]:
        """For a step that computes tokens `start` … `stop` − 1 of each; from the next on they read their own slots.

        keep: also at edges on the way, where slots are free, those of kept states included.
        """
        rows = [self._rows(state, start, stop, keep=keep) for state, start, stop in steps]
        self.rows_given([state for state, _, _ in steps])
        return rows

    def rows_given(self, states: Sequence[SequenceState]) -> None:
        """The step has all its slots: what its sequences begin with need not be held for them any longer."""
        for state in states:
            state.started = True
            if state.source is not None:
                self.pool.release([state.source])
                state.source = None

    def _rows(self, state: SequenceState, start: int, stop: int, *, keep: bool) -> StateRows:
        kept = []
        for edge in sorted(self._edges(state, start, stop)) if keep else ():
            if self.pool.num_free:
                (state.written[edge],) = self.pool.allocate(1)
                kept.append((edge, state.written[edge]))
        source = state.slot if state.started else state.source
        return StateRows(source, state.slot, tuple(kept))

    def _edges(self, state: SequenceState, start: int, stop: int) -> set[int]:
        last = stop // self._block_size * self._block_size
        return {edge for edge in (*state.edges, last) if start < edge <= stop}

    def remember(self, state: SequenceState, stop: int, hashes: Sequence[bytes]) -> None:
        """Steps up to `stop` have run, and the hashes of the blocks up to there are known: what they kept is found."""
        for edge in sorted(edge for edge in state.written if edge <= stop):
            slot, block_hash = state.written.pop(edge), hashes[edge // self._block_size - 1]
            mine = self.pool.remember(slot, block_hash)
            self.pool.release([slot])
            if state.latest is not None:
                self.pool.drop(state.latest)
            state.latest = block_hash if mine and edge not in state.edges else None

    def release(self, state: SequenceState) -> None:
        """Let go of all; what was kept and is known stays findable."""
        self.pool.release(state.slots)
