"""Key tiles as decode reads them: turned in registers, with scores upright, keys × heads.

A key at base + n of its tile turns by κ(base) and by what lies between; the query rows are turned back by the first,
the keys by the rest, whose angles are the same for every tile and stay in registers.
"""

import triton
import triton.language as tl
from prerope.cache.kernels.triton.read import (
    LOWEST,
    capped,
    faded,
    load_dims,
    load_turns,
    number_of_block,
    pair_dims,
    place_of_tile,
    read_instead,
    rotate,
    slot_in,
)


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
def turns_inside(
    key_turns, decay, group, ROTARY: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUPED: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """(cos, sin) of a tile's keys from its first on: the same rows for every tile."""
    n, pair = tl.arange(0, BLOCK_N), tl.arange(0, HALF)
    pairs = pair < ROTARY // 2
    steps = n // group if GROUPED else n
    cos, sin = load_turns(key_turns + steps[:, None] * ROTARY + pair[None, :], pairs[None, :], ROTARY)
    if DECAY:
        cos, sin = faded(cos, sin, -n, decay, pair, ROTARY)
    return cos, sin


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
def turn_back(
    first, second, distance, base_turns, key_turns, decay, phase, group,
    ROTARY: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr, TABLE_N: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """The few query rows as a tile's first key sees them, `distance` before them; to turn the keys would cost more."""
    pair = tl.arange(0, HALF)
    cos, sin = turns_of_tile(base_turns, key_turns, phase, group, pair, ROTARY, BLOCK_N, TABLE_N)
    if DECAY:  # from the tile's first key on: keys after it fade less, by what their turns have grown
        fade = tl.exp(distance * tl.load(decay + pair, mask=pair < ROTARY // 2, other=0.0))
        cos, sin = cos * fade, sin * fade
    return rotate(first, second, cos[None, :], -sin[None, :])


@triton.jit
def turn_keys(
    first, second, cos, sin, key_turns, phase, group,
    ROTARY: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr, GROUPED: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """A tile's keys, turned by what lies between its first and them."""
    first, second = rotate(first.to(tl.float32), second.to(tl.float32), cos, sin)
    if GROUPED:  # a tile may begin inside a group, so that some keys are a step further
        n, pair = tl.arange(0, BLOCK_N), tl.arange(0, HALF)
        further = (n % group + phase * BLOCK_N % group >= group)[:, None]
        one_cos, one_sin = load_turns(key_turns + ROTARY + pair, pair < ROTARY // 2, ROTARY)
        next_first, next_second = rotate(first, second, one_cos[None, :], one_sin[None, :])
        first, second = tl.where(further, next_first, first), tl.where(further, next_second, second)
    return first.to(SCORED), second.to(SCORED)


@triton.jit
def next_place(phase, base, cycle_stop, period, cycle_tiles, BLOCK_N: tl.constexpr):
    """Of the tile after this one: as `place_of_tile`, of the cycle itself the end."""
    phase += 1
    base += BLOCK_N
    wraps = phase == cycle_tiles
    phase, base = tl.where(wraps, 0, phase), tl.where(wraps, cycle_stop, base)
    return phase, base, cycle_stop + tl.where(wraps, period, 0)


@triton.jit
def read_tiles(
    first_tile, stop_tile, first, second, rest, position, slope, keys, values, blocks, base_turns, key_turns, decay,
    first_key, stop_key, period, cycle_tiles, group, softcap,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TABLE_N: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    VALUES: tl.constexpr, LOW_VALUES: tl.constexpr, GROUPED: tl.constexpr, DECAY: tl.constexpr,
    SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, SCORED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Key tiles [first_tile, stop_tile) of one part, at least one. ROTATED False: keys as they lie in the cache.

    Where a tile's keys lie is looked up a tile ahead and carried over, in this form: a look-up in
    the same turn of the loop, or one that is more than a load, and the copies wait for each other.
    """
    n, lane = tl.arange(0, BLOCK_N), tl.arange(0, REST if REST > 0 else 16)
    HIGH_VALUES: tl.constexpr = VALUES - LOW_VALUES if VALUES > LOW_VALUES else 16
    low, high_lane = tl.arange(0, LOW_VALUES), tl.arange(0, HIGH_VALUES)
    low_acc, high_acc = tl.zeros([LOW_VALUES, BLOCK_M], tl.float32), tl.zeros([HIGH_VALUES, BLOCK_M], tl.float32)
    high = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    base, _tile_stop, phase = place_of_tile(first_tile, period, cycle_tiles, BLOCK_N)
    cycle_stop = base - phase * BLOCK_N + period
    j = base + n
    key = read_instead(j, first_key, stop_key)
    block = tl.load(blocks + number_of_block(key, BLOCK_SIZE))
    if ROTATED:
        cos, sin = turns_inside(key_turns, decay, group, ROTARY, HALF, BLOCK_N, GROUPED, DECAY)
    for tile in tl.range(first_tile, stop_tile, num_stages=STAGES):
        slot = slot_in(block, key, BLOCK_SIZE).to(tl.int64)
        key_rows, value_rows = keys + (slot * KEY_STRIDE)[:, None], values + (slot * VALUE_STRIDE)[:, None]
        key_first, key_second = load_keys(key_rows, ROTARY, HALF, INTERLEAVED, BLOCK_N)
        value_low = load_dims(value_rows, low, low, VALUE_DIM if VALUE_DIM < LOW_VALUES else LOW_VALUES, LOW_VALUES)
        query_first, query_second = first, second
        if ROTATED:
            query_first, query_second = turn_back(
                first, second, position - base, base_turns, key_turns, decay, phase, group,
                ROTARY, HALF, BLOCK_N, TABLE_N, DECAY,
            )  # fmt: skip
            key_first, key_second = turn_keys(
                key_first, key_second, cos, sin, key_turns, phase, group, ROTARY, HALF, BLOCK_N, GROUPED, SCORED
            )
        scores = tl.dot(key_first.to(SCORED), tl.trans(query_first.to(SCORED)), input_precision=PRECISION)
        scores = tl.dot(key_second.to(SCORED), tl.trans(query_second.to(SCORED)), acc=scores, input_precision=PRECISION)
        if REST > 0:
            key_rest = load_dims(key_rows, ROTARY + lane, lane, DIM - ROTARY, REST).to(SCORED)
            scores = tl.dot(key_rest, tl.trans(rest.to(SCORED)), acc=scores, input_precision=PRECISION)
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
        low_acc = tl.dot(tl.trans(value_low.to(DTYPE)), weights, acc=low_acc * fade, input_precision=PRECISION)
        if VALUES > LOW_VALUES:
            value_high = load_dims(value_rows, LOW_VALUES + high_lane, high_lane, VALUE_DIM - LOW_VALUES, HIGH_VALUES)
            high_acc = tl.dot(tl.trans(value_high.to(DTYPE)), weights, acc=high_acc * fade, input_precision=PRECISION)
        phase, base, cycle_stop = next_place(phase, base, cycle_stop, period, cycle_tiles, BLOCK_N)
        j = base + n
        key = read_instead(j, first_key, stop_key)
        block = tl.load(blocks + number_of_block(key, BLOCK_SIZE), mask=(n >= 0) & (tile + 1 < stop_tile), other=0)
    return low_acc, high_acc, high, tl.sum(total, 0)
