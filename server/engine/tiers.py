"""Moves blocks between an engine and the tiers below its cache: filled ones go out, awaited ones come in."""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from importlib import metadata
from itertools import dropwhile, takewhile

import torch
from prerope.cache.blocks.manager import KVCacheManager
from prerope.cache.storage import KVStorage
from prerope.cache.tier import BlockTier
from prerope.cache.transfer import bring_back
from prerope.server.config import EngineConfig
from prerope.server.engine.documents import DocumentReader
from prerope.server.engine.sequence import Sequence
from prerope.server.errors import ConfigurationError
from prerope.server.models.model import Model
from torch import Tensor, nn

BLOCKS_A_STEP = 64
"""The most blocks that are taken in before a step, so that reading a long prompt's blocks stops nobody."""
WAIT_S = 0.002
"""How long a step waits for a tier, where it has nothing else to do."""
SAMPLES = 4096
"""Values of each tensor that stand for a model's weights."""


class Tiers:
    """A `BlockTier` beside one cache. All methods are of the engine's thread."""

    def __init__(self, tier: BlockTier, storage: KVStorage, cache: KVCacheManager) -> None:
        self.tier, self._storage, self._cache = tier, storage, cache

    def ask(self, sequence: Sequence) -> None:
        """Begin to fetch what the tiers have of a new sequence; it is admitted when that has come."""
        missing = (dropwhile(self._in_cache, chain) for chain in self._chains(sequence))
        chains = [found for chain in missing if (found := list(takewhile(self.tier.holds, chain)))]
        if chains:
            sequence.fetch = self.tier.fetch(chains)

    def _in_cache(self, block_hash: bytes) -> bool:
        return self._cache.pool.find(block_hash) is not None

    def _chains(self, sequence: Sequence) -> Iterable[Iterable[bytes]]:
        usable = sequence.num_reusable_tokens // self._cache.block_size
        yield sequence.hasher.each(sequence.token_ids, usable)
        for document in sequence.request.documents:
            if document.copied < document.stop:
                reader = DocumentReader.of(sequence, document, self._cache.block_size)
                tail = reader.hasher.tail(reader.token_ids)
                yield [*reader.hasher.hashes, *([] if tail is None else [tail])]

    def take_in(self, waiting: Iterable[Sequence]) -> None:
        """Move blocks that have come for waiting sequences into the cache, `BLOCKS_A_STEP` at most."""
        room = BLOCKS_A_STEP
        for sequence in waiting:
            fetch = sequence.fetch
            if fetch is None:
                continue
            ended, arrived = fetch.done.is_set(), list[tuple[bytes, Tensor]]()
            while len(arrived) < room:
                try:
                    arrived.append(fetch.blocks.get_nowait())
                except queue.Empty:
                    break
            room -= len(arrived)
            self._install(arrived)
            if ended and fetch.blocks.empty():
                sequence.fetch = None

    def _install(self, arrived: Rows[tuple[bytes, Tensor]]) -> None:
        """Blocks for contents that are known from now on, as many as there is room for."""
        pool = self._cache.pool
        wanted = [one for one in dict(arrived).items() if self._cache.prefix_caching and not self._in_cache(one[0])]
        blocks = pool.allocate(min(len(wanted), pool.num_free))
        for block, (block_hash, _) in zip(blocks, wanted, strict=False):
            pool.remember(block, block_hash)
        pool.release(blocks)
        if blocks:
            self._storage.write_blocks(blocks, torch.stack([content for _, content in wanted[: len(blocks)]]))

    def wait(self) -> None:
        """Wait a moment, where sequences wait for nothing but a tier."""
        time.sleep(WAIT_S)

    def keep(self, filled: Rows[tuple[int, bytes]]) -> None:
        """Hand blocks that a step has filled, as (block, hash), to the tiers."""
        if filled:
            blocks, hashes = [block for block, _ in filled], [block_hash for _, block_hash in filled]
            payloads, arrived = bring_back(self._storage.read_blocks(blocks))
            self.tier.write(hashes, payloads, arrived)


def open_tier(model: Model, config: EngineConfig, storage: KVStorage, report: Callable[[str], None]) -> BlockTier:
    """The tiers that a deployment asks for. Raises ConfigurationError where the folder cannot be used."""
    shapes = [(tuple(t.shape[1:]), str(t.dtype)) for t in (*storage.keys, *storage.values)]
    identity = model_identity(model.raw.model, metadata.version("prerope"), config.weight_quantization, shapes)
    try:
        tier = BlockTier(
            config.tier_dir,
            identity,
            folder_limit=config.tier_bytes,
            memory_limit=config.tier_memory,
            report=report,
        )
    except OSError as error:
        raise ConfigurationError(
            f"CACHE_TIER_DIR is {config.tier_dir}: it cannot be read ({error.strerror}); name a folder of your own"
        ) from error
    report(f"cache tiers hold {tier.stats.num_bytes / 2**30:.2f} GiB for this model")
    return tier


def model_identity(model: nn.Module, *more: object) -> bytes:
    """A digest of what K and V depend on beside tokens and positions: samples of every weight, and `more`."""
    h = hashlib.blake2b(repr(more).encode(), digest_size=32)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        plain = getattr(tensor, "qdata", tensor).detach().reshape(-1)
        picked = plain[:: max(1, plain.numel() // SAMPLES)].cpu().contiguous()
        h.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        h.update(picked.view(torch.uint8).numpy().data)
    return h.digest()
