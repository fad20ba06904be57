"""Queries and keys of chunks, turned ahead of the loop that reads them: each once a step and layer.

turn_queries  the queries of each part at their angles, scaled
turn_keys     the keys of parts that turn, into scratch; unrotated parts' stay in the cache
"""

import triton
import triton.language as tl
from prerope.cache.cuda.plan import CudaPlan
from prerope.cache.kernels.triton.read import (
    LOG2E,
    READ_SIZE,
    RECORDS,
    VARIES,
    faded,
    heads_of,
    load_pairs,
    load_turns,
    place_of_tile,
    rotate,
    store_pairs,
)

SPAN_FIELDS = ("sequence", "low", "stop", "slot", "period", "cycle_tiles", "group", "scratch", "origin", "program")
SPAN_SIZE = tl.constexpr(len(SPAN_FIELDS))


def query_warps(plan: CudaPlan) -> int:
    """Of `turn_queries_kernel`. A tile of more than 64 dims, of what fades and of interleaved pairs takes registers."""
    return 8 if plan.fades or plan.interleaved or plan.rotary_dim > 64 else 4


def key_warps(plan: CudaPlan) -> int:
    """Of `turn_keys_kernel`."""
    return 8 if plan.rotary_dim > 256 else 4


@triton.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=RECORDS)
def turn_queries_kernel(
    tiles, reads, query, turned_queries, turns, decay, row_scale, query_stride, num_rows, num_parts, scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    DECAY: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, parts, KV heads). turned_queries: [parts, T, Hq, DIM], in base 2 where there is no soft-cap."""
    record, part = tiles + tl.program_id(0) * 5, tl.program_id(1)
    kv_head, m = heads_of(tl.program_id(2), GROUP, BLOCK_M)
    first_row, start, count, run = (
        tl.load(record + 1), tl.load(record + 2), tl.load(record + 3), tl.load(record + 4),
    )  # fmt: skip
    read = reads + (run * num_parts + part) * READ_SIZE
    if tl.load(read + 1) <= tl.load(read):  # no part of this run, so without turns
        return
    slot, turn, origin = tl.load(read + 4), tl.load(read + 5), tl.load(read + 10)
    row, head = m // GROUP, kv_head * GROUP + m % GROUP
    packed = (first_row + row).to(tl.int64)
    mask = (row < count)[:, None]
    source = query + packed[:, None] * query_stride + head[:, None] * DIM
    target = turned_queries + ((part * num_rows + packed) * (KV_HEADS * GROUP) + head)[:, None] * DIM
    factor = tl.load(row_scale + packed, mask=row < count, other=0.0) * scale * (1.0 if SOFTCAP else LOG2E)
    pair = tl.arange(0, HALF)
    both = mask & (pair < ROTARY // 2)[None, :]
    first, second = load_pairs(source, both, ROTARY, HALF, INTERLEAVED)
    cos, sin = load_turns(turns + (turn + start + row)[:, None] * ROTARY + pair[None, :], both, ROTARY)
    if DECAY:
        cos, sin = faded(cos, sin, start + row - origin, decay + tl.maximum(slot, 0) * (ROTARY // 2), pair, ROTARY)
    first, second = rotate(first * factor[:, None], second * factor[:, None], cos, sin)
    store_pairs(target, first, second, both, ROTARY, HALF, INTERLEAVED)
    if REST > 0:
        dims = ROTARY + tl.arange(0, REST)
        rest_mask = mask & (dims < DIM)[None, :]
        rest = tl.load(source + dims[None, :], mask=rest_mask, other=0.0).to(tl.float32) * factor[:, None]
        tl.store(target + dims[None, :], rest.to(turned_queries.dtype.element_ty), mask=rest_mask)


@triton.jit
def turns_of_keys(
    base_turns, key_turns, slot, phase, group, mask, table_rows,
    ROTARY: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(cos, sin) of a tile's keys, [BLOCK_N, HALF]: from the tile's first key on, and of that key."""
    n, pair = tl.arange(0, BLOCK_N), tl.arange(0, HALF)
    step = (phase * BLOCK_N + n) // group - phase * BLOCK_N // group
    rows = key_turns + (slot * BLOCK_N + step)[:, None] * ROTARY + pair[None, :]
    cos, sin = load_turns(rows, mask, ROTARY)
    base = base_turns + (slot.to(tl.int64) * table_rows + phase) * ROTARY + pair
    base_cos, base_sin = load_turns(base, pair < ROTARY // 2, ROTARY)
    return rotate(cos, sin, base_cos[None, :], base_sin[None, :])


@triton.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=RECORDS)
def turn_keys_kernel(
    spans, keys, scratch, base_turns, key_turns, decay, blocks,
    num_spans, first_head, scratch_heads, table_rows, max_blocks,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    DECAY: tl.constexpr, BLOCK_N: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Grid (key tiles of all spans, heads of this pass). scratch: [rows, scratch_heads, DIM]."""
    program, head = tl.program_id(0), tl.program_id(1)
    candidate = tl.arange(0, SPANS)
    programs = tl.load(spans + candidate * SPAN_SIZE + 9, mask=candidate < num_spans, other=2**30)
    span = spans + (tl.sum((programs <= program).to(tl.int32)) - 1) * SPAN_SIZE
    sequence, low, stop, slot = tl.load(span), tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    period, cycle_tiles, group = tl.load(span + 4), tl.load(span + 5), tl.load(span + 6)
    first_tile = low // period * cycle_tiles + low % period // BLOCK_N
    base, tile_stop, phase = place_of_tile(first_tile + program - tl.load(span + 9), period, cycle_tiles, BLOCK_N)
    j = base + tl.arange(0, BLOCK_N)
    inside = (j >= low) & (j < tl.minimum(tile_stop, stop))
    block = tl.load(blocks + sequence * max_blocks + j // BLOCK_SIZE, mask=inside, other=0)
    place = block.to(tl.int64) * BLOCK_SIZE + j % BLOCK_SIZE
    source = keys + (place * KV_HEADS + first_head + head)[:, None] * DIM
    target = scratch + ((j + tl.load(span + 7)).to(tl.int64) * scratch_heads + head)[:, None] * DIM
    pair = tl.arange(0, HALF)
    both = inside[:, None] & (pair < ROTARY // 2)[None, :]
    cos, sin = turns_of_keys(base_turns, key_turns, slot, phase, group, both, table_rows, ROTARY, HALF, BLOCK_N)
    if DECAY:  # query and key both fade from the run's first row, so that neither overflows
        cos, sin = faded(cos, sin, tl.load(span + 8) - j, decay + slot * (ROTARY // 2), pair, ROTARY)
    first, second = load_pairs(source, both, ROTARY, HALF, INTERLEAVED)
    first, second = rotate(first, second, cos, sin)
    store_pairs(target, first, second, both, ROTARY, HALF, INTERLEAVED)
    if REST > 0:
        dims = ROTARY + tl.arange(0, REST)
        rest_mask = inside[:, None] & (dims < DIM)[None, :]
        tl.store(target + dims[None, :], tl.load(source + dims[None, :], mask=rest_mask), mask=rest_mask)
