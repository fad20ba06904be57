"""Chained hashes of full blocks: equal hashes mean equal K and V in every layer.

    h(b) = H( h(b−1), tokens of b, seed of b, documents in b )          h(−1) = H( salt )

K and V above the first layer depend on the position method, so each block's seed is the digest of the resolved method,
except where the block lies wholly in the rows that the method reads plainly (`ModelPositions.block_seed`). Rows of a
reply that leave far keys out (`cache.attention.selection`) are in blocks that only the same reply finds again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from prerope.cache.blocks.documents import DocumentSpan, layout
from prerope.rope.model import ModelPositions
from prerope.rope.reading import UNBOUNDED


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
