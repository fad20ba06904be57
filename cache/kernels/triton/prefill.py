"""Prefill: chunks of many rows, of any number of sequences, packed.

    turn_queries  the queries of each part at their angles, scaled
    turn_keys     the keys of parts that turn, once a step and layer, into scratch; unrotated parts' stay in the cache
    prefill       one program a tile of rows and KV head: flash attention that knows no positions but i − j

A program walks the parts of its run with one softmax that runs on, so nothing is merged. In each part the key tiles
that all its rows see in full come first and are not masked; then those at an edge: i − j = w, or causality. Turning
keys inside that loop instead does it again for every tile of rows, and takes more registers than there are.

Scratch is bounded: a plan's passes and, in each, KV heads are taken one after the other as SCRATCH_BYTES asks for. Only
the keys of one run and one KV head are never split.
"""

import torch
import triton
import triton.language as tl
from prerope.cache.attention.types import AttentionOptions
from prerope.cache.cuda.plan import SCRATCH_BYTES, CudaPlan
from prerope.cache.cuda.tiles import choice
from prerope.cache.kernels.triton.launch import Config, arguments, constants, device_arch, launch, num_programs, upright
from prerope.cache.kernels.triton.read import (  # fmt: skip
    LOG2E,
    LOWEST,
    READ_SIZE,
    RECORDS,
    VARIES,
    capped,
    heads_of,
    load_dims,
    number_of_block,
    read_instead,
    slot_in,
    softmax_step,
)
from prerope.cache.kernels.triton.turns import key_warps, query_warps, turn_keys_kernel, turn_queries_kernel
from torch import Tensor


def config(group: int, head_dim: int, dtype: torch.dtype, arch: int | None = None) -> Config:
    """The accumulator takes BLOCK_M·D/32/warps registers a thread, which bounds the rows of a tile. arch: as in decode.

    Expected of sm_90 at 128 dims in bf16: 8 × 401 instructions a tile of 64 keys, so 800 cycles beside the 1,024 of its
    wgmma products; keys and values of two tiles are on their way. Tiles of 128 keys spill, and of 64 where products
    take both sides from registers.
    """
    measured = choice("prefill", group, head_dim, dtype) if arch is None else None
    if measured is not None and measured.tile is not None:
        return Config(*measured.tile)
    if dtype == torch.float32:
        return Config(32 if head_dim <= 64 else 16, 32 if head_dim <= 256 else 16, num_warps=8, num_stages=2)
    if head_dim <= 128:
        return Config(block_m=128, block_n=64 if upright(arch) or head_dim <= 64 else 32, num_warps=8, num_stages=3)
    few = head_dim > 256 or (device_arch() if arch is None else arch) // 10 == 10  # its products keep more in registers
    return Config(block_m=32 if few else 64, block_n=32, num_warps=8, num_stages=2)


@triton.jit
def look_up(
    tile, wanted, blocks, first_key, stop_key, gap_tile, gap,
    BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(keys, those that are read instead, their blocks where they are wanted) of a tile, past the gap from there on."""
    n = tl.arange(0, BLOCK_N)
    if MASKED:
        tile += tl.where(tile < gap_tile, 0, gap)
    j = tile * BLOCK_N + n
    key = read_instead(j, first_key, stop_key) if MASKED else j
    return j, key, tl.load(blocks + number_of_block(key, BLOCK_SIZE), mask=(n >= 0) & wanted, other=0)


@triton.jit
def read_tiles(
    first_tile, gap_tile, gap, num_tiles, query, position, slope, acc, high, total,
    source, stride, turned, scratch_shift, values, blocks, first_key, stop_key, d_min, d_max, softcap,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, DIMS: tl.constexpr, VALUES: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`num_tiles` key tiles from first_tile on, with a gap of `gap` tiles before gap_tile.

    MASKED False: every row sees all keys of these tiles. Blocks are looked up a tile ahead, as in decode.
    """
    dims, value_dims = tl.arange(0, DIMS), tl.arange(0, VALUES)
    # Each row's keys: `count` from `low` on.
    low = tl.maximum(first_key, position - d_max + 1)
    count = tl.maximum(tl.minimum(stop_key, position - d_min + 1) - low, 0).to(tl.uint32)
    j, key, block = look_up(
        first_tile, num_tiles > 0, blocks, first_key, stop_key, gap_tile, gap, BLOCK_N, BLOCK_SIZE, MASKED
    )
    for index in tl.range(0, num_tiles, num_stages=STAGES):
        slot = slot_in(block, key, BLOCK_SIZE)
        row = tl.where(turned, key + scratch_shift, slot)
        key_rows = source + (row.to(tl.int64) * stride)[:, None]
        value_rows = values + (slot.to(tl.int64) * VALUE_STRIDE)[:, None]
        keys = load_dims(key_rows, dims, dims, DIM, DIMS).to(DTYPE)
        value = load_dims(value_rows, value_dims, value_dims, VALUE_DIM, VALUES).to(DTYPE)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if SLOPES:
            scores += (j[None, :] - position[:, None]).to(tl.float32) * slope[:, None]
        if SOFTCAP:
            scores = capped(scores, softcap)
        if MASKED:
            seen = (j[None, :] - low[:, None]).to(tl.uint32) < count[:, None]  # both edges in one comparison
            scores = tl.where(seen, scores, float("-inf"))
        acc, high, total = softmax_step(scores, value, acc, high, total, PRECISION)
        tile, wanted = first_tile + index + 1, index + 1 < num_tiles
        j, key, block = look_up(
            tile, wanted, blocks, first_key, stop_key, gap_tile, gap, BLOCK_N, BLOCK_SIZE, MASKED
        )  # fmt: skip
    return acc, high, total


@triton.jit
def tiles_of_part(read, start, last, BLOCK_N: tl.constexpr):
    """Of a part that rows start … last read: (first key, one past the last, first tile, first tile that all rows see
    in full, how many of those, how many others)."""
    d_min, d_max = tl.load(read + 2), tl.load(read + 3)
    first_key = tl.maximum(tl.load(read), start - d_max + 1)
    stop_key = tl.minimum(tl.load(read + 1), last - d_min + 1)
    first_tile, stop_tile = first_key // BLOCK_N, (stop_key + BLOCK_N - 1) // BLOCK_N
    full_low, full_stop = tl.maximum(first_key, last - d_max + 1), tl.minimum(stop_key, start - d_min + 1)
    gap_tile = (full_low + BLOCK_N - 1) // BLOCK_N
    gap = tl.maximum(tl.maximum(full_stop, 0) // BLOCK_N - gap_tile, 0)
    edges = tl.where(first_key < stop_key, stop_tile - first_tile - gap, 0)
    return first_key, stop_key, first_tile, gap_tile, gap, edges


@triton.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=RECORDS)
def prefill_kernel(
    tiles, reads, turned_queries, keys, scratch, values, blocks, sinks, slopes, out,
    num_rows, first_head, scratch_heads, max_blocks, num_parts, softcap,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIMS: tl.constexpr, VALUES: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SLOPES: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, heads of this pass). out: [T, Hq, VALUE_DIM]."""
    pass_head, m = heads_of(tl.program_id(1), GROUP, BLOCK_M)
    record, kv_head = tiles + tl.program_id(0) * 5, first_head + pass_head
    sequence, first_row, start = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    last, run = start + tl.load(record + 3) - 1, tl.load(record + 4)
    # Rows past the tile's last repeat it: they cost nothing more, and are not stored.
    position = tl.minimum(start + m // GROUP, last)
    head = kv_head * GROUP + m % GROUP
    own = (first_row + position - start).to(tl.int64) * (KV_HEADS * GROUP) + head
    dims = tl.arange(0, DIMS)
    blocks += sequence * max_blocks
    values += kv_head * VALUE_DIM
    slope = softcap
    if SLOPES:
        slope = tl.load(slopes + head) * (1.0 if SOFTCAP else LOG2E)
    acc = tl.zeros([BLOCK_M, VALUES], tl.float32)
    high = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for part in range(num_parts):
        read = reads + (run * num_parts + part) * READ_SIZE
        d_min, d_max = tl.load(read + 2), tl.load(read + 3)
        turned, scratch_shift = tl.load(read + 4) >= 0, tl.load(read + 9)
        first_key, stop_key, first_tile, gap_tile, gap, edges = tiles_of_part(read, start, last, BLOCK_N)
        part_rows = turned_queries + part * num_rows.to(tl.int64) * (KV_HEADS * GROUP * DIM)
        query = tl.load(part_rows + own[:, None] * DIM + dims[None, :], mask=(dims < DIM)[None, :], other=0.0).to(DTYPE)
        source = tl.where(turned, scratch + pass_head * DIM, keys + kv_head * DIM)
        stride = tl.where(turned, scratch_heads, KV_HEADS) * DIM
        for masked in tl.static_range(2):
            acc, high, total = read_tiles(
                first_tile if masked else gap_tile, gap_tile, gap, edges if masked else gap,
                query, position, slope, acc, high, total,
                source, stride, turned, scratch_shift, values, blocks, first_key, stop_key, d_min, d_max, softcap,
                DIM, VALUE_DIM, KV_HEADS * VALUE_DIM, BLOCK_SIZE, BLOCK_N, DIMS, VALUES,
                masked == 1, SOFTCAP, SLOPES, DTYPE, PRECISION, STAGES,
            )  # fmt: skip
    if SINKS:
        total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - high)
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    dim = tl.arange(0, VALUES)
    mask = (start + m // GROUP <= last)[:, None] & (dim < VALUE_DIM)[None, :]
    tl.store(out + own[:, None] * VALUE_DIM + dim[None, :], acc.to(out.dtype.element_ty), mask=mask)


def prefill(
    query: Tensor, keys: Tensor, values: Tensor, plan: CudaPlan, options: AttentionOptions, out: Tensor
) -> None:
    """Rows of the tiles of `plan` into their places in out [T, Hq, Dv]."""
    heads, kv_heads, dim = query.shape[1], keys.shape[2], keys.shape[3]
    own = config(heads // kv_heads, dim, keys.dtype)
    fixed = constants(query, keys, values, plan, options, own)
    given = arguments(query, keys, values, plan, options, out) | {
        "turned_queries": torch.empty(plan.num_parts, len(query), heads, dim, dtype=keys.dtype, device=query.device),
    }
    grid = len(plan.tiles), plan.num_parts, num_programs(kv_heads, heads // kv_heads, own)
    launch(turn_queries_kernel, grid, given, fixed, query_warps(plan))
    row_bytes = dim * keys.dtype.itemsize
    head_counts = [
        max(1, min(kv_heads, SCRATCH_BYTES // (max(1, one.scratch_rows) * row_bytes))) for one in plan.passes
    ]
    size = max(max(1, one.scratch_rows) * count for one, count in zip(plan.passes, head_counts, strict=True))
    given["scratch"] = torch.empty(size, dim, dtype=keys.dtype, device=query.device)
    for one, pass_heads in zip(plan.passes, head_counts, strict=True):
        num_spans, num_tiles = one.stop_span - one.first_span, one.stop_tile - one.first_tile
        fixed["SPANS"] = triton.next_power_of_2(num_spans + 1)
        given |= {
            "tiles": plan.tiles[one.first_tile : one.stop_tile],
            "spans": plan.spans[one.first_span : one.stop_span],
            "num_spans": num_spans,
            "scratch_heads": pass_heads,
        }
        for first_head in range(0, kv_heads, pass_heads):
            given["first_head"], now = first_head, min(pass_heads, kv_heads - first_head)
            if one.key_programs:
                launch(turn_keys_kernel, (one.key_programs, now), given, fixed, key_warps(plan))
            launch(prefill_kernel, (num_tiles, grid[2] // kv_heads * now), given, fixed, own.num_warps)
