"""Other kernels on the same keys, rotation left out: torch's SDPA; FlashInfer and FlashAttention 3 where importable.

Each is made for a step whose sequences are alike; a chunk is a whole prompt. What it needs in another layout is copied
when it is made, outside what is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.kernels.cases import Step

Call = Callable[[], object]
WORKSPACE_BYTES = 128 * 2**20
FA3 = ("flash_attn_interface", "fa3_fwd_interface")
"""Modules with FlashAttention 3's functions: built from its source, and the package fa3-fwd."""


def peers(kernel: str, device: torch.device) -> list[tuple[str, Callable[[Step], Call]]]:
    """(name, what makes its call) of each that can be imported. kernel: decode or prefill."""
    causal = kernel == "prefill"
    found: list[tuple[str, Callable[[Step], Call]]] = [("SDPA", lambda step: _sdpa(step, causal))]
    if device.type == "cuda" and any(map(importlib.util.find_spec, FA3)):
        found.append(("FA3", lambda step: _flash_attention(step, causal)))
    if device.type == "cuda" and importlib.util.find_spec("flashinfer"):
        found.append(("FlashInfer", _flashinfer_prefill if causal else _flashinfer_decode))
    return found


def _sdpa(step: Step, causal: bool) -> Call:
    query, key, value = (tensor.transpose(1, 2).contiguous() for tensor in step.rows())
    scale = step.options.scale
    return lambda: scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=True)


def _flash_attention(step: Step, causal: bool) -> Call:
    attend = importlib.import_module(next(filter(importlib.util.find_spec, FA3))).flash_attn_func
    query, key, value = step.rows()
    scale = step.options.scale
    return lambda: attend(query, key, value, softmax_scale=scale, causal=causal)


def _flashinfer_prefill(step: Step) -> Call:
    import flashinfer

    query, key, value = (tensor[0] for tensor in step.rows())
    scale = step.options.scale
    return lambda: flashinfer.single_prefill_with_kv_cache(query, key, value, causal=True, sm_scale=scale)


def _flashinfer_decode(step: Step) -> Call:
    """Over the same pages."""
    import flashinfer

    device, sequences, block_size = step.query.device, step.metadata.sequences, step.metadata.block_size
    counts = torch.tensor([0, *(len(sequence.block_table) for sequence in sequences)])
    tables = torch.cat([sequence.block_table for sequence in sequences])
    last = torch.tensor([(sequence.length - 1) % block_size + 1 for sequence in sequences])
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    heads, kv_heads, dim = step.query.shape[1], step.keys.shape[2], step.keys.shape[3]
    indices = (tensor.to(device=device, dtype=torch.int32) for tensor in (counts.cumsum(0), tables, last))
    wrapper.plan(
        *indices, heads, kv_heads, dim, block_size,
        q_data_type=step.query.dtype, kv_data_type=step.keys.dtype, sm_scale=step.options.scale,
    )  # fmt: skip
    return lambda: wrapper.run(step.query, (step.keys, step.values))
