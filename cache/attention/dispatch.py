"""Paged attention over raw keys: one signature, an implementation for each type of device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from prerope.cache.attention.types import AttentionMetadata, AttentionOptions
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, AttentionMetadata, AttentionOptions], Tensor]
"""Causal attention of packed rows over their own sequences.

query: [T, Hq, D] raw (not rotated). keys, values: [num_blocks, block_size, Hkv, D or Dv], raw, this step's rows
already stored. Returns [T, Hq, Dv] in the query's dtype.
"""


def attention_on(device: torch.device) -> Attention:
    """The implementation for a device; the specification itself on one that has none of its own."""
    if device.type == "cpu":
        from prerope.cache.cpu.attention import cpu_attention

        return cpu_attention
    if device.type == "cuda":
        from prerope.cache.cuda.attention import cuda_attention

        return cuda_attention
    from prerope.cache.attention.reference import reference_attention

    return reference_attention


def angle_bytes(device: torch.device) -> int:
    """Bytes of the tables of cos and sin that are kept from step to step. For any thread."""
    if device.type == "cpu":
        from prerope.cache.cpu.tables import READINGS

        return READINGS.num_bytes
    if device.type == "cuda":
        from prerope.cache.cuda.plan import table_bytes

        return table_bytes()
    return 0


def paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, options: AttentionOptions
) -> Tensor:
    """See `Attention`; on the device that the query is on."""
    return attention_on(query.device)(query, keys, values, metadata, options)
