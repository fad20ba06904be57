"""How large the cache is and how long a request may be, from the method, the settings and free memory."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from cache.storage import block_bytes
from rope.model_positions import default_max_model_len, main_group
from rope.reading import MethodError
from server.engine.config import EngineConfig
from server.engine.model import DTYPES, Model
from server.errors import ConfigurationError

CPU_SHARE, CPU_LIMIT = 0.4, 4 * 2**30
"""On a CPU, others live on the machine too: this share of what is free, and never more than this many bytes."""
CUDA_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class CacheSize:
    """num_bytes is keys and values together; max_model_len in tokens."""

    num_blocks: int
    num_bytes: int
    dtype: torch.dtype
    max_model_len: int


def size_cache(model: Model, config: EngineConfig) -> CacheSize:
    """Blocks that fit, and the longest request. ConfigurationError where MAX_MODEL_LEN cannot be held."""
    dtype = model.dtype if config.kv_cache_dtype == "auto" else DTYPES[config.kv_cache_dtype]
    one_block = block_bytes([layer.shape for layer in model.layers], config.block_size, dtype)
    available = config.kv_cache_memory or _free_memory(model.device)
    wanted = config.max_model_len or _method_length(model, config)
    # More than every sequence at full length is never used.
    most = config.max_num_seqs * -(-wanted // config.block_size)
    num_blocks = min(available // one_block, most)
    capacity = num_blocks * config.block_size
    if capacity < 1:
        raise ConfigurationError(
            f"KV_CACHE_MEMORY: {available} bytes do not hold one block of {config.block_size} tokens, {one_block} bytes"
        )
    if config.max_model_len is not None and capacity < wanted:
        raise ConfigurationError(
            f"MAX_MODEL_LEN is {wanted} tokens, but the KV cache holds {capacity} ({available / 2**30:.2f} GiB at "
            f"{one_block // config.block_size} bytes a token); lower MAX_MODEL_LEN or raise KV_CACHE_MEMORY to "
            f"{-(-wanted // config.block_size) * one_block} bytes"
        )
    return CacheSize(num_blocks, num_blocks * one_block, dtype, min(wanted, capacity))


def _method_length(model: Model, config: EngineConfig) -> int:
    try:
        return default_max_model_len(config.rope, model.rotaries[main_group(model.rotaries)])
    except MethodError as error:
        raise ConfigurationError(str(error)) from error


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free * CUDA_SHARE)
    return min(int(psutil.virtual_memory().available * CPU_SHARE), CPU_LIMIT)
