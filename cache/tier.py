"""Blocks of the KV cache outside of it: in host memory, and in a folder that outlives the process.

    pool ── write (behind the step) ──► memory, LRU ──► folder, LRU: one safetensors file a block
         ◄── fetch (ahead of admission) ───────┴──────────────┘

A block is found by the hash that the prefix cache gives it, which covers its tokens, what stands before them, the
position method and the salt; files are for one `identity` besides: weights, dtype, shape of a block. A file that is
damaged, foreign or gone is a miss and a warning, never another answer, and a folder that cannot be written to stops
writing, not serving. Several servers may share a folder: files appear whole, and whoever passes the limit deletes the
oldest. Files are private to the user. Nothing here knows sequences, positions or the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save
from torch import Tensor

MAX_PENDING_WRITES = 512
"""Blocks; more than that are not written: what is read again soon is in the pool."""
REST_S = 60.0
"""Seconds without a try after a write has failed."""
HEADROOM = 0.9
"""Share of the limit that is left when the oldest files are deleted."""


@dataclass(slots=True)
class TierStats:
    """Totals since the start, in blocks; `num_bytes`: of the folder now, as far as this process knows."""

    num_read: int = 0
    num_read_from_memory: int = 0
    num_written: int = 0
    num_damaged: int = 0
    num_failed_writes: int = 0
    num_dropped_writes: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class Fetch:
    """Blocks on their way from a tier: `blocks` grows until `done` is set. Whoever gives up sets `cancelled`."""

    chains: Sequence[Sequence[bytes]]
    blocks: queue.SimpleQueue[tuple[bytes, Tensor]] = field(default_factory=queue.SimpleQueue)
    done: threading.Event = field(default_factory=threading.Event)
    cancelled: bool = False


class BlockTier:
    """Host memory and a folder behind one pool. Methods are called by the engine's thread; files have two of ours."""

    def __init__(
        self,
        folder: Path | None,
        identity: bytes,
        *,
        folder_limit: int = 0,
        memory_limit: int = 0,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """identity: what a block's bytes depend on beside its hash. Limits in bytes; 0 is none of that tier."""
        self.stats = TierStats()
        self._identity = hashlib.blake2b(identity, digest_size=16).hexdigest()
        self._memory: OrderedDict[bytes, Tensor] = OrderedDict()
        self._memory_limit, self._memory_bytes = memory_limit, 0
        self._lock = threading.Lock()
        self._folder = None if folder is None else folder / self._identity
        self._limit, self._report, self._rest_until = folder_limit, report, 0.0
        self._known: set[bytes] = set()
        self._writes: queue.SimpleQueue[tuple[Sequence[bytes], Tensor, Callable[[], None]] | None] = queue.SimpleQueue()
        self._pending_writes = 0
        self._fetches: queue.SimpleQueue[Fetch | None] = queue.SimpleQueue()
        if self._folder is not None:
            self._look_around(self._folder)
        self._threads = [
            threading.Thread(target=work, name=f"tier {name}", daemon=True)
            for name, work in (("writer", self._write_all), ("reader", self._fetch_all))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Write what is pending, and end the threads."""
        self._writes.put(None)
        self._fetches.put(None)
        for thread in self._threads:
            thread.join(timeout=30)

    def holds(self, block_hash: bytes) -> bool:
        """Whether a fetch of this block is likely to find it."""
        return block_hash in self._memory or block_hash in self._known

    # --- out ---

    def write(self, hashes: Sequence[bytes], payloads: Tensor, arrived: Callable[[], None] = lambda: None) -> None:
        """Keep blocks: payloads [n, block bytes] uint8 on the host, there once `arrived` returns.

        Never waits; what is too much at once is dropped.
        """
        if self._pending_writes + len(hashes) > MAX_PENDING_WRITES:
            self.stats.num_dropped_writes += len(hashes)
            return
        self._pending_writes += len(hashes)
        self._writes.put((hashes, payloads, arrived))

    def _write_all(self) -> None:
        while (item := self._writes.get()) is not None:
            hashes, payloads, arrived = item
            arrived()
            for block_hash, payload in zip(hashes, payloads, strict=True):
                if self._memory_limit:
                    self._remember(block_hash, payload.clone())
                if self._folder is not None and block_hash not in self._known:
                    self._try_to_write(block_hash, payload)
                self._pending_writes -= 1

    def _remember(self, block_hash: bytes, payload: Tensor) -> None:
        with self._lock:
            if block_hash not in self._memory:
                self._memory[block_hash] = payload
                self._memory_bytes += payload.nbytes
            self._memory.move_to_end(block_hash)
            while self._memory_bytes > self._memory_limit:
                self._memory_bytes -= self._memory.popitem(last=False)[1].nbytes

    def _try_to_write(self, block_hash: bytes, payload: Tensor) -> None:
        if time.monotonic() < self._rest_until:
            self.stats.num_dropped_writes += 1
            return
        try:
            self._write(block_hash, payload)
        except OSError as error:
            self.stats.num_failed_writes += 1
            self._rest_until = time.monotonic() + REST_S
            self._report(
                f"warning: CACHE_TIER_DIR cannot be written to ({error.strerror}); the next try is in a minute"
            )

    def _write(self, block_hash: bytes, payload: Tensor) -> None:
        path = self._path(block_hash)
        assert self._folder is not None
        self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self._folder, path.parent):  # one by one: `parents` have the mode that others' folders have
            folder.mkdir(mode=0o700, exist_ok=True)
        content = save(
            {"block": payload}, metadata={"identity": self._identity, "checksum": checksum(block_hash, payload)}
        )
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self._known.add(block_hash)
        self.stats.num_written += 1
        self.stats.num_bytes += len(content)
        if self.stats.num_bytes > self._limit:
            self._delete_oldest()

    def _delete_oldest(self) -> None:
        assert self._folder is not None
        files = self._look_around(self._folder)
        for _, size, path in sorted(files):
            if self.stats.num_bytes <= self._limit * HEADROOM:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            self._known.discard(bytes.fromhex(path.stem))
            self.stats.num_bytes -= size

    def _look_around(self, folder: Path) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of every file that is there; what others have written is known from then on.

        A file of the future, of a clock that was ahead, would outlast all that is used meanwhile: it was used now.
        """
        files, now = [], time.time()
        for path in folder.glob("*/*.safetensors"):
            with contextlib.suppress(OSError, ValueError):
                status = path.stat()
                files.append((min(status.st_mtime, now), status.st_size, path))
                self._known.add(bytes.fromhex(path.stem))
                if status.st_mtime > now:
                    os.utime(path, (now, now))
        self.stats.num_bytes = sum(size for _, size, _ in files)
        return files

    # --- in ---

    def fetch(self, chains: Sequence[Sequence[bytes]]) -> Fetch:
        """Begin to read chains of blocks, each as far as its blocks are there."""
        fetch = Fetch(chains)
        self._fetches.put(fetch)
        return fetch

    def _fetch_all(self) -> None:
        while (fetch := self._fetches.get()) is not None:
            try:
                for chain in fetch.chains:
                    self._fetch_chain(fetch, chain)
            finally:
                fetch.done.set()

    def _fetch_chain(self, fetch: Fetch, chain: Sequence[bytes]) -> None:
        for block_hash in chain:
            payload = None if fetch.cancelled else self._read(block_hash)
            if payload is None:
                return
            self.stats.num_read += 1
            fetch.blocks.put((block_hash, payload))

    def _read(self, block_hash: bytes) -> Tensor | None:
        with self._lock:
            payload = self._memory.get(block_hash)
        if payload is not None:
            self.stats.num_read_from_memory += 1
        if payload is not None or self._folder is None or block_hash not in self._known:
            return payload
        path = self._path(block_hash)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:  # another server has deleted it
            self._known.discard(block_hash)
            return None
        payload = self._checked(block_hash, content)
        if payload is None:
            self.stats.num_damaged += 1
            self._known.discard(block_hash)
            self._report(f"warning: a damaged file in CACHE_TIER_DIR was deleted: {path.name}")
            with contextlib.suppress(OSError):
                path.unlink()
        return payload

    def _checked(self, block_hash: bytes, content: bytes) -> Tensor | None:
        """The block of a file; None where it is not one of ours, whole and unchanged."""
        try:
            length = int.from_bytes(content[:8], "little")
            header = content[8 : 8 + length]
            payload = tensors_of(content)["block"]
        except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError):
            return None
        ours = payload.dtype == torch.uint8 and payload.dim() == 1
        if not ours or self._identity.encode() not in header or checksum(block_hash, payload).encode() not in header:
            return None
        return payload

    def _path(self, block_hash: bytes) -> Path:
        assert self._folder is not None
        name = block_hash.hex()
        return self._folder / name[:2] / f"{name}.safetensors"


def checksum(block_hash: bytes, payload: Tensor) -> str:
    """The checksum of a block's bytes and its hash together: a file under another block's name counts as damaged."""
    return hashlib.blake2b(payload.numpy().data, key=block_hash, digest_size=16).hexdigest()


def folder_secret(folder: Path) -> bytes:
    """32 random bytes that all servers on a folder share, and nobody else: tenants keep their names over restarts."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path, own = folder / "secret", folder / f"secret.{secrets.token_hex(4)}"
    with open(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(32))
    with contextlib.suppress(FileExistsError):
        os.link(own, path)  # whole when it appears, and the first one stays
    own.unlink()
    secret = path.read_bytes()
    if len(secret) != 32:
        raise OSError(f"{path.name} in CACHE_TIER_DIR is damaged: delete it")
    return secret
