"""Splits of decode: how many key tiles each program takes, and the merge of what they found.

A unit is one part of one row: row · num_parts + part. Items of unit u are first_item[u] … first_item[u+1] − 1.
"""

import triton
import triton.language as tl
from prerope.cache.kernels.triton.read import LOG2E, READ_SIZE, RECORDS, VARIES, tile_of_key


@triton.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=RECORDS)
def schedule_kernel(
    tiles, reads, schedule, num_tiles, num_parts, items,
    UNITS: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """One program. schedule: [units + 2], first_item of each unit, the number of items, and tiles of an item."""
    unit = tl.arange(0, UNITS)
    num_units = num_tiles * num_parts
    real = unit < num_units
    record = tiles + unit // num_parts * 5
    position, run = tl.load(record + 2, mask=real, other=0), tl.load(record + 4, mask=real, other=0)
    read = reads + (run * num_parts + unit % num_parts) * READ_SIZE
    period, cycle_tiles = tl.load(read + 6, mask=real, other=1), tl.load(read + 7, mask=real, other=1)
    d_min, d_max = tl.load(read + 2, mask=real, other=0), tl.load(read + 3, mask=real, other=0)
    first = tl.maximum(tl.load(read, mask=real, other=0), position - d_max + 1)
    stop = tl.minimum(tl.load(read + 1, mask=real, other=0), position - d_min + 1)
    last_tile = tile_of_key(tl.maximum(stop - 1, 0), period, cycle_tiles, BLOCK_N)
    own = last_tile + 1 - tile_of_key(first, period, cycle_tiles, BLOCK_N)
    key_tiles = tl.where(real & (first < stop), own, 0)
    each = tl.maximum((tl.sum(key_tiles) + items - 1) // items, LEAST)
    own_items = (key_tiles + each - 1) // each
    ends = tl.cumsum(own_items)
    tl.store(schedule + unit, ends - own_items, mask=real)
    tl.store(schedule + num_units, tl.sum(own_items))
    tl.store(schedule + num_units + 1, each)


@triton.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=RECORDS)
def merge_kernel(
    tiles, schedule, partial, stats, sinks, out, num_parts,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUES: tl.constexpr, SINKS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """out: [T, Hq, VALUE_DIM]. A sink takes its share of the softmax and gives nothing."""
    row, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(schedule + row * num_parts), tl.load(schedule + (row + 1) * num_parts)
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
