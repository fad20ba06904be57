"""A whole prompt by torch's SDPA, as candidates beside the prefill kernel: for methods of one part, and of two.

Keys are turned into scratch by the kernel that turns them for ours, values are copied beside them, and queries are
turned and scaled by ours too, in base 2, so that SDPA's own scale is ln 2. On Hopper torch's SDPA is cuDNN's, which
overlaps its softmax with its products; ours does not. The copy of the values is what it costs.

Of two parts, keys nearer than w and the others, every piece is a square with causality, and the pieces of a row are
joined by their log-sum-exp:

    own      the rows of a stretch of w and its keys
    before   the rows of a stretch and those keys of the one before it that are nearer than w: read backwards, row r'
             sees the keys c' < r'
    far      row i and the keys up to i − w
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from prerope.cache.attention.types import AttentionOptions
from prerope.cache.cuda.plan import CudaPlan
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Prefill = Callable[[Tensor, Tensor, Tensor, CudaPlan, AttentionOptions, Tensor], None]


def sdpa_prefill(
    query: Tensor, keys: Tensor, values: Tensor, plan: CudaPlan, options: AttentionOptions, out: Tensor
) -> None:
    """In place of `kernels.triton.prefill.prefill`."""
    assert plan.num_parts == 1, "one part"
    turned, scratch, beside = _turned(query, keys, values, plan, options)
    queries, turned_keys, copied = (tensor.transpose(0, 1)[None] for tensor in (turned[0], scratch, beside))
    result = scaled_dot_product_attention(
        queries, turned_keys, copied, is_causal=True, scale=math.log(2), enable_gqa=True
    )
    out.copy_(result[0].transpose(0, 1))


def two_parts(window: int) -> Prefill:
    """In place of `prefill`, for a prompt of whole stretches of `window`, whose far keys are read as they lie."""

    def sdpa_of_two_parts(
        query: Tensor, keys: Tensor, values: Tensor, plan: CudaPlan, options: AttentionOptions, out: Tensor
    ) -> None:
        assert plan.num_parts == 2, "two parts"
        assert len(query) % window == 0, "whole stretches"
        turned, scratch, beside = _turned(query, keys, values, plan, options)
        raw, group = keys.index_select(0, plan.blocks[0]).flatten(0, 1)[: len(query)], query.shape[1] // keys.shape[2]
        near_key, far_key, value = (
            tensor.transpose(0, 1).repeat_interleave(group, 0) for tensor in (scratch, raw, beside)
        )
        near, far = (rows.transpose(0, 1) for rows in turned)
        stretches = [tensor.unflatten(1, (-1, window)).transpose(0, 1) for tensor in (near, near_key, value)]
        total, size = _square(*stretches)
        before = [stretches[0][1:].flip(2)[:, :, 1:], *(tensor[:-1].flip(2)[:, :, :-1] for tensor in stretches[1:])]
        beside_it, its_size = (tensor.flip(2) for tensor in _square(*before))
        total[1:, :, :-1], size[1:, :, :-1] = _joined(total[1:, :, :-1], size[1:, :, :-1], beside_it, its_size)
        total, size = (tensor.transpose(0, 1).flatten(1, 2) for tensor in (total, size))
        far_total, far_size = _square(far[None, :, window:], far_key[None, :, :-window], value[None, :, :-window])
        total[:, window:], _ = _joined(total[:, window:], size[:, window:], far_total[0], far_size[0])
        out.copy_(total.transpose(0, 1))

    return sdpa_of_two_parts


def _turned(
    query: Tensor, keys: Tensor, values: Tensor, plan: CudaPlan, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(queries [parts, T, Hq, D], turned keys [T, Hkv, D], values [T, Hkv, Dv]) of a prompt."""
    from prerope.cache.kernels.triton import prefill as own
    from prerope.cache.kernels.triton.launch import arguments, constants, launch, num_programs
    from prerope.cache.kernels.triton.turns import turn_keys_kernel, turn_queries_kernel

    heads, kv_heads, dim = query.shape[1], keys.shape[2], keys.shape[3]
    (one,) = plan.passes
    assert len(plan.spans) == 1, "one sequence, whose keys are turned in one way"
    assert options.softcap is None, "SDPA has no soft-cap"
    assert options.sinks is None, "SDPA has no sinks"
    chosen = own.config(heads // kv_heads, dim, keys.dtype)
    fixed = constants(query, keys, values, plan, options, chosen) | {"SPANS": 2}
    turned = torch.empty(plan.num_parts, len(query), heads, dim, dtype=keys.dtype, device=query.device)
    scratch = torch.empty(one.scratch_rows, kv_heads, dim, dtype=keys.dtype, device=query.device)
    given = arguments(query, keys, values, plan, options, query)
    given |= {"turned_queries": turned, "scratch": scratch, "first_head": 0, "scratch_heads": kv_heads}
    programs = num_programs(kv_heads, heads // kv_heads, chosen)
    launch(turn_queries_kernel, (len(plan.tiles), plan.num_parts, programs), given, fixed)
    launch(turn_keys_kernel, (one.key_programs, kv_heads), given, fixed)
    return turned, scratch, values.index_select(0, plan.blocks[0]).flatten(0, 1)[: one.scratch_rows]


def _square(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, n, D] each, causal → (rows [B, H, n, D], their log-sum-exp [B, H, n])."""
    call, scale = torch.ops.aten, {"scale": math.log(2)}
    if query.device.type == "cuda":
        found = call._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, True, False, **scale)
    else:
        found = call._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, **scale)
    return found[0].float(), found[1].float().reshape(query.shape[:-1])


def _joined(total: Tensor, size: Tensor, other: Tensor, its_size: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over the keys of both."""
    both = torch.logaddexp(size, its_size)
    return total * (size - both).exp()[..., None] + other * (its_size - both).exp()[..., None], both
