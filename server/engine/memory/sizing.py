"""How large the cache is and how long a request may be, from the method, the settings and free memory.

On a GPU what the cache gets is what the largest steps leave, and they are run to see what they take (`warm_up`):

    room(L) = min(total · GPU_MEMORY_UTILIZATION − CONTEXT_BYTES, held + free) − peak(L) − margin

peak(L) is the most that this process had allocated in them, weights and tables included, at contexts of L tokens;
held + free what it could have, beside other processes. A deployment of L tokens works if room(L) holds L tokens. The
longer the context, the more a step takes and the less is left, so whatever works at L works below it, too. Where L is
given, it works or the start is refused. Else L is at first what the method is meant for; where it does not work, the
next is what did fit, but not less than half: so the first that works is at least half of the longest that would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from prerope.cache.storage import KVStorage, block_bytes
from prerope.rope.model import default_max_model_len, main_group
from prerope.rope.reading import MethodError
from prerope.server.config import EngineConfig
from prerope.server.engine.memory.warm_up import warm_up
from prerope.server.errors import ConfigurationError
from prerope.server.machine.allowance import free_memory
from prerope.server.models.model import Model
from prerope.server.models.weights import DTYPES

CPU_SHARE, CPU_LIMIT = 0.4, 4 * 2**30
"""On a CPU, others live on the machine too: this share of what is free, and never more than this many bytes."""

CONTEXT_BYTES = 512 * 2**20
"""GPU memory that the driver keeps for a process beside torch's own allocations, kernels included."""

MARGIN_BYTES, MARGIN_SHARE = 512 * 2**20, 0.02
"""GPU memory left free for CUDA graphs and for gaps between allocations: bytes, and a share of the whole memory."""

WARM_UP_BLOCKS = 4

STATES_A_SEQUENCE, STATE_SHARE, LEAST_STATES = 3, 0.25, 2
"""Slots for states: one of its own and two kept ones for each sequence, of at most this share of the cache's bytes."""

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CacheSize:
    """num_bytes is keys and values together; max_model_len in tokens; states are those of recurrent layers."""

    num_blocks: int
    num_bytes: int
    dtype: torch.dtype
    max_model_len: int
    num_states: int = 0
    state_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The bytes of all keys, values and states."""
        return self.num_bytes + self.state_bytes


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """A device's bytes: total; free for any process; held by this one through torch, in use or not."""

    total: int
    free: int
    held: int


class DeviceMemory:
    """What a GPU's memory reads now, and its peak."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def release(self) -> None:
        """Give back what torch holds and nobody uses; the peak counts from here."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def now(self) -> MemoryReading:
        free, total = torch.cuda.mem_get_info(self._device)
        return MemoryReading(total, free, torch.cuda.memory_reserved(self._device))

    def peak(self) -> int:
        """The most that was allocated at once, in bytes, what is allocated all the time included."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)


def size_cache(
    model: Model, config: EngineConfig, report: Report = lambda _: None, memory: DeviceMemory | None = None
) -> CacheSize:
    """Blocks that fit, and the longest request. ConfigurationError where MAX_MODEL_LEN cannot be held.

    memory: of the model's device; None: as it is, where it is a GPU.
    """
    if memory is None and model.device.type == "cuda":
        memory = DeviceMemory(model.device)
    wanted = config.max_model_len or _method_length(model, config)
    if memory is None:
        return _size_on_host(model, config, wanted, report)
    if config.kv_cache_memory is None:
        size = _size_beside_steps(model, config, wanted, memory, report)
    else:
        size = _checked(model, config, wanted, config.kv_cache_memory)
        _check_beside_steps(model, config, size, memory, report)
    memory.release()
    return size


def _checked(model: Model, config: EngineConfig, wanted: int, available: int) -> CacheSize:
    """The size of a cache of so many bytes; ConfigurationError where they hold too little."""
    size = _blocks(model, config, wanted, available)
    one_block = _block_bytes(model, config)
    if size.num_blocks < 1:
        raise ConfigurationError(
            f"KV_CACHE_MEMORY: {available} bytes do not hold one block of {config.block_size} tokens, {one_block} bytes"
        )
    if config.max_model_len is not None and size.max_model_len < wanted:
        raise ConfigurationError(
            _too_long(model, config, wanted, available) + "; lower MAX_MODEL_LEN or raise KV_CACHE_MEMORY to "
            f"{-(-wanted // config.block_size) * one_block + size.state_bytes} bytes"
        )
    return size


def _size_beside_steps(
    model: Model, config: EngineConfig, wanted: int, memory: DeviceMemory, report: Report
) -> CacheSize:
    """What the largest steps leave: see the module's algebra."""
    length = wanted
    while True:
        peak = _peak(model, config, length, memory, report)
        reading = memory.now()
        available = 0 if peak is None else _room(config, reading, peak)
        size = _blocks(model, config, length, available)
        if size.max_model_len == length:
            return size
        if config.max_model_len is not None or length <= config.block_size:
            raise _does_not_fit(model, config, length, available, peak, reading)
        length = max(size.max_model_len, length // 2)


def _room(config: EngineConfig, reading: MemoryReading, peak: int) -> int:
    share = int(reading.total * config.gpu_memory_utilization) - CONTEXT_BYTES
    margin = MARGIN_BYTES + int(reading.total * MARGIN_SHARE)
    return max(0, min(share, reading.held + reading.free) - peak - margin)


def _check_beside_steps(
    model: Model, config: EngineConfig, size: CacheSize, memory: DeviceMemory, report: Report
) -> None:
    """A cache that was asked for need not leave a margin, but the largest steps have to fit beside it."""
    peak = _peak(model, config, size.max_model_len, memory, report)
    reading = memory.now()
    if peak is None:
        raise _does_not_fit(model, config, size.max_model_len, 0, peak, reading)
    allowed = reading.held + reading.free
    if size.total_bytes > allowed - peak:
        raise ConfigurationError(
            f"KV_CACHE_MEMORY: the cache would take {size.total_bytes} bytes, but of {allowed} that this process could "
            f"have of the GPU's memory, weights and the largest step take {peak}: lower it to "
            f"{max(0, allowed - peak)} or less, lower MAX_BATCHED_TOKENS or MAX_NUM_SEQS, or leave it unset"
        )


def _peak(model: Model, config: EngineConfig, length: int, memory: DeviceMemory, report: Report) -> int | None:
    """Bytes in the largest steps at this length; None where memory does not last."""
    memory.release()
    report(f"measuring the memory of the largest steps at {length} tokens")
    shapes = [layer.shape for layer in model.layers]
    try:
        storage = KVStorage(
            shapes,
            WARM_UP_BLOCKS,
            config.block_size,
            _dtype(model, config),
            model.device,
            model.states,
            LEAST_STATES if model.states else 0,  # the real ones are counted with the cache
        )
        warm_up(model, config, length, storage, report)
    except torch.OutOfMemoryError:
        if not model.raw.ranks.alone:
            raise  # the others wait for this one within the step: it must end
        return None
    return memory.peak()


def _blocks(model: Model, config: EngineConfig, wanted: int, available: int) -> CacheSize:
    """How many blocks fit, at most what all sequences use at full length; `wanted`: the most tokens of one."""
    one_block = _block_bytes(model, config)
    most = config.max_num_seqs * -(-wanted // config.block_size)
    num_states, state_bytes = _states(model, config, available)
    num_blocks = min(max(0, available - state_bytes) // one_block, most)
    num_blocks = model.raw.ranks.least(num_blocks)  # a block is one on all ranks
    length = min(wanted, num_blocks * config.block_size)
    return CacheSize(num_blocks, num_blocks * one_block, _dtype(model, config), length, num_states, state_bytes)


def _states(model: Model, config: EngineConfig, available: int) -> tuple[int, int]:
    """Slots for states, and their bytes: of STATE_CACHE_MEMORY, or what is meant for a cache of `available` bytes."""
    one = sum([state.num_bytes for state in model.states])
    if not one:
        return 0, 0
    limit, most = config.state_cache_memory, STATES_A_SEQUENCE * config.max_num_seqs
    num_states = min(int(available * STATE_SHARE) // one, most) if limit is None else limit // one
    num_states = max(num_states, LEAST_STATES) if limit is None else num_states
    if num_states < LEAST_STATES:
        raise ConfigurationError(
            f"STATE_CACHE_MEMORY is {limit} bytes, but a state of this model's recurrent layers takes {one} and "
            f"{LEAST_STATES} are needed: raise it to {LEAST_STATES * one} bytes, or leave it unset"
        )
    return num_states, num_states * one


def check_recurrent(model: Model, config: EngineConfig) -> None:
    """ConfigurationError for settings that do not go with layers that keep a state beside keys and values."""
    if model.states and config.prefix_caching and (config.tier_dir is not None or config.tier_memory):
        raise ConfigurationError(
            f"CACHE_TIER_DIR and CACHE_TIER_MEMORY: model type {model.raw.family!r} has recurrent layers, whose states "
            "tiers do not keep, so that nothing they hold could be used; leave both unset"
        )


def _dtype(model: Model, config: EngineConfig) -> torch.dtype:
    return model.dtype if config.kv_cache_dtype == "auto" else DTYPES[config.kv_cache_dtype]


def _block_bytes(model: Model, config: EngineConfig) -> int:
    shapes, bounded = [layer.shape for layer in model.layers], config.rope.select is not None
    return block_bytes(shapes, config.block_size, _dtype(model, config), bounded=bounded)


def _too_long(model: Model, config: EngineConfig, wanted: int, available: int) -> str:
    one_block = _block_bytes(model, config)
    capacity = available // one_block * config.block_size
    return (
        f"MAX_MODEL_LEN is {wanted} tokens, but the KV cache holds {capacity} ({available / 2**30:.2f} GiB at "
        f"{one_block // config.block_size} bytes a token)"
    )


def _does_not_fit(
    model: Model, config: EngineConfig, length: int, available: int, peak: int | None, reading: MemoryReading
) -> ConfigurationError:
    remedy = "lower MAX_MODEL_LEN, MAX_BATCHED_TOKENS or MAX_NUM_SEQS, or serve a smaller model"
    if peak is None:
        return ConfigurationError(
            f"the largest steps at {length} tokens do not fit in the GPU's memory, of which "
            f"{(reading.held + reading.free) / 2**30:.2f} GiB are this process's or free: {remedy}"
        )
    return ConfigurationError(
        f"{_too_long(model, config, length, available)}: of the GPU's {reading.total / 2**30:.2f} GiB, of which "
        f"{reading.free / 2**30:.2f} GiB are free, weights and the largest step take {peak / 2**30:.2f} GiB; {remedy}, "
        f"or raise GPU_MEMORY_UTILIZATION ({config.gpu_memory_utilization:g})"
    )


def _method_length(model: Model, config: EngineConfig) -> int:
    try:
        return default_max_model_len(config.rope, model.rotaries[main_group(model.rotaries)])
    except MethodError as error:
        raise ConfigurationError(str(error)) from error


def _size_on_host(model: Model, config: EngineConfig, wanted: int, report: Report) -> CacheSize:
    """The size of a cache in memory that is free for this process; one that was asked for and is larger is refused."""
    free = free_memory()
    share = min(int(free.amount * CPU_SHARE), CPU_LIMIT) // model.raw.ranks.size  # they live on one machine
    size = _checked(model, config, wanted, config.kv_cache_memory or share)
    num_bytes = size.total_bytes * model.raw.ranks.size
    if num_bytes > free.amount:
        raise ConfigurationError(
            f"KV_CACHE_MEMORY: the cache would take {num_bytes / 2**30:.2f} GiB, but {free.amount / 2**30:.2f} "
            f"GiB are free ({free.source}): lower it, lower MAX_MODEL_LEN or MAX_NUM_SEQS, or leave it unset"
        )
    report(f"{free.amount / 2**30:.2f} GiB are free ({free.source}); the cache takes {num_bytes / 2**30:.2f} GiB")
    return size
