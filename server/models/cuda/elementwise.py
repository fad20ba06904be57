"""What stands between the products of a layer: the RMS norm, with a residual addition before it or none, and the gate.

All of it is bound by memory: a few operations for each member that is read, so what counts is that a row is read once
and written once. The addition is made where its sum is normalised, and gate and up are read from the one tensor that
their product wrote.

Arithmetic is fp32 and rounded where transformers rounds, so results differ from its own in the order of a sum at most.
"""

import torch
import triton
import triton.language as tl
from prerope.cache.cuda.attention import current
from torch import Tensor

MOST_LANES = 8192
"""Of a row are held in registers; a wider one is read twice, the second time from L2."""
TILE = 1024
"""Members of a program where rows are short, such as heads; and of the gate."""
PER_THREAD = 8
"""Members: 16 bytes of bf16 are one load."""


@triton.jit
def load_sum(x, residual, total, mask, RESIDUAL: tl.constexpr, STORE: tl.constexpr):
    """Members in fp32, of x or of x + residual as its dtype rounds it."""
    members = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        members += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
        rounded = members.to(total.dtype.element_ty)
        if STORE:
            tl.store(total, rounded, mask=mask)
        members = rounded.to(tl.float32)
    return members


@triton.jit
def store_scaled(members, factor, weight, out, lane_mask, mask, ADD_ONE: tl.constexpr, ROUND_ONCE: tl.constexpr):
    dtype = out.dtype.element_ty
    gain = tl.load(weight, mask=lane_mask, other=0.0).to(tl.float32)[None, :]
    if ADD_ONE:
        gain += 1.0
    normal = members * factor
    if not ROUND_ONCE:
        normal = normal.to(dtype).to(tl.float32)
    tl.store(out, (normal * gain).to(dtype), mask=mask)


@triton.jit(do_not_specialize=("num_rows", "inner"))
def rms_norm_kernel(
    x, residual, weight, total, out, num_rows, inner, outer_stride, inner_stride, residual_stride, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    RESIDUAL: tl.constexpr, ADD_ONE: tl.constexpr, ROUND_ONCE: tl.constexpr,
):  # fmt: skip
    """Row r of x lies at r // inner·outer_stride + r % inner·inner_stride: heads of rows that are part of wider ones.

    residual: rows residual_stride apart. total, out: [num_rows, WIDTH], contiguous.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = (row < num_rows)[:, None]
    x_row = (x + row // inner * outer_stride + row % inner * inner_stride)[:, None]
    residual_row = (residual + row * residual_stride)[:, None]
    total_row, out_row = (total + row * WIDTH)[:, None], (out + row * WIDTH)[:, None]
    lane = tl.arange(0, LANES)
    if WIDTH <= LANES:
        mask = here & (lane < WIDTH)[None, :]
        at = lane[None, :]
        members = load_sum(x_row + at, residual_row + at, total_row + at, mask, RESIDUAL, True)
        factor = tl.rsqrt(tl.sum(members * members, 1) / WIDTH + eps)[:, None]
        store_scaled(members, factor, weight + lane, out_row + at, lane < WIDTH, mask, ADD_ONE, ROUND_ONCE)
    else:
        squares = tl.zeros([ROWS, LANES], tl.float32)
        for first in range(0, WIDTH, LANES):
            at = (first + lane)[None, :]
            mask = here & (at < WIDTH)
            members = load_sum(x_row + at, residual_row + at, total_row + at, mask, RESIDUAL, True)
            squares += members * members
        factor = tl.rsqrt(tl.sum(squares, 1) / WIDTH + eps)[:, None]
        for first in range(0, WIDTH, LANES):
            at = (first + lane)[None, :]
            mask = here & (at < WIDTH)
            members = load_sum(x_row + at, residual_row + at, total_row + at, mask, RESIDUAL, False)
            store_scaled(
                members, factor, weight + first + lane, out_row + at, first + lane < WIDTH, mask, ADD_ONE, ROUND_ONCE
            )


@triton.jit
def silu_mul_kernel(gate_up, out, row_stride, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Grid (rows, ⌈WIDTH / LANES⌉). A row of gate_up is WIDTH members of the gate, then as many of up."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = lane < WIDTH
    dtype = out.dtype.element_ty
    gate = tl.load(gate_up + row * row_stride + lane, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + WIDTH + lane, mask=mask, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * WIDTH + lane, (gate * up).to(dtype), mask=mask)


def norm_config(width):
    """(ROWS, LANES, warps) of `rms_norm_kernel`."""
    lanes = min(triton.next_power_of_2(width), MOST_LANES)
    rows = max(1, TILE // lanes)
    return rows, lanes, min(16, max(1, rows * lanes // (32 * PER_THREAD)))


def _levels(x):
    """(inner, outer stride, inner stride) of the rows of x [..., width]; None where two strides do not reach them."""
    levels = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if x.stride(-1) != 1 or len(levels) > 2:
        return None
    if len(levels) == 2:
        return levels[1][0], levels[0][1], levels[1][1]
    stride = levels[0][1] if levels else x.shape[-1]
    return 1, stride, stride


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, add_one: bool = False, round_once: bool = False) -> Tensor:
    """x/√(mean x² + eps) · weight, or · (1 + weight), over the last dim, in the dtype of x.

    x: [..., width], strided as it likes but for the last dim. weight: [width] of the same dtype. The normed row is
    rounded before the weight, as Llama does, unless round_once. The result has no gaps and its dims in the order of
    those of x in memory, as torch's own operations would have them: heads that lie side by side still do.
    """
    order = sorted(range(x.dim() - 1), key=x.stride, reverse=True)
    rows = x.permute(*order, -1)
    levels = _levels(rows)
    if levels is None:
        rows = rows.contiguous()
        levels = _levels(rows)
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    _launch_norm(rows, rows, weight, out, out, levels, eps, add_one, round_once)
    return out.permute(*(order.index(dim) for dim in range(len(order))), -1)


def add_rms_norm(
    residual: Tensor, x: Tensor, weight: Tensor, eps: float, *, add_one: bool = False, round_once: bool = False
) -> tuple[Tensor, Tensor]:
    """(residual + x, its RMS norm), contiguous. residual and x: [..., width], rows strided."""
    shape, width = x.shape, x.shape[-1]
    residual, x = (rows.reshape(-1, width) for rows in (residual, x))
    residual, x = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (residual, x))
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch_norm(x, residual, weight, total, out, _levels(x), eps, add_one, round_once)
    return total.view(shape), out.view(shape)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate)·up of gate_up [T, 2·I], gate first, rows strided → [T, I], contiguous."""
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    _launch_gate(gate_up, out)
    return out


def _launch_norm(x, residual, weight, total, out, levels, eps, add_one, round_once):
    width, num_rows = x.shape[-1], out.numel() // x.shape[-1]
    rows, lanes, warps = norm_config(width)
    if num_rows == 0:
        return
    # The stride of a single row is any number, and not one to compile a kernel for.
    residual_stride = residual.stride(0) if total is not out and num_rows > 1 else width
    with current(x.device):
        rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
            x, residual, weight, total, out, num_rows, *levels, residual_stride, eps,
            WIDTH=width, ROWS=rows, LANES=lanes, RESIDUAL=total is not out, ADD_ONE=add_one, ROUND_ONCE=round_once,
            num_warps=warps,
        )  # fmt: skip


def _launch_gate(gate_up, out):
    num_rows, width = out.shape
    if num_rows == 0:
        return
    with current(out.device):
        silu_mul_kernel[(num_rows, triton.cdiv(width, TILE))](
            gate_up, out, gate_up.stride(0), WIDTH=width, LANES=TILE, num_warps=4
        )
