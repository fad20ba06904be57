"""A cache that is bounded by the bytes of what it keeps, and counts them: every cache that clients can fill is one.

Entries have owners. Where there is no room, whoever has used nothing for `IDLE_S` gives up what it used longest ago,
and where there is no such owner, the owner of the most. So nobody who is there loses what is within an equal share to
somebody who keeps more, and those who are gone do not hold the room.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

IDLE_S = 600.0
"""An owner who has used nothing for so long is taken to be gone."""


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a cache holds, and what has happened to it."""

    num_bytes: int
    max_bytes: int
    num_entries: int
    hits: int
    misses: int
    evictions: int


@dataclass(slots=True)
class _Share(Generic[K, V]):
    """One owner's entries, the least recently used first, and their bytes."""

    entries: OrderedDict[K, tuple[V, int]] = field(default_factory=OrderedDict)
    num_bytes: int = 0
    used_at: float = 0.0


class ByteCache(Generic[K, V]):
    """Keys to values. What is larger than all of it is not kept."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self.max_bytes = max_bytes
        self._clock = clock
        self.num_bytes = 0
        self._owners: dict[K, str] = {}
        self._shares: OrderedDict[str, _Share[K, V]] = OrderedDict()  # who used anything longest ago first
        self._by_size: list[tuple[int, str]] = []  # a heap: the largest share first
        self._hits = self._misses = self._evictions = 0

    def get(self, key: K) -> V | None:
        owner = self._owners.get(key)
        if owner is None:
            self._misses += 1
            return None
        self._hits += 1
        entries = self._used(owner).entries
        entries.move_to_end(key)
        return entries[key][0]

    def remove(self, key: K) -> bool:
        """Whether there was such an entry."""
        known = key in self._owners
        if known:
            self._remove(key)
        return known

    def put(self, key: K, value: V, num_bytes: int, owner: str = "") -> None:
        """Keep a value of so many bytes, its key's included."""
        if key in self._owners:
            self._remove(key)
        if num_bytes > self.max_bytes:
            return
        share = self._used(owner)
        share.entries[key] = value, num_bytes
        share.num_bytes += num_bytes
        self._owners[key] = owner
        self.num_bytes += num_bytes
        self._sized(owner)
        while self.num_bytes > self.max_bytes:
            self._remove(next(iter(self._who_gives_up().entries)))
            self._evictions += 1

    def _used(self, owner: str) -> _Share[K, V]:
        share = self._shares.setdefault(owner, _Share())
        self._shares.move_to_end(owner)
        share.used_at = self._clock()
        return share

    def _who_gives_up(self) -> _Share[K, V]:
        oldest = next(iter(self._shares.values()))
        if self._clock() - oldest.used_at > IDLE_S:
            return oldest
        while True:
            size, owner = self._by_size[0]
            share = self._shares.get(owner)
            if share is not None and share.num_bytes == -size:
                return share
            heapq.heappop(self._by_size)  # of a size that it no longer has

    def _sized(self, owner: str) -> None:
        """The owner's share has another size: its place is noted anew, and notes that are out of date are few."""
        if len(self._by_size) > 2 * len(self._shares) + 64:
            self._by_size = [(-share.num_bytes, name) for name, share in self._shares.items()]
            heapq.heapify(self._by_size)
        else:
            heapq.heappush(self._by_size, (-self._shares[owner].num_bytes, owner))

    def _remove(self, key: K) -> None:
        owner = self._owners.pop(key)
        share = self._shares[owner]
        _, freed = share.entries.pop(key)
        share.num_bytes -= freed
        self.num_bytes -= freed
        if share.entries:
            self._sized(owner)
        else:
            del self._shares[owner]

    def __len__(self) -> int:
        return len(self._owners)

    def stats(self) -> CacheStats:
        return CacheStats(self.num_bytes, self.max_bytes, len(self), self._hits, self._misses, self._evictions)
