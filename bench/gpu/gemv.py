"""GEMV: the product of one row with a weight, as a candidate beside cuBLAS: at batch 1 a step is little else.

one program a few outputs: their rows of the weight are streamed once, the row of the input lies in L2
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

OUTPUTS, MEMBERS, WARPS = 8, 512, 4
"""Of a program: rows of the weight, and how many of their members at once."""


@triton.jit
def gemv_kernel(x, weight, out, SIZE: tl.constexpr, OUTPUTS: tl.constexpr, MEMBERS: tl.constexpr):
    """x [SIZE], weight [outputs, SIZE] → out [outputs]; outputs a multiple of OUTPUTS, SIZE of MEMBERS."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    member = tl.arange(0, MEMBERS)
    rows = weight + output.to(tl.int64)[:, None] * SIZE + member[None, :]
    total = tl.zeros([OUTPUTS, MEMBERS], tl.float32)
    for first in range(0, SIZE, MEMBERS):
        given = tl.load(x + first + member).to(tl.float32)
        total += tl.load(rows + first).to(tl.float32) * given[None, :]
    tl.store(out + output, tl.sum(total, 1).to(out.dtype.element_ty))


def gemv(x: Tensor, weight: Tensor) -> Tensor:
    """x [1, K] and weight [N, K] → [1, N], as torch.nn.functional.linear."""
    outputs, size = weight.shape
    assert outputs % OUTPUTS == size % MEMBERS == 0, "whole programs"
    out = torch.empty(1, outputs, dtype=x.dtype, device=x.device)
    gemv_kernel[(outputs // OUTPUTS,)](x, weight, out, SIZE=size, OUTPUTS=OUTPUTS, MEMBERS=MEMBERS, num_warps=WARPS)
    return out
