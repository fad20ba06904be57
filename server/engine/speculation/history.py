"""The tokens of one sequence, and where it has been before: what is likely to come next, without a second model.

Where the last tokens have stood earlier, what followed them there is followed again, token after token, while it comes
true; where it does not, the earlier place that has most of the last tokens in common is looked up. Places are found as
LZ77 compressors find them (RFC 1951, 4): each run of `GRAM` tokens has a chain of the places that it ends before, the
newest first, of which a few are compared. So a token costs the same however long the sequence is.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

GRAM = 3
"""Tokens that a place must have in common with the end at least."""
MAX_PLACES, MAX_COMMON = 8, 32
"""Places that are compared, and tokens that are compared of each."""
_PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_CHUNK = 2**18  # tokens that are hashed at once
_NOWHERE = -1


class History:
    """Follows a list of tokens that only grows; about 12 bytes a token beside the list.

    Attributes:
        token_ids: the list.
        place: where in it the tokens stand that may come next; None: nowhere.
        common: how many tokens before that place are those at the end; counted no further than `MAX_COMMON` when it is
            looked up, and on from there while it comes true.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = token_ids
        self.place: int | None = None
        self.common = 0
        self._before = array("i")  # of each place, the one before it in its chain
        self._bits = 10
        self._newest = array("i")
        self._num_known = 0

    def read(self, num_known: int) -> None:
        """Take in the tokens up to number `num_known` without following: a prompt."""
        self._index(num_known)
        self._look_up()

    def follow(self, token: int) -> bool | None:
        """Take in the next token of the list; whether it is the one that was expected, None where none was."""
        hit = None if self.place is None else self.token_ids[self.place] == token
        self._add(self._num_known + 1)
        if hit and self.place is not None:
            self.place, self.common = self.place + 1, self.common + 1
        else:
            self._look_up()
        return hit

    @property
    def num_known(self) -> int:
        """Tokens that were taken in."""
        return self._num_known

    def expected(self, count: int) -> list[int]:
        """The next `count` tokens as they stand at `place`; where the list ends, they go on as they began."""
        if self.place is None:
            return []
        found = list(self.token_ids[self.place : min(self.place + count, self._num_known)])
        period = len(found)
        while len(found) < count:
            found.append(found[len(found) - period])
        return found

    def _look_up(self) -> None:
        """The place with most in common, and of equals the newest; not the end itself."""
        self.place, self.common = None, 0
        end, ids = self._num_known, self.token_ids
        place = self._before[end] if end >= GRAM else _NOWHERE
        for _ in range(MAX_PLACES):
            if place < 0:
                return
            common, most = 0, min(place, MAX_COMMON)
            while common < most and ids[place - 1 - common] == ids[end - 1 - common]:
                common += 1
            if common >= GRAM and common > self.common:
                self.place, self.common = place, common
            if common == MAX_COMMON:
                return
            place = self._before[place]

    def _add(self, end: int) -> None:
        """Enter the place after the first `end` tokens."""
        if end >= len(self._newest):
            self._index(end)
            return
        ids, before = self.token_ids, _NOWHERE
        if end >= GRAM:
            first, second, third = ids[end - 3], ids[end - 2], ids[end - 1]
            mixed = (first * _PRIMES[0] + second * _PRIMES[1] + third * _PRIMES[2]) & 0xFFFFFFFF
            chain = mixed >> (32 - self._bits)
            before, self._newest[chain] = self._newest[chain], end
        self._before.append(before)
        self._num_known = end

    def _index(self, num_known: int) -> None:
        """All places anew, with room for as many again."""
        self._bits = max(10, num_known.bit_length())
        before = np.full(num_known + 1, _NOWHERE, dtype=np.int32)
        newest = np.full(2**self._bits, _NOWHERE, dtype=np.int32)
        ids = np.array(self.token_ids[:num_known], dtype=np.uint32)
        for begin in range(GRAM, num_known + 1, _CHUNK):
            ends = np.arange(begin, min(begin + _CHUNK, num_known + 1))
            mixed = np.zeros(len(ends), dtype=np.uint32)
            for n, prime in enumerate(_PRIMES):
                mixed += ids[ends - GRAM + n] * np.uint32(prime)
            chains = mixed >> np.uint32(32 - self._bits)
            order = np.argsort(chains, kind="stable")
            same = chains[order][1:] == chains[order][:-1]
            before[ends] = newest[chains]
            before[ends[order[1:][same]]] = ends[order[:-1][same]]
            newest[chains] = ends  # of equal chains the last one stays
        self._before, self._newest = array("i", before.tobytes()), array("i", newest.tobytes())
        self._num_known = num_known
