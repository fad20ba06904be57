"""The GPU path: dispatch to the kernels. What they need beside the tensors is planned once a step (`cache.cuda.plan`):
`cache.cuda.decode` for sequences with a single row, `cache.cuda.prefill` for the others.

Nothing here waits for the device. With tensors on the CPU it runs under Triton's interpreter: so it is tested.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions
from prerope.cache.cuda.decode import plan_rows
from prerope.cache.cuda.plan import PlanKey
from prerope.cache.cuda.prefill import plan_chunks
from torch import Tensor


def cuda_attention(
    query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, options: AttentionOptions
) -> Tensor:
    """See `cache.attention.dispatch.Attention`."""
    from prerope.cache.kernels.triton.decode import config as decode_config
    from prerope.cache.kernels.triton.decode import decode
    from prerope.cache.kernels.triton.prefill import config as prefill_config
    from prerope.cache.kernels.triton.prefill import prefill

    query = _side_by_side(query)
    out = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
    kv_heads, head_dim = keys.shape[2:]
    group = query.shape[1] // kv_heads
    for single, config, attend in ((True, decode_config, decode), (False, prefill_config, prefill)):
        if any((sequence.count == 1) == single for sequence in metadata.sequences):
            chosen = config(group, head_dim, keys.dtype)
            rows = 1 if single else max(1, chosen.block_m // group)
            fine = decode_config(group, head_dim, keys.dtype, more=True).block_n if single else chosen.block_n
            tiles = chosen.block_n, fine
            key = PlanKey(single, rows, *tiles, kv_heads, head_dim, options.group, options.sliding_window)
            if key not in metadata.plans:
                metadata.plans[key] = (plan_rows if single else plan_chunks)(metadata, key, query.device)
            with current(query.device):
                attend(query, keys, values, metadata.plans[key], options, out)
    return out


def cuda_store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
    """See `cache.storage.KVStorage.store`."""
    from prerope.cache.kernels.triton.store import store

    with current(keys.device):
        store(_side_by_side(key), _side_by_side(value), keys, values, slot_mapping)


def _side_by_side(rows: Tensor) -> Tensor:
    """[T, H, D] with a row's heads and their dims in order, as the kernels read them; rows may be any way apart."""
    return rows if rows.stride()[1:] == (rows.shape[2], 1) else rows.clone(memory_format=torch.contiguous_format)


def current(device: torch.device) -> AbstractContextManager[object]:
    """A context in which this device is the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
