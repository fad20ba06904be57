"""Paged attention over raw keys: one signature, dispatched by device."""

from __future__ import annotations

from prerope.cache.attention.types import AttentionMetadata, AttentionOptions
from torch import Tensor


def paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, options: AttentionOptions
) -> Tensor:
    """Causal attention of packed rows over their own sequences.

    query: [T, Hq, D] raw (not rotated). keys, values: [num_blocks, block_size, Hkv, D or Dv], raw, this step's rows
    already stored. Returns [T, Hq, Dv] in the query's dtype.
    """
    if query.device.type == "cpu":
        from prerope.cache.cpu.attention import cpu_attention
        from prerope.cache.cpu.decode import decode_step

        decoded = decode_step(query, keys, values, metadata, options)
        if decoded is not None:
            return decoded
        return cpu_attention(query, keys, values, metadata, options)
    if query.device.type == "cuda":
        from prerope.cache.cuda.attention import cuda_attention

        return cuda_attention(query, keys, values, metadata, options)
    from prerope.cache.attention.reference import reference_attention

    return reference_attention(query, keys, values, metadata, options)
