"""Decode: one query row a sequence. Keys are split over programs, and partial results merged by their log-sum-exp.

    schedule   how many key tiles a program takes, so that a fixed grid shares all rows' tiles evenly; on the device
    decode     grid (items, KV heads): the tiles of one item of one row, all query heads of the KV head together
    merge      grid (rows, query heads): the items of a row

An item's number says its row: items of row r are first_item[r] … first_item[r+1] − 1. Nothing here comes back to the
host and no grid depends on a length, so that the three sit in a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cache.attention import AttentionOptions
from cache.cuda_plan import CudaPlan
from cache.kernels.launch import Config, arguments, constants, launch, padded
from cache.kernels.read import (
    LOG2E,
    LOWEST,
    READ_SIZE,
    VARIES,
    capped,
    load_turns,
    pair_dims,
    place_of_tile,
    rotate,
    softmax_step,
    tile_of_key,
)  # fmt: skip

LEAST_TILES = 4  # of an item: 256 keys; fewer do not pay for a partial result
ITEMS = 528  # programs that share the tiles of all rows, over all KV heads: four for each of 132 multiprocessors
MERGED = 16  # items that a merge loads at once


def config(group: int, head_dim: int, dtype: torch.dtype) -> Config:
    """16 rows are the least that a product takes. A tile's angles stay in registers, 64·D of them over all warps."""
    block_n, wide = 64 if head_dim <= 128 else 32, dtype == torch.float32
    return Config(
        block_m=max(16, padded(group)),
        block_n=block_n // 2 if wide else block_n,
        num_warps=4 if head_dim <= 64 and not wide else 8,
        num_stages=3 if head_dim <= 128 else 2,
    )


@triton.jit(do_not_specialize=VARIES)
def schedule_kernel(
    tiles, reads, first_item, tiles_per_item, num_tiles, num_parts, items,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """One program. first_item: [num_tiles + 1], the last is the number of items; tiles_per_item: [1]."""
    row = tl.arange(0, ROWS)
    real = row < num_tiles
    record = tiles + row * 5
    position, run = tl.load(record + 2, mask=real, other=0), tl.load(record + 4, mask=real, other=0)
    key_tiles = tl.zeros([ROWS], tl.int32)
    for part in range(num_parts):
        read = reads + (run * num_parts + part) * READ_SIZE
        period, cycle_tiles = tl.load(read + 6, mask=real, other=1), tl.load(read + 7, mask=real, other=1)
        d_min, d_max = tl.load(read + 2, mask=real, other=0), tl.load(read + 3, mask=real, other=0)
        first = tl.maximum(tl.load(read, mask=real, other=0), position - d_max + 1)
        stop = tl.minimum(tl.load(read + 1, mask=real, other=0), position - d_min + 1)
        last_tile = tile_of_key(tl.maximum(stop - 1, 0), period, cycle_tiles, BLOCK_N)
        own = last_tile + 1 - tile_of_key(first, period, cycle_tiles, BLOCK_N)
        key_tiles += tl.where(real & (first < stop), own, 0)
    each = tl.maximum((tl.sum(key_tiles) + items - 1) // items, LEAST)
    own_items = (key_tiles + each - 1) // each
    ends = tl.cumsum(own_items)
    tl.store(first_item + row, ends - own_items, mask=real)
    tl.store(first_item + num_tiles, tl.sum(own_items))
    tl.store(tiles_per_item, each)


@triton.jit
def read_tiles(
    first_tile, stop_tile, first, second, rest, position, acc, high, total,
    keys, values, blocks, base_turns, key_turns, decay,
    first_key, stop_key, period, cycle_tiles, group, softcap,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, VALUES: tl.constexpr,
    ROTATED: tl.constexpr, GROUPED: tl.constexpr, DECAY: tl.constexpr, SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Key tiles [first_tile, stop_tile) of one part. ROTATED False: keys as they lie in the cache."""
    n = tl.arange(0, BLOCK_N)
    first_dims, second_dims, pair = pair_dims(ROTARY, HALF, INTERLEAVED)
    pairs = pair < ROTARY // 2
    value_dims = tl.arange(0, VALUES)
    for tile in tl.range(first_tile, stop_tile, num_stages=STAGES):
        base, tile_stop, phase = place_of_tile(tile, period, cycle_tiles, BLOCK_N)
        j = base + n
        inside = (j >= first_key) & (j < tl.minimum(tile_stop, stop_key))
        block = tl.load(blocks + j // BLOCK_SIZE, mask=inside, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + j % BLOCK_SIZE
        key_rows = keys + slot[:, None] * KEY_STRIDE
        key_mask = inside[:, None] & pairs[None, :]
        key_first = tl.load(key_rows + first_dims[None, :], mask=key_mask, other=0.0)
        key_second = tl.load(key_rows + second_dims[None, :], mask=key_mask, other=0.0)
        query_first, query_second = first, second
        if ROTATED:
            step = n  # the same rows for every tile
            if GROUPED:
                step = (phase * BLOCK_N + n) // group - phase * BLOCK_N // group
            cos, sin = load_turns(key_turns + step[:, None] * ROTARY + pair[None, :], pairs[None, :], ROTARY)
            base_cos, base_sin = load_turns(base_turns + phase * ROTARY + pair, pairs, ROTARY)
            # The few query rows are turned back by κ(base): cheaper than to turn the keys by it, too.
            query_first, query_second = rotate(first, second, base_cos[None, :], -base_sin[None, :])
            if DECAY:
                fade = tl.exp((position - j)[:, None] * tl.load(decay + pair, mask=pairs, other=0.0)[None, :])
                cos, sin = cos * fade, sin * fade
            turned_first, turned_second = rotate(key_first.to(tl.float32), key_second.to(tl.float32), cos, sin)
            key_first, key_second = turned_first.to(DTYPE), turned_second.to(DTYPE)
        key_first, key_second = key_first.to(DTYPE), key_second.to(DTYPE)
        scores = tl.dot(query_first.to(DTYPE), tl.trans(key_first), input_precision=PRECISION)
        scores = tl.dot(query_second.to(DTYPE), tl.trans(key_second), acc=scores, input_precision=PRECISION)
        if REST > 0:
            dims = ROTARY + tl.arange(0, REST)
            key_rest = tl.load(key_rows + dims[None, :], mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)
            scores = tl.dot(rest, tl.trans(key_rest.to(DTYPE)), acc=scores, input_precision=PRECISION)
        if SOFTCAP:
            scores = capped(scores, softcap)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        value = tl.load(
            values + slot[:, None] * VALUE_STRIDE + value_dims[None, :],
            mask=inside[:, None] & (value_dims < VALUE_DIM)[None, :],
            other=0.0,
        ).to(DTYPE)
        acc, high, total = softmax_step(scores, value, acc, high, total, PRECISION)
    return acc, high, total


@triton.jit
def attend(
    record, low, stop, kv_head,
    query, keys, values, turns, base_turns, key_turns, decay, row_scale, blocks, reads,
    query_stride, table_rows, max_blocks, num_parts, scale, softcap,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, VALUES: tl.constexpr,
    GROUPED: tl.constexpr, DECAY: tl.constexpr, SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The row at `record` over its key tiles low … stop − 1, counted through all parts.

    Returns weighted values [BLOCK_M, VALUES], and the base-2 maximum and the sum of weights [BLOCK_M], all fp32.
    """
    sequence, row, position = tl.load(record), tl.load(record + 1).to(tl.int64), tl.load(record + 2)
    run = tl.load(record + 4)
    m = tl.arange(0, BLOCK_M)
    heads = (m < GROUP)[:, None]
    query_rows = query + row * query_stride + (kv_head * GROUP + m[:, None]) * DIM
    factor = tl.load(row_scale + row) * scale
    if not SOFTCAP:
        factor *= LOG2E
    first_dims, second_dims, pair = pair_dims(ROTARY, HALF, INTERLEAVED)
    pairs = pair < ROTARY // 2
    first_raw = tl.load(query_rows + first_dims[None, :], mask=heads & pairs[None, :], other=0.0).to(tl.float32)
    second_raw = tl.load(query_rows + second_dims[None, :], mask=heads & pairs[None, :], other=0.0).to(tl.float32)
    rest = tl.zeros([BLOCK_M, 16], DTYPE)
    if REST > 0:
        dims = ROTARY + tl.arange(0, REST)
        rest = tl.load(query_rows + dims[None, :], mask=heads & (dims < DIM)[None, :], other=0.0)
        rest = (rest.to(tl.float32) * factor).to(DTYPE)
    blocks += sequence * max_blocks
    keys += kv_head * DIM
    values += kv_head * VALUE_DIM
    acc = tl.zeros([BLOCK_M, VALUES], tl.float32)
    high = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for part in range(num_parts):
        read = reads + (run * num_parts + part) * READ_SIZE
        d_min, d_max = tl.load(read + 2), tl.load(read + 3)
        table, turn = tl.load(read + 4), tl.load(read + 5)
        period, cycle_tiles, group = tl.load(read + 6), tl.load(read + 7), tl.load(read + 8)
        first_key = tl.maximum(tl.load(read), position - d_max + 1)
        stop_key = tl.minimum(tl.load(read + 1), position - d_min + 1)
        own_first = tile_of_key(first_key, period, cycle_tiles, BLOCK_N)
        num_tiles = 0
        if first_key < stop_key:
            num_tiles = tile_of_key(stop_key - 1, period, cycle_tiles, BLOCK_N) + 1 - own_first
        first_tile = own_first + tl.minimum(tl.maximum(low, 0), num_tiles)
        stop_tile = own_first + tl.minimum(tl.maximum(stop, 0), num_tiles)
        low -= num_tiles
        stop -= num_tiles
        cos, sin = load_turns(turns + (turn + position) * ROTARY + pair, pairs, ROTARY)
        first, second = rotate(first_raw, second_raw, (cos * factor)[None, :], (sin * factor)[None, :])
        still_stop = tl.where(table < 0, stop_tile, first_tile)
        base_table = base_turns + table.to(tl.int64) * table_rows * ROTARY
        key_table, fades = key_turns + table * BLOCK_N * ROTARY, decay + table * (ROTARY // 2)
        for rotated in tl.static_range(2):
            acc, high, total = read_tiles(
                still_stop if rotated else first_tile, stop_tile if rotated else still_stop,
                first, second, rest, position, acc, high, total,
                keys, values, blocks, base_table, key_table, fades,
                first_key, stop_key, period, cycle_tiles, group, softcap,
                DIM, VALUE_DIM, ROTARY, INTERLEAVED, KV_HEADS * DIM, KV_HEADS * VALUE_DIM, BLOCK_SIZE,
                BLOCK_N, HALF, REST, VALUES, rotated == 1, GROUPED, DECAY, SOFTCAP, DTYPE, PRECISION, STAGES,
            )  # fmt: skip
    return acc, high, total


@triton.jit(do_not_specialize=VARIES)
def decode_kernel(
    tiles, first_item, tiles_per_item, partial, stats, num_tiles,
    query, keys, values, turns, base_turns, key_turns, decay, row_scale, blocks, reads,
    query_stride, table_rows, max_blocks, num_parts, scale, softcap,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, VALUES: tl.constexpr,
    GROUPED: tl.constexpr, DECAY: tl.constexpr, SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial: [items, Hq, VALUE_DIM], weighted values; stats: [items, Hq, 2], base-2 maximum and sum of weights."""
    item, kv_head = tl.program_id(0), tl.program_id(1)
    candidate = tl.arange(0, ROWS)
    starts = tl.load(first_item + candidate, mask=candidate < num_tiles, other=2**30)
    if item < tl.load(first_item + num_tiles):
        row = tl.sum((starts <= item).to(tl.int32)) - 1
        each = tl.load(tiles_per_item)
        low = (item - tl.load(first_item + row)) * each
        acc, high, total = attend(
            tiles + row * 5, low, low + each, kv_head,
            query, keys, values, turns, base_turns, key_turns, decay, row_scale, blocks, reads,
            query_stride, table_rows, max_blocks, num_parts, scale, softcap,
            GROUP, KV_HEADS, DIM, VALUE_DIM, ROTARY, INTERLEAVED, BLOCK_SIZE,
            BLOCK_M, BLOCK_N, HALF, REST, VALUES, GROUPED, DECAY, SOFTCAP, DTYPE, PRECISION, STAGES,
        )  # fmt: skip
        head = tl.arange(0, BLOCK_M)
        dim = tl.arange(0, VALUES)
        own = item * (KV_HEADS * GROUP) + kv_head * GROUP + head
        mask = head < GROUP
        tl.store(
            partial + own[:, None] * VALUE_DIM + dim[None, :], acc, mask=mask[:, None] & (dim < VALUE_DIM)[None, :]
        )
        tl.store(stats + own * 2, high, mask=mask)
        tl.store(stats + own * 2 + 1, total, mask=mask)


@triton.jit(do_not_specialize=VARIES)
def merge_kernel(
    tiles, first_item, partial, stats, sinks, out,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUES: tl.constexpr, SINKS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """out: [T, Hq, VALUE_DIM]. A sink takes its share of the softmax and gives nothing."""
    row, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(first_item + row), tl.load(first_item + row + 1)
    dim = tl.arange(0, VALUES)
    acc = tl.zeros([VALUES], tl.float32)
    high, total = -1e30, 0.0
    if SINKS:
        high, total = tl.load(sinks + head).to(tl.float32) * LOG2E, 1.0
    for first in range(begin, end, MERGED):
        item = first + tl.arange(0, MERGED)
        own = item * HEADS + head
        item_high = tl.load(stats + own * 2, mask=item < end, other=-1e30)
        item_total = tl.load(stats + own * 2 + 1, mask=item < end, other=0.0)
        values = tl.load(
            partial + own[:, None] * VALUE_DIM + dim[None, :],
            mask=(item < end)[:, None] & (dim < VALUE_DIM)[None, :],
            other=0.0,
        )
        new_high = tl.maximum(high, tl.max(item_high, 0))
        weights = tl.exp2(item_high - new_high)
        fade = tl.exp2(high - new_high)
        acc = acc * fade + tl.sum(values * weights[:, None], 0)
        total = total * fade + tl.sum(item_total * weights, 0)
        high = new_high
    packed = tl.load(tiles + row * 5 + 1).to(tl.int64)
    result = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(out + (packed * HEADS + head) * VALUE_DIM + dim, result.to(out.dtype.element_ty), mask=dim < VALUE_DIM)


def decode(query: Tensor, keys: Tensor, values: Tensor, plan: CudaPlan, options: AttentionOptions, out: Tensor) -> None:
    """Rows of `plan`, each a tile of its own, into their places in out [T, Hq, Dv]."""
    num_tiles, heads, kv_heads, device = len(plan.tiles), query.shape[1], keys.shape[2], query.device
    own = config(heads // kv_heads, keys.shape[3], keys.dtype)
    items = triton.cdiv(ITEMS, kv_heads)
    most = items + num_tiles  # a row's last item may be short
    fixed = constants(query, keys, values, plan, options, own) | {
        "HEADS": heads, "ROWS": triton.next_power_of_2(num_tiles), "LEAST": LEAST_TILES, "MERGED": MERGED,
    }  # fmt: skip
    given = arguments(query, keys, values, plan, options, out) | {
        "items": items,
        "partial": torch.empty(most, heads, values.shape[3], dtype=torch.float32, device=device),
        "stats": torch.empty(most, heads, 2, dtype=torch.float32, device=device),
    }
    first_layer = plan.schedule is None
    schedule = torch.empty(num_tiles + 2, dtype=torch.int32, device=device) if plan.schedule is None else plan.schedule
    given |= {"first_item": schedule, "tiles_per_item": schedule[num_tiles + 1 :]}
    if first_layer:
        launch(schedule_kernel, (1,), given, fixed)
        plan.schedule = schedule
    launch(decode_kernel, (most, kv_heads), given, fixed, own.num_warps)
    launch(merge_kernel, (num_tiles, heads), given, fixed)
