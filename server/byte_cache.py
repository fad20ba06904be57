"""A cache that is bounded by the bytes of what it keeps, and counts them: every cache that clients can fill is one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a cache holds, and what has happened to it."""

    num_bytes: int
    max_bytes: int
    num_entries: int
    hits: int
    misses: int
    evictions: int


class ByteCache(Generic[K, V]):
    """Keys to values, the least recently used put out first. What is larger than all of it is not kept."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._hits = self._misses = self._evictions = 0

    def get(self, key: K) -> V | None:
        entry = self._entries.get(key)
        if entry is None:
            self._misses += 1
            return None
        self._hits += 1
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: K, value: V, num_bytes: int) -> None:
        """Keep a value of so many bytes, its key's included."""
        if key in self._entries:
            self.num_bytes -= self._entries.pop(key)[1]
        if num_bytes > self.max_bytes:
            return
        self._entries[key] = value, num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            _, (_, freed) = self._entries.popitem(last=False)
            self.num_bytes -= freed
            self._evictions += 1

    def __len__(self) -> int:
        return len(self._entries)

    def stats(self) -> CacheStats:
        return CacheStats(self.num_bytes, self.max_bytes, len(self._entries), self._hits, self._misses, self._evictions)
