"""Which block holds which token of which sequence, and who may reuse it: block tables and hashes. Touches no tensor.

A full block is known by a chained hash: equal hashes mean equal K and V in every layer.

    h(b) = H( h(b−1), tokens of b, seed of b, documents in b )          h(−1) = H( salt )

K and V above the first layer depend on the position method, so each block's seed is the digest of the resolved method,
except where the block lies wholly in the rows that the method reads plainly (`ModelPositions.block_seed`). Rows of a
reply that leave far keys out (`cache.attention.selection`) are in blocks that only the same reply finds again.

A sequence here is anything with a block table, token ids and a `PrefixHasher` (see `Cacheable`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from prerope.cache.blocks.documents import DocumentSpan, layout
from prerope.cache.blocks.states import SequenceState, StateCache
from prerope.rope.model import ModelPositions
from prerope.rope.reading import UNBOUNDED


class BlockPool:
    """`num_blocks` blocks, ids 0…num_blocks−1: who holds them, which are free, and which free ones are still known.

    A block is *held* (reference count > 0) or *free*. A free block may be *cached*: its content is known by hash and
    can be taken up again until the block is allocated for something else. Free blocks are reused least recently freed
    first. Knows neither tensors nor sequences. All operations are O(1) a block.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be reused comes first
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self.num_touched = 0  # blocks up to the last that was ever allocated

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks, held or free, whose content a hash finds."""
        return len(self._block_of)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; what they cached is forgotten. The caller has checked `num_free`."""
        assert count <= len(self._free), f"allocate({count}) with {len(self._free)} free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._ref_counts[block] = 1
        self.num_touched = max(self.num_touched, max(blocks, default=-1) + 1)
        return blocks

    def find(self, block_hash: bytes) -> int | None:
        """The block with this content, held or free, or None. The caller does not hold it by asking."""
        return self._block_of.get(block_hash)

    def is_free(self, block: int) -> bool:
        return self._ref_counts[block] == 0

    def share(self, blocks: Sequence[int]) -> None:
        """Hold blocks that `find` returned."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, in table order. The end of a chain is reused before its beginning."""
        for block in reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} released twice"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)  # nothing to lose: reuse it first

    def remember(self, block: int, block_hash: bytes) -> bool:
        """Make a held, full block findable by its content's hash; False where another block is known for it already."""
        assert self._ref_counts[block] > 0
        if self._hash_of[block] is not None or block_hash in self._block_of:
            return False
        self._hash_of[block] = block_hash
        self._block_of[block_hash] = block
        return True

    def drop(self, block_hash: bytes) -> None:
        """Forget the hash of this content, unless a sequence holds the block."""
        block = self._block_of.get(block_hash)
        if block is not None and self.is_free(block):
            self._forget(block)
            self._free.move_to_end(block, last=False)

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None

    def check_integrity(self, tables: Sequence[Sequence[int]] = ()) -> None:
        """Assert every invariant; `tables` are the block tables of all live sequences."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        assert held == self._ref_counts, "reference counts differ from the block tables"
        assert set(self._free) == {b for b, count in enumerate(self._ref_counts) if count == 0}, "free queue differs"
        known = {h: b for b, h in enumerate(self._hash_of) if h is not None}
        assert known == self._block_of, "hash index differs from the blocks' hashes"


class PrefixHasher:
    """The hash chain of one sequence, extended as its tokens become known. Append-only."""

    def __init__(
        self,
        block_size: int,
        positions: ModelPositions,
        salt: str,
        documents: Sequence[DocumentSpan] = (),
        selects_from: int = UNBOUNDED,
    ) -> None:
        """selects_from: the first row that may leave far keys out."""
        self._block_size = block_size
        self._documents = documents
        self._positions = positions
        self.selects_from = selects_from
        self._root = hashlib.blake2b(salt.encode(), digest_size=16).digest()
        self.hashes: list[bytes] = []

    def extend(self, token_ids: Sequence[int], num_known: int | None = None) -> list[bytes]:
        """Hashes of all full blocks of `token_ids`, which begins with the tokens of the last call.

        num_known: only so many of them are known yet; None is all.
        """
        size = self._block_size
        for index in range(len(self.hashes), (len(token_ids) if num_known is None else num_known) // size):
            end = (index + 1) * size
            h = self._after(index, token_ids[index * size : end], end)
            if self._documents:
                h.update(layout(self._documents, index * size, end))
            self.hashes.append(h.digest())
        return self.hashes

    def each(self, token_ids: Sequence[int], num_blocks: int) -> Iterator[bytes]:
        """The hashes of its first full blocks, each made when it is asked for: often the first alone is."""
        for index in range(num_blocks):
            yield self.extend(token_ids, (index + 1) * self._block_size)[index]

    def tail(self, token_ids: Sequence[int]) -> bytes | None:
        """The hash of a last block that `token_ids` fill in part and nobody will fill up; None: it is full."""
        full = len(self.extend(token_ids))
        rest = token_ids[full * self._block_size :]
        if not rest:
            return None
        h = self._after(full, rest, len(token_ids))
        h.update(b"the last of a document")
        return h.digest()

    def _after(self, index: int, token_ids: Sequence[int], end: int) -> hashlib.blake2b:
        h = hashlib.blake2b(self.hashes[index - 1] if index else self._root, digest_size=16)
        h.update(array("q", token_ids).tobytes())
        h.update(self._positions.block_seed(end))
        if end > self.selects_from:
            h.update(repr(("selects", self._positions.select, self.selects_from)).encode())
        return h


class BlockTable(list[int]):
    """Blocks of one sequence, in order. A sequence that lets go of all gets a new one; `cut` takes those of drafts."""

    def __init__(self) -> None:
        super().__init__()
        self._array = np.empty(8, dtype=np.int64)
        self._num_copied = 0

    def head(self, count: int) -> NDArray[np.int64]:
        """The first `count` as a view of an array that is extended, not made anew: what was given never changes."""
        if count > self._num_copied:
            if len(self) > len(self._array):
                copied = self._array[: self._num_copied]
                self._array = np.empty(2 * len(self), dtype=np.int64)
                self._array[: self._num_copied] = copied
            self._array[self._num_copied : len(self)] = self[self._num_copied :]
            self._num_copied = len(self)
        return self._array[:count]

    def cut(self, count: int) -> list[int]:
        """Remove and return the blocks after the first `count`. No step may still use them."""
        rest = self[count:]
        del self[count:]
        self._num_copied = min(self._num_copied, count)
        return rest


class Cacheable(Protocol):
    """What the cache needs of a sequence."""

    block_table: BlockTable
    token_ids: list[int]
    num_computed_tokens: int
    num_prompt_tokens: int
    hasher: PrefixHasher
    state: SequenceState | None

    @property
    def num_reusable_tokens(self) -> int: ...


class KVCacheManager:
    """Allocation, prefix reuse and release over one `BlockPool`, and the slots of states where layers keep any."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool, num_states: int = 0) -> None:
        self.pool = BlockPool(num_blocks)
        self.states = StateCache(BlockPool(num_states), block_size) if num_states else None
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.queried_tokens = 0
        self.hit_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens the whole cache can hold."""
        return self.pool.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def take_prefix(self, sequence: Cacheable) -> int:
        """Start a sequence on the cached blocks of its beginning, as far as it may reuse them; returns their tokens."""
        assert not sequence.block_table
        known = self._known_blocks(sequence)
        blocks = self._usable(sequence, known)
        self.pool.share(blocks)
        if self.states is not None:
            ends = {len(known) * self.block_size, (sequence.num_prompt_tokens - 1) // self.block_size * self.block_size}
            sequence.state = self.states.open(self._last_hash(sequence, blocks), frozenset(ends))
        sequence.block_table.extend(blocks)
        sequence.num_computed_tokens = min(len(blocks) * self.block_size, len(sequence.token_ids))
        self.queried_tokens += len(sequence.token_ids)
        self.hit_tokens += sequence.num_computed_tokens
        return sequence.num_computed_tokens

    def blocks_to_admit(self, sequence: Cacheable) -> int:
        """Free blocks that computing all tokens known so far would use up, cached ones it would take back included."""
        cached = self._usable(sequence, self._known_blocks(sequence))
        held = sum(not self.pool.is_free(block) for block in cached)
        return self.blocks_for(len(sequence.token_ids)) - held

    def has_state_for(self, sequence: Cacheable) -> bool:
        """Whether there is a slot for its state, where layers keep any."""
        if self.states is None:
            return True
        return self.states.can_open(self._last_hash(sequence, self._usable(sequence, self._known_blocks(sequence))))

    def _usable(self, sequence: Cacheable, known: list[int]) -> list[int]:
        """The known blocks of a beginning that may be reused: where layers keep states, those up to a kept state."""
        if self.states is None:
            return known
        return known[: self.states.usable(sequence.hasher.hashes[: len(known)])]

    def _last_hash(self, sequence: Cacheable, blocks: list[int]) -> bytes | None:
        return sequence.hasher.hashes[len(blocks) - 1] if blocks else None

    def _known_blocks(self, sequence: Cacheable) -> list[int]:
        if not self.prefix_caching:
            return []
        blocks = []
        usable = sequence.num_reusable_tokens // self.block_size
        for block_hash in sequence.hasher.each(sequence.token_ids, usable):
            block = self.pool.find(block_hash)
            if block is None:
                break
            blocks.append(block)
        if usable == len(blocks) and self._ends_for_good(sequence):
            tail = sequence.hasher.tail(sequence.token_ids)
            last = None if tail is None else self.pool.find(tail)
            blocks += [] if last is None else [last]
        return blocks

    @staticmethod
    def _ends_for_good(sequence: Cacheable) -> bool:
        """It is read for its K and V alone: its last block, full or not, may be taken over and is never written on."""
        return sequence.num_reusable_tokens == len(sequence.token_ids)

    def grow(self, sequence: Cacheable, num_tokens: int) -> bool:
        """Make the block table reach `num_tokens` tokens; False, and nothing changed, when too few blocks are free."""
        missing = self.blocks_for(num_tokens) - len(sequence.block_table)
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            sequence.block_table.extend(self.pool.allocate(missing))
        return True

    def trim(self, sequence: Cacheable) -> None:
        """Let go of blocks past its tokens, which drafts had."""
        self.pool.release(sequence.block_table.cut(self.blocks_for(len(sequence.token_ids))))

    def remember(self, sequence: Cacheable, start: int, stop: int | None = None) -> list[tuple[int, bytes]]:
        """Make findable the blocks that tokens `start` … `stop` − 1 filled, computed and known; None: all computed.

        Returns (block, hash) of those that were not known before.
        """
        stop = sequence.num_computed_tokens if stop is None else stop
        if not self.prefix_caching:
            return []
        first, full = start // self.block_size, stop // self.block_size
        filled = []
        if first < full:
            hashes = sequence.hasher.extend(sequence.token_ids, stop)
            filled = list(zip(sequence.block_table[first:full], hashes[first:full], strict=True))
        if stop == len(sequence.token_ids) and self._ends_for_good(sequence):
            tail = sequence.hasher.tail(sequence.token_ids)
            filled += [] if tail is None else [(sequence.block_table[full], tail)]
        if self.states is not None and sequence.state is not None:
            self.states.remember(sequence.state, stop, sequence.hasher.extend(sequence.token_ids, stop))
        return [(block, block_hash) for block, block_hash in filled if self.pool.remember(block, block_hash)]

    def slots(self, sequence: Cacheable, start: int, stop: int) -> list[int]:
        """Where K and V of tokens `start` … `stop` − 1 are, as slots of the whole cache."""
        size, table = self.block_size, sequence.block_table
        return [table[position // size] * size + position % size for position in range(start, stop)]

    def release(self, sequence: Cacheable) -> None:
        """Let go of all blocks of a sequence; what they cached stays findable until they are reused."""
        self.pool.release(sequence.block_table)
        sequence.block_table = BlockTable()
        sequence.num_computed_tokens = 0
        if self.states is not None and sequence.state is not None:
            self.states.release(sequence.state)
            sequence.state = None

    def check_integrity(self, sequences: Iterable[Cacheable]) -> None:
        """Assert that blocks and the block tables of all live sequences agree."""
        held = list(sequences)
        self.pool.check_integrity([sequence.block_table for sequence in held])
        if self.states is not None:
            self.states.pool.check_integrity([one.state.slots for one in held if one.state is not None])
