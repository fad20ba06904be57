"""Decode: one query row a sequence. Keys are split over programs, and partial results merged by their log-sum-exp.

    schedule   how many key tiles a program takes, so that a fixed grid shares all rows' tiles evenly; on the device
    decode     grid (KV heads, items): some tiles of one part of one row, all query heads of the KV head together
    merge      grid (rows, query heads): the items of a row

A unit is one part of one row: row · num_parts + part. Items of unit u are first_item[u] … first_item[u+1] − 1, so an
item reads one part: a loop over parts inside the program costs 80 registers a thread. Nothing here comes back to the
host and no grid depends on a length, so that the three sit in a CUDA graph.

Scores stand upright, keys × heads: a tile's 64 keys are then the long side of a product, which on sm_90 reads keys and
values from shared memory where the copies put them, and the few heads are the short one.
"""

import torch
import triton
import triton.language as tl
from prerope.cache.attention.types import AttentionOptions
from prerope.cache.cuda.plan import CudaPlan
from prerope.cache.kernels.triton.launch import Config, arguments, constants, launch, padded, upright
from prerope.cache.kernels.triton.read import (  # fmt: skip
    LOG2E,
    LOWEST,
    READ_SIZE,
    RECORDS,
    VARIES,
    capped,
    load_dims,
    load_turns,
    number_of_block,
    pair_dims,
    place_of_tile,
    read_instead,
    rotate,
    slot_in,
    tile_of_key,
)
from prerope.cache.kernels.triton.splits import merge_kernel, schedule_kernel
from torch import Tensor

LEAST_TILES = 4  # of an item: 256 keys; fewer do not pay for a partial result
ITEMS = 528  # programs that share the tiles of all rows, over all KV heads: four for each of 132 multiprocessors
LEAST_UNITS = 256  # lanes that look for an item's unit: one kernel for all steps of as many units
MERGED = 8192  # values of items that a merge loads at once
HEADS_FIRST = True  # programs that run at once are of the heads of a token, which lie side by side


def config(group: int, head_dim: int, dtype: torch.dtype, arch: int | None = None, *, more: bool = False) -> Config:
    """arch: 10 · major + minor of the compute capability; None is that of the device here. more: keys turn in groups or
    fade, which on sm_90 takes the registers of twice as many threads, and of wide or many heads a tile of few keys.

    Expected of sm_90 at 128 dims in bf16: a tile's keys and values are 32 KB, two tiles are on their way while one is
    read, and two programs share a multiprocessor (255 registers a thread, 104 KB of shared memory): up to 128 KB in
    flight, where 3.35 TB/s at 0.7 µs need 18 KB and 4.8 TB/s 25 KB. A tile takes 4 × 324 instructions as keys lie in
    the cache and 4 × 669 turned, so 670 of the 2,260 cycles that its bytes take.
    """
    heads, half = max(16, padded(group)), dtype != torch.float32
    if not half:
        return Config(block_m=heads, block_n=32 if head_dim <= 64 and not more else 16, num_warps=8, num_stages=2)
    if head_dim > 128 or heads > 16:
        return Config(heads, 16 if more or head_dim > 256 else 32, 8, 3)
    return Config(heads, 64, 4 if head_dim <= 64 or (upright(arch) and not more) else 8, 3)


@triton.jit
def load_keys(rows, ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr):
    """First and second dims of all pairs. Interleaved ones come as one load, which is copied 16 bytes at a time."""
    if INTERLEAVED:
        dim = tl.arange(0, 2 * HALF)
        both = load_dims(rows, dim, dim, ROTARY, 2 * HALF)
        return tl.split(tl.reshape(both, BLOCK_N, HALF, 2))
    first, second, pair = pair_dims(ROTARY, HALF, INTERLEAVED)
    return load_dims(rows, first, pair, ROTARY // 2, HALF), load_dims(rows, second, pair, ROTARY // 2, HALF)


@triton.jit
def turns_of_tile(
    base_turns, key_turns, phase, group, pair, ROTARY: tl.constexpr, BLOCK_N: tl.constexpr, TABLE_N: tl.constexpr
):
    """(cos, sin) of κ at a tile's first key, which may lie inside a tile of the tables."""
    pairs = pair < ROTARY // 2
    if TABLE_N == BLOCK_N:
        return load_turns(base_turns + phase * ROTARY + pair, pairs, ROTARY)
    outer = phase // (TABLE_N // BLOCK_N)
    cos, sin = load_turns(base_turns + outer * ROTARY + pair, pairs, ROTARY)
    steps = phase * BLOCK_N // group - outer * TABLE_N // group
    more_cos, more_sin = load_turns(key_turns + steps * ROTARY + pair, pairs, ROTARY)
    return rotate(cos, sin, more_cos, more_sin)


@triton.jit
def read_tiles(
    first_tile, stop_tile, first, second, rest, position, slope,
    keys, values, blocks, base_turns, key_turns, decay,
    first_key, stop_key, period, cycle_tiles, group, softcap,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TABLE_N: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    VALUES: tl.constexpr, LOW_VALUES: tl.constexpr,
    ROTATED: tl.constexpr, GROUPED: tl.constexpr, DECAY: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Key tiles [first_tile, stop_tile) of one part, at least one. ROTATED False: keys as they lie in the cache.

    Where a tile's keys lie is looked up a tile ahead and carried over, in this form: a look-up in
    the same turn of the loop, or one that is more than a load, and the copies wait for each other.
    """
    n = tl.arange(0, BLOCK_N)
    _first_dims, _second_dims, pair = pair_dims(ROTARY, HALF, INTERLEAVED)
    pairs = pair < ROTARY // 2
    low, high_lane = tl.arange(0, LOW_VALUES), tl.arange(0, VALUES - LOW_VALUES if VALUES > LOW_VALUES else 16)
    low_acc = tl.zeros([LOW_VALUES, BLOCK_M], tl.float32)
    high_acc = tl.zeros([VALUES - LOW_VALUES if VALUES > LOW_VALUES else 16, BLOCK_M], tl.float32)
    high = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    base, _tile_stop, phase = place_of_tile(first_tile, period, cycle_tiles, BLOCK_N)
    cycle_stop = base - phase * BLOCK_N + period
    j = base + n
    key = read_instead(j, first_key, stop_key)
    block = tl.load(blocks + number_of_block(key, BLOCK_SIZE))
    if ROTATED:  # the same rows for every tile
        steps = n // group if GROUPED else n
        cos, sin = load_turns(key_turns + steps[:, None] * ROTARY + pair[None, :], pairs[None, :], ROTARY)
        if DECAY:
            grown = tl.exp(-n[:, None] * tl.load(decay + pair, mask=pairs, other=0.0)[None, :])
            cos, sin = cos * grown, sin * grown
    for _tile in tl.range(first_tile, stop_tile, num_stages=STAGES):
        slot = slot_in(block, key, BLOCK_SIZE).to(tl.int64)
        key_rows, value_rows = keys + (slot * KEY_STRIDE)[:, None], values + (slot * VALUE_STRIDE)[:, None]
        key_first, key_second = load_keys(key_rows, ROTARY, HALF, INTERLEAVED, BLOCK_N)
        value_low = load_dims(value_rows, low, low, VALUE_DIM if VALUE_DIM < LOW_VALUES else LOW_VALUES, LOW_VALUES).to(
            DTYPE
        )
        query_first, query_second = first, second
        if ROTATED:
            base_cos, base_sin = turns_of_tile(base_turns, key_turns, phase, group, pair, ROTARY, BLOCK_N, TABLE_N)
            if DECAY:  # from the tile's first key on: keys after it fade less, by what their turns have grown
                fade = tl.exp((position - base) * tl.load(decay + pair, mask=pairs, other=0.0))
                base_cos, base_sin = base_cos * fade, base_sin * fade
            # The few query rows are turned back by κ(base): cheaper than to turn the keys by it, too.
            query_first, query_second = rotate(first, second, base_cos[None, :], -base_sin[None, :])
            turned_first, turned_second = rotate(key_first.to(tl.float32), key_second.to(tl.float32), cos, sin)
            key_first, key_second = turned_first.to(DTYPE), turned_second.to(DTYPE)
        query_first, query_second = tl.trans(query_first.to(DTYPE)), tl.trans(query_second.to(DTYPE))
        scores = tl.dot(key_first.to(DTYPE), query_first, input_precision=PRECISION)
        scores = tl.dot(key_second.to(DTYPE), query_second, acc=scores, input_precision=PRECISION)
        if ROTATED and GROUPED:
            # A tile may begin inside a group, so that some keys are a step further: they are read by a query turned so.
            one_cos, one_sin = load_turns(key_turns + ROTARY + pair, pairs, ROTARY)
            next_cos, next_sin = rotate(base_cos, base_sin, one_cos, one_sin)
            query_first, query_second = rotate(first, second, next_cos[None, :], -next_sin[None, :])
            query_first, query_second = tl.trans(query_first.to(DTYPE)), tl.trans(query_second.to(DTYPE))
            others = tl.dot(key_first.to(DTYPE), query_first, input_precision=PRECISION)
            others = tl.dot(key_second.to(DTYPE), query_second, acc=others, input_precision=PRECISION)
            further = n % group + phase * BLOCK_N % group >= group
            scores = tl.where(further[:, None], others, scores)
        if REST > 0:
            lane = tl.arange(0, REST)
            key_rest = load_dims(key_rows, ROTARY + lane, lane, DIM - ROTARY, REST).to(DTYPE)
            scores = tl.dot(key_rest, tl.trans(rest), acc=scores, input_precision=PRECISION)
        if SLOPES:
            scores += (j - position)[:, None].to(tl.float32) * slope[None, :]
        if SOFTCAP:
            scores = capped(scores, softcap)
        inside = (j >= first_key) & (j < tl.minimum(cycle_stop, stop_key))
        scores = tl.where(inside[:, None], scores, float("-inf"))
        new_high = tl.maximum(high, tl.max(scores, 0))
        weights = tl.exp2(scores - new_high[None, :])
        fade = tl.exp2(high - new_high)[None, :]
        high, total = new_high, total * fade + weights  # summed over keys at the end
        weights = weights.to(DTYPE)
        low_acc = tl.dot(tl.trans(value_low), weights, acc=low_acc * fade, input_precision=PRECISION)
        if VALUES > LOW_VALUES:
            lanes: tl.constexpr = VALUES - LOW_VALUES
            value_high = load_dims(value_rows, LOW_VALUES + high_lane, high_lane, VALUE_DIM - LOW_VALUES, lanes)
            high_acc = tl.dot(tl.trans(value_high.to(DTYPE)), weights, acc=high_acc * fade, input_precision=PRECISION)
        phase += 1
        base += BLOCK_N
        wraps = phase == cycle_tiles
        phase, base = tl.where(wraps, 0, phase), tl.where(wraps, cycle_stop, base)
        cycle_stop += tl.where(wraps, period, 0)
        j = base + n
        key = read_instead(j, first_key, stop_key)
        block = tl.load(blocks + number_of_block(key, BLOCK_SIZE), mask=(n >= 0) & (_tile + 1 < stop_tile), other=0)
    return low_acc, high_acc, high, tl.sum(total, 0)


@triton.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=RECORDS)
def decode_kernel(
    tiles, schedule, partial, stats, num_tiles,
    query, keys, values, turns, base_turns, key_turns, decay, row_scale, slopes, blocks, reads,
    query_stride, table_rows, max_blocks, num_parts, scale, softcap,
    UNITS: tl.constexpr, HEADS_FIRST: tl.constexpr,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TABLE_N: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    VALUES: tl.constexpr, GROUPED: tl.constexpr, DECAY: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial: [items, Hq, VALUE_DIM], weighted values; stats: [items, Hq, 2], base-2 maximum and sum of weights."""
    item, kv_head = tl.program_id(1), tl.program_id(0)
    if not HEADS_FIRST:
        item, kv_head = kv_head, item
    num_units = num_tiles * num_parts
    candidate = tl.arange(0, UNITS)
    starts = tl.load(schedule + candidate, mask=candidate < num_units, other=2**30)
    if item >= tl.load(schedule + num_units):
        return
    unit = tl.sum((starts <= item).to(tl.int32)) - 1
    each = tl.load(schedule + num_units + 1)
    skipped = (item - tl.load(schedule + unit)) * each
    record = tiles + unit // num_parts * 5
    sequence, row, position = tl.load(record), tl.load(record + 1).to(tl.int64), tl.load(record + 2)
    read = reads + (tl.load(record + 4) * num_parts + unit % num_parts) * READ_SIZE
    table, turn = tl.load(read + 4), tl.load(read + 5)
    period, cycle_tiles, group = tl.load(read + 6), tl.load(read + 7), tl.load(read + 8)
    first_key = tl.maximum(tl.load(read), position - tl.load(read + 3) + 1)
    stop_key = tl.minimum(tl.load(read + 1), position - tl.load(read + 2) + 1)
    first_tile = tile_of_key(first_key, period, cycle_tiles, BLOCK_N) + skipped
    stop_tile = tl.minimum(first_tile + each, tile_of_key(stop_key - 1, period, cycle_tiles, BLOCK_N) + 1)

    m = tl.arange(0, BLOCK_M)
    heads = (m < GROUP)[:, None]
    query_rows = query + row * query_stride + (kv_head * GROUP + m[:, None]) * DIM
    factor = tl.load(row_scale + row) * scale
    if not SOFTCAP:
        factor *= LOG2E
    first_dims, second_dims, pair = pair_dims(ROTARY, HALF, INTERLEAVED)
    pairs = pair < ROTARY // 2
    cos, sin = load_turns(turns + (turn + position) * ROTARY + pair, pairs, ROTARY)
    first, second = rotate(
        tl.load(query_rows + first_dims[None, :], mask=heads & pairs[None, :], other=0.0).to(tl.float32),
        tl.load(query_rows + second_dims[None, :], mask=heads & pairs[None, :], other=0.0).to(tl.float32),
        (cos * factor)[None, :], (sin * factor)[None, :],
    )  # fmt: skip
    rest = tl.zeros([BLOCK_M, 16], DTYPE)
    if REST > 0:
        dims = ROTARY + tl.arange(0, REST)
        rest = tl.load(query_rows + dims[None, :], mask=heads & (dims < DIM)[None, :], other=0.0)
        rest = (rest.to(tl.float32) * factor).to(DTYPE)
    slope = factor
    if SLOPES:
        slope = tl.load(slopes + kv_head * GROUP + m, mask=m < GROUP, other=0.0)
        if not SOFTCAP:
            slope *= LOG2E
    blocks += sequence * max_blocks
    keys += kv_head * DIM
    values += kv_head * VALUE_DIM
    low_values: tl.constexpr = VALUES // 2 if VALUES >= 128 else VALUES
    base_table = base_turns + table.to(tl.int64) * table_rows * ROTARY
    key_table, fades = key_turns + table * TABLE_N * ROTARY, decay + table * (ROTARY // 2)
    if table < 0:
        low_acc, high_acc, high, total = read_tiles(
            first_tile, stop_tile, first, second, rest, position, slope,
            keys, values, blocks, base_table, key_table, fades,
            first_key, stop_key, period, cycle_tiles, group, softcap,
            DIM, VALUE_DIM, ROTARY, INTERLEAVED, KV_HEADS * DIM, KV_HEADS * VALUE_DIM, BLOCK_SIZE,
            BLOCK_M, BLOCK_N, TABLE_N, HALF, REST, VALUES, low_values,
            False, GROUPED, DECAY, SOFTCAP, SLOPES, DTYPE, PRECISION, STAGES,
        )  # fmt: skip
    else:
        low_acc, high_acc, high, total = read_tiles(
            first_tile, stop_tile, first, second, rest, position, slope,
            keys, values, blocks, base_table, key_table, fades,
            first_key, stop_key, period, cycle_tiles, group, softcap,
            DIM, VALUE_DIM, ROTARY, INTERLEAVED, KV_HEADS * DIM, KV_HEADS * VALUE_DIM, BLOCK_SIZE,
            BLOCK_M, BLOCK_N, TABLE_N, HALF, REST, VALUES, low_values,
            True, GROUPED, DECAY, SOFTCAP, SLOPES, DTYPE, PRECISION, STAGES,
        )  # fmt: skip
    own = item * (KV_HEADS * GROUP) + kv_head * GROUP + m
    low, mask = tl.arange(0, low_values), m < GROUP
    sums = partial + own[None, :] * VALUE_DIM
    tl.store(sums + low[:, None], low_acc, mask=mask[None, :] & (low < VALUE_DIM)[:, None])
    if low_values < VALUES:
        dim = low_values + tl.arange(0, VALUES - low_values)
        tl.store(sums + dim[:, None], high_acc, mask=mask[None, :] & (dim < VALUE_DIM)[:, None])
    tl.store(stats + own * 2, high, mask=mask)
    tl.store(stats + own * 2 + 1, total, mask=mask)


def decode(query: Tensor, keys: Tensor, values: Tensor, plan: CudaPlan, options: AttentionOptions, out: Tensor) -> None:
    """Rows of `plan`, each a tile of its own, into their places in out [T, Hq, Dv]."""
    num_tiles, heads, kv_heads, device = len(plan.tiles), query.shape[1], keys.shape[2], query.device
    more = plan.grouped or plan.fades
    own = config(heads // kv_heads, keys.shape[3], keys.dtype, more=more)
    items, units = triton.cdiv(ITEMS, kv_heads), num_tiles * plan.num_parts
    most = items + units  # a unit's last item may be short
    fixed = constants(query, keys, values, plan, options, own, more=more)
    fixed |= {"HEADS": heads, "LEAST": LEAST_TILES, "MERGED": max(1, MERGED // fixed["VALUES"])}
    fixed |= {"UNITS": max(LEAST_UNITS, triton.next_power_of_2(units)), "HEADS_FIRST": HEADS_FIRST}
    schedule = torch.empty(units + 2, dtype=torch.int32, device=device) if plan.schedule is None else plan.schedule
    given = arguments(query, keys, values, plan, options, out) | {
        "items": items,
        "partial": torch.empty(most, heads, values.shape[3], dtype=torch.float32, device=device),
        "stats": torch.empty(most, heads, 2, dtype=torch.float32, device=device),
        "schedule": schedule,
    }
    if plan.schedule is None:
        launch(schedule_kernel, (1,), given, fixed)
        plan.schedule = schedule
    launch(decode_kernel, (kv_heads, most) if HEADS_FIRST else (most, kv_heads), given, fixed, own.num_warps)
    launch(merge_kernel, (num_tiles, heads), given, fixed)
