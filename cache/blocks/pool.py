"""Blocks of the KV cache: who holds them, which are free, and which free ones still hold a known prefix.

A block is *held* (reference count > 0) or *free*. A free block may be *cached*: its content is known by hash and can be
taken up again until the block is allocated for something else. Free blocks are reused least recently freed first.
Knows neither tensors nor sequences. All operations are O(1) a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """`num_blocks` blocks, ids 0…num_blocks−1."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be reused comes first
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

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
