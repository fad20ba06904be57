"""A whole prompt by torch's SDPA, as a candidate beside the prefill kernel, for methods of one part.

Keys are turned into scratch by the kernel that turns them for ours, values are copied beside them, and queries are
turned and scaled by ours too, in base 2, so that SDPA's own scale is ln 2. On Hopper torch's SDPA is cuDNN's, which
overlaps its softmax with its products; ours does not. The copy of the values is what it costs.
"""

from __future__ import annotations

import math

import torch
from prerope.cache.attention.types import AttentionOptions
from prerope.cache.cuda.plan import CudaPlan
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def sdpa_prefill(
    query: Tensor, keys: Tensor, values: Tensor, plan: CudaPlan, options: AttentionOptions, out: Tensor
) -> None:
    """In place of `kernels.triton.prefill.prefill`."""
    from prerope.cache.kernels.triton import prefill as own
    from prerope.cache.kernels.triton.launch import arguments, constants, launch

    heads, kv_heads, dim = query.shape[1], keys.shape[2], keys.shape[3]
    (one,) = plan.passes
    assert plan.num_parts == len(plan.spans) == 1, "one part of one sequence"
    assert options.softcap is None, "SDPA has no soft-cap"
    assert options.sinks is None, "SDPA has no sinks"
    chosen = own.config(heads // kv_heads, dim, keys.dtype)
    fixed = constants(query, keys, values, plan, options, chosen) | {"SPANS": 2}
    turned = torch.empty(1, len(query), heads, dim, dtype=keys.dtype, device=query.device)
    scratch = torch.empty(one.scratch_rows, kv_heads, dim, dtype=keys.dtype, device=query.device)
    given = arguments(query, keys, values, plan, options, out)
    given |= {"turned_queries": turned, "scratch": scratch, "first_head": 0, "scratch_heads": kv_heads}
    launch(own.turn_queries_kernel, (len(plan.tiles), 1, kv_heads), given, fixed)
    launch(own.turn_keys_kernel, (one.key_programs, kv_heads), given, fixed)
    beside = values.index_select(0, plan.blocks[0]).flatten(0, 1)[: one.scratch_rows]
    queries, turned_keys, copied = (tensor.transpose(0, 1)[None] for tensor in (turned[0], scratch, beside))
    result = scaled_dot_product_attention(
        queries, turned_keys, copied, is_causal=True, scale=math.log(2), enable_gqa=True
    )
    out.copy_(result[0].transpose(0, 1))
