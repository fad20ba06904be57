"""Decode: one query row a sequence. Keys are split over programs, and partial results merged by their log-sum-exp.

    schedule   how many key tiles a program takes, so that a fixed grid shares all rows' tiles evenly; on the device
    decode     grid (KV heads, items): some tiles of one part of one row, all query heads of the KV head together, or as
               many as registers allow
    merge      grid (rows, query heads): the items of a row

A unit is one part of one row: row · num_parts + part. Items of unit u are first_item[u] … first_item[u+1] − 1, so an
item reads one part: a loop over parts inside the program costs 80 registers a thread. Nothing here comes back to the
host and no grid depends on a length, so that the three sit in a CUDA graph.

Scores stand upright, keys × heads: a tile's 64 keys are then the long side of a product, which on sm_90 reads keys and
values from shared memory where the copies put them, and the few heads are the short one.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from prerope.cache.attention.types import AttentionOptions
from prerope.cache.cuda.plan import CudaPlan
from prerope.cache.cuda.tiles import choice
from prerope.cache.kernels.triton.key_tiles import read_tiles
from prerope.cache.kernels.triton.launch import (
    DTYPES,
    Config,
    arguments,
    constants,
    interpreted,
    launch,
    num_programs,
    padded,
    upright,
    values_shared,
)
from prerope.cache.kernels.triton.read import (
    LOG2E,
    READ_SIZE,
    RECORDS,
    VARIES,
    heads_of,
    load_pairs,
    load_turns,
    pair_dims,
    rotate,
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
    half = dtype != torch.float32
    most = 128 if head_dim <= 64 else 32 if more else 64
    heads = min(padded(group), most if half and head_dim <= 128 else 16)
    if not half:
        # Of narrow heads whose products are FMAs ptxas spills some at two stages, to have room for a second program.
        stages = 3 if head_dim <= 128 and (more or head_dim > 64) else 2
        shipped = Config(heads, 32 if head_dim <= 64 and not more else 16, num_warps=8, num_stages=stages)
    elif head_dim > 128 or heads > 16:
        none_ahead = head_dim > 256 and more and not values_shared(arch)
        shipped = Config(heads, 16 if more or head_dim > 256 else 32, 8, 1 if none_ahead else 3)
    else:
        shipped = Config(heads, 64, 4 if head_dim <= 64 or (upright(arch) and not more) else 8, 3)
    measured = choice("decode", group, head_dim, dtype) if arch is None else None
    if measured is None or measured.tile is None:
        return shipped
    tile = Config(*measured.tile)
    return replace(shipped, block_n=min(shipped.block_n, tile.block_n)) if more else tile


def products(head_dim: int, dtype: torch.dtype, arch: int | None = None, *, more: bool = False) -> dict[str, object]:
    """Of what scores and weighted values are products, and how fp32 ones are made.

    Three tf32 products make an fp32 one, but take the registers of three; where none are left plain FMAs do. So they do
    for scores of more than 256 dims in 16 bits, which on sm_90 take half of the time that the tile's bytes take, and
    where products take their values from registers for those, too.
    """
    found = {"SCORED": DTYPES[dtype], "DTYPE": DTYPES[dtype], "PRECISION": "tf32x3"}
    if head_dim > (256 if dtype != torch.float32 else 64) or more:
        found["PRECISION"] = "ieee"
    if head_dim > 256:
        found["SCORED"] = tl.float32
        found["DTYPE"] = DTYPES[dtype] if values_shared(arch) else tl.float32
    return found | dict.fromkeys(("SCORED", "DTYPE"), tl.float32) if interpreted() else found


def grid(group: int, head_dim: int, dtype: torch.dtype) -> tuple[int, bool]:
    """(items over all KV heads, whether heads come first) as they are shipped, or as they were measured."""
    measured = choice("decode", group, head_dim, dtype)
    if measured is None:
        return ITEMS, HEADS_FIRST
    items, heads_first = measured.items, measured.heads_first
    return ITEMS if items is None else items, HEADS_FIRST if heads_first is None else heads_first


@triton.jit
def find_unit(schedule, item, num_units, UNITS: tl.constexpr):
    """(unit, tiles of it before this item, tiles of an item). Past the last item: the last unit."""
    candidate = tl.arange(0, UNITS)
    starts = tl.load(schedule + candidate, mask=candidate < num_units, other=2**30)
    unit = tl.sum((starts <= item).to(tl.int32)) - 1
    each = tl.load(schedule + num_units + 1)
    return unit, (item - tl.load(schedule + unit)) * each, each


@triton.jit
def load_query(
    rows, turns, factor, mask, DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """Query heads of a row, turned and scaled: first and second dims of all pairs, and the dims that do not rotate."""
    _first, _second, pair = pair_dims(ROTARY, HALF, INTERLEAVED)
    pairs = pair < ROTARY // 2
    cos, sin = load_turns(turns + pair, pairs, ROTARY)
    first, second = load_pairs(rows, mask & pairs[None, :], ROTARY, HALF, INTERLEAVED)
    first, second = rotate(first, second, (cos * factor)[None, :], (sin * factor)[None, :])
    rest = tl.zeros([BLOCK_M, 16], SCORED)
    if REST > 0:
        dims = ROTARY + tl.arange(0, REST)
        rest = tl.load(rows + dims[None, :], mask=mask & (dims < DIM)[None, :], other=0.0)
        rest = (rest.to(tl.float32) * factor).to(SCORED)
    return first, second, rest


@triton.jit
def store_item(
    partial, stats, low_acc, high_acc, high, total, own, mask,
    VALUE_DIM: tl.constexpr, VALUES: tl.constexpr, LOW_VALUES: tl.constexpr,
):  # fmt: skip
    """What an item found, of the heads `own`: weighted values, and their base-2 maximum and sum of weights."""
    low = tl.arange(0, LOW_VALUES)
    sums = partial + own[None, :] * VALUE_DIM
    tl.store(sums + low[:, None], low_acc, mask=mask[None, :] & (low < VALUE_DIM)[:, None])
    if LOW_VALUES < VALUES:
        dim = LOW_VALUES + tl.arange(0, VALUES - LOW_VALUES)
        tl.store(sums + dim[:, None], high_acc, mask=mask[None, :] & (dim < VALUE_DIM)[:, None])
    tl.store(stats + own * 2, high, mask=mask)
    tl.store(stats + own * 2 + 1, total, mask=mask)


@triton.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=RECORDS)
def decode_kernel(
    tiles, schedule, partial, stats, num_tiles,
    query, keys, values, turns, base_turns, key_turns, decay, row_scale, slopes, blocks, reads,
    query_stride, table_rows, max_blocks, num_parts, scale, softcap,
    UNITS: tl.constexpr, HEADS_FIRST: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TABLE_N: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, VALUES: tl.constexpr, GROUPED: tl.constexpr, DECAY: tl.constexpr,
    SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, SCORED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """partial: [items, Hq, VALUE_DIM], weighted values; stats: [items, Hq, 2], base-2 maximum and sum of weights."""
    item, program = tl.program_id(1), tl.program_id(0)
    if not HEADS_FIRST:
        item, program = program, item
    kv_head, m = heads_of(program, GROUP, BLOCK_M)
    num_units = num_tiles * num_parts
    unit, skipped, each = find_unit(schedule, item, num_units, UNITS)
    if item >= tl.load(schedule + num_units):
        return
    record = tiles + unit // num_parts * 5
    sequence, row, position = tl.load(record), tl.load(record + 1).to(tl.int64), tl.load(record + 2)
    read = reads + (tl.load(record + 4) * num_parts + unit % num_parts) * READ_SIZE
    table, turn = tl.load(read + 4), tl.load(read + 5)
    period, cycle_tiles, group = tl.load(read + 6), tl.load(read + 7), tl.load(read + 8)
    first_key = tl.maximum(tl.load(read), position - tl.load(read + 3) + 1)
    stop_key = tl.minimum(tl.load(read + 1), position - tl.load(read + 2) + 1)
    first_tile = tile_of_key(first_key, period, cycle_tiles, BLOCK_N) + skipped
    stop_tile = tl.minimum(first_tile + each, tile_of_key(stop_key - 1, period, cycle_tiles, BLOCK_N) + 1)
    head = kv_head * GROUP + m
    factor = tl.load(row_scale + row) * scale * (1.0 if SOFTCAP else LOG2E)
    first, second, rest = load_query(
        query + row * query_stride + head[:, None] * DIM, turns + (turn + position) * ROTARY, factor,
        (m < GROUP)[:, None], DIM, ROTARY, INTERLEAVED, HALF, REST, BLOCK_M, SCORED,
    )  # fmt: skip
    slope = factor
    if SLOPES:
        slope = tl.load(slopes + head, mask=m < GROUP, other=0.0) * (1.0 if SOFTCAP else LOG2E)
    low_values: tl.constexpr = VALUES // 2 if VALUES >= 128 else VALUES
    given = (
        first_tile, stop_tile, first, second, rest, position, slope, keys + kv_head * DIM, values + kv_head * VALUE_DIM,
        blocks + sequence * max_blocks, base_turns + table.to(tl.int64) * table_rows * ROTARY,
        key_turns + table * TABLE_N * ROTARY, decay + table * (ROTARY // 2),
        first_key, stop_key, period, cycle_tiles, group, softcap,
    )  # fmt: skip
    if table < 0:
        low_acc, high_acc, high, total = read_tiles(
            *given, DIM, VALUE_DIM, ROTARY, INTERLEAVED, KV_HEADS * DIM, KV_HEADS * VALUE_DIM, BLOCK_SIZE,
            BLOCK_M, BLOCK_N, TABLE_N, HALF, REST, VALUES, low_values,
            GROUPED, DECAY, SOFTCAP, SLOPES, SCORED, DTYPE, PRECISION, STAGES, False,
        )  # fmt: skip
    else:
        low_acc, high_acc, high, total = read_tiles(
            *given, DIM, VALUE_DIM, ROTARY, INTERLEAVED, KV_HEADS * DIM, KV_HEADS * VALUE_DIM, BLOCK_SIZE,
            BLOCK_M, BLOCK_N, TABLE_N, HALF, REST, VALUES, low_values,
            GROUPED, DECAY, SOFTCAP, SLOPES, SCORED, DTYPE, PRECISION, STAGES, True,
        )  # fmt: skip
    own = item * (KV_HEADS * GROUP) + head
    store_item(partial, stats, low_acc, high_acc, high, total, own, m < GROUP, VALUE_DIM, VALUES, low_values)


def decode(query: Tensor, keys: Tensor, values: Tensor, plan: CudaPlan, options: AttentionOptions, out: Tensor) -> None:
    """Rows of `plan`, each a tile of its own, into their places in out [T, Hq, Dv]."""
    num_tiles, heads, kv_heads, device = len(plan.tiles), query.shape[1], keys.shape[2], query.device
    group, dim, more = heads // kv_heads, keys.shape[3], plan.grouped or plan.fades
    own, (items, heads_first) = config(group, dim, keys.dtype, more=more), grid(group, dim, keys.dtype)
    programs, units = num_programs(kv_heads, group, own), num_tiles * plan.num_parts
    items = triton.cdiv(items, programs)
    most = items + units  # a unit's last item may be short
    fixed = constants(query, keys, values, plan, options, own) | products(dim, keys.dtype, more=more)
    fixed |= {"HEADS": heads, "LEAST": LEAST_TILES, "MERGED": max(1, MERGED // fixed["VALUES"])}
    fixed |= {"UNITS": max(LEAST_UNITS, triton.next_power_of_2(units)), "HEADS_FIRST": heads_first}
    given = arguments(query, keys, values, plan, options, out) | {
        "items": items,
        "partial": torch.empty(most, heads, values.shape[3], dtype=torch.float32, device=device),
        "stats": torch.empty(most, heads, 2, dtype=torch.float32, device=device),
    }
    first = items not in plan.schedules
    if first:
        plan.schedules[items] = torch.empty(units + 2, dtype=torch.int32, device=device)
    given["schedule"] = plan.schedules[items]
    if first:
        launch(schedule_kernel, (1,), given, fixed)
    launch(decode_kernel, (programs, most) if heads_first else (most, programs), given, fixed, own.num_warps)
    launch(merge_kernel, (num_tiles, heads), given, fixed)
