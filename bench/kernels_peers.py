"""Other kernels on the same keys, rotation left out: torch's SDPA; FlashInfer and FlashAttention 3 where importable."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.kernels_cases import Step

Call = Callable[[], object]
WORKSPACE_BYTES = 128 * 2**20


def peers(step: Step, kernel: str, device: torch.device) -> Iterator[tuple[str, Call]]:
    """(name, call) of each; sequences of the step are alike, and a chunk is a whole prompt."""
    query, key, value = step.contiguous()
    scale, causal = step.options.scale, kernel == "prefill"
    yield (
        "SDPA",
        lambda: scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=True),
    )
    if device.type != "cuda":
        return
    if importlib.util.find_spec("flash_attn_interface"):
        import flash_attn_interface

        rows, keys, values = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
        yield "FA3", lambda: flash_attn_interface.flash_attn_func(rows, keys, values, scale, causal)
    if importlib.util.find_spec("flashinfer"):
        import flashinfer

        yield "FlashInfer", _flashinfer_prefill(flashinfer, step) if causal else _flashinfer_decode(flashinfer, step)


def _flashinfer_prefill(flashinfer: Any, step: Step) -> Call:
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in step.contiguous())
    return lambda: flashinfer.single_prefill_with_kv_cache(query, key, value, causal=True, sm_scale=step.options.scale)


def _flashinfer_decode(flashinfer: Any, step: Step) -> Call:
    """Over the same pages."""
    device, sequences, block_size = step.query.device, step.metadata.sequences, step.metadata.block_size
    counts = torch.tensor([0, *(len(sequence.block_table) for sequence in sequences)], device=device)
    tables = torch.cat([sequence.block_table for sequence in sequences])
    last = torch.tensor([(sequence.length - 1) % block_size + 1 for sequence in sequences], device=device)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    heads, kv_heads, dim = step.query.shape[1], step.keys.shape[2], step.keys.shape[3]
    wrapper.plan(
        counts.cumsum(0).int(), tables.int(), last.int(), heads, kv_heads, dim, block_size,
        q_data_type=step.query.dtype, kv_data_type=step.keys.dtype, sm_scale=step.options.scale,
    )  # fmt: skip
    return lambda: wrapper.run(step.query, (step.keys, step.values))
