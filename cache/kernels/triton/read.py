"""What the kernels share: records, the rotation of pairs, key tiles, the soft-cap and the running softmax.

Records are int32 rows: `tiles` (TILE_FIELDS) say which rows of a step, `reads` (READ_FIELDS) how rows of one run see
one part of their keys. Rows × query heads of a KV head are the rows of a tile.

Keys come in tiles of BLOCK_N; a key at base + n of its tile is to be turned by κ(base + n). Two small tables give that
angle, made in fp64 and rounded once: `base_turns` κ(base), a row a tile, and `key_turns` the rest, the same for all
tiles. So no kernel evaluates a sine, and no angle is large.

A head that turns is read in pieces: the first and the second dims of all pairs, and the dims that do not rotate. Each
piece is one load, whatever the pairing, padded to a power of two of at least 16.
"""

import triton
import triton.language as tl

TILE_FIELDS = ("sequence", "row", "position", "count", "run")
READ_FIELDS = (
    "first_key", "stop_key", "d_min", "d_max", "slot", "turn", "period", "cycle_tiles", "group", "scratch", "origin",
)  # fmt: skip

READ_SIZE = tl.constexpr(len(READ_FIELDS))
LOG2E = tl.constexpr(1.4426950408889634)
VARIES = (
    "num_rows", "num_tiles", "num_parts", "num_spans", "items", "max_blocks", "first_head", "scratch_heads",
    "table_rows",
)  # fmt: skip
"""Numbers that change from step to step: a kernel is not compiled anew for 1 or a multiple of 16 of them."""
RECORDS = ("tiles", "reads", "spans", "blocks", "row_scale", "schedule")
"""Pieces of one buffer: a kernel is not compiled anew for those that begin at a multiple of 16 bytes."""
LOWEST = tl.constexpr(-1e30)  # finite, so that a row that has seen no key yet makes no NaN


@triton.jit
def heads_of(program, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(KV head, places among a tile's rows × query heads): a group of more heads than a tile has several programs."""
    slices: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    return program // slices, program % slices * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def rotate(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def pair_dims(ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second dims of the pairs, and the pairs."""
    pair = tl.arange(0, HALF)
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1, pair
    return pair, pair + ROTARY // 2, pair


@triton.jit
def load_turns(pointers, mask, ROTARY: tl.constexpr):
    """(cos, sin): rows of tables are cos of all pairs, then sin. Padding turns nothing."""
    return tl.load(pointers, mask=mask, other=1.0), tl.load(pointers + ROTARY // 2, mask=mask, other=0.0)


@triton.jit
def load_dims(rows, dims, lane, COUNT: tl.constexpr, LANES: tl.constexpr):
    """dims of rows, zeros in lanes past COUNT."""
    if COUNT == LANES:
        return tl.load(rows + dims[None, :])
    return tl.load(rows + dims[None, :], mask=(lane < COUNT)[None, :], other=0.0)


@triton.jit
def load_pairs(rows, mask, ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second dims of all pairs of rows, fp32."""
    first, second, _pair = pair_dims(ROTARY, HALF, INTERLEAVED)
    return (
        tl.load(rows + first[None, :], mask=mask, other=0.0).to(tl.float32),
        tl.load(rows + second[None, :], mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def store_pairs(rows, first, second, mask, ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    first_dims, second_dims, _pair = pair_dims(ROTARY, HALF, INTERLEAVED)
    tl.store(rows + first_dims[None, :], first.to(rows.dtype.element_ty), mask=mask)
    tl.store(rows + second_dims[None, :], second.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def faded(cos, sin, steps, decay, pair, ROTARY: tl.constexpr):
    """(cos, sin) of rows that have grown for so many steps each."""
    rate = tl.load(decay + pair, mask=pair < ROTARY // 2, other=0.0)
    grown = tl.exp(steps[:, None] * rate[None, :])
    return cos * grown, sin * grown


@triton.jit
def read_instead(key, first_key, stop_key):
    """Clamps the index of a key into the range that is read, so that loads need no mask; scores are masked later."""
    return tl.minimum(tl.maximum(key, first_key), stop_key - 1)


@triton.jit
def number_of_block(key, BLOCK_SIZE: tl.constexpr):
    """Where the block table has the block of a key. Unsigned: a shift, where a signed division mends its sign."""
    return key.to(tl.uint32) // BLOCK_SIZE


@triton.jit
def slot_in(block, key, BLOCK_SIZE: tl.constexpr):
    return block * BLOCK_SIZE + (key.to(tl.uint32) % BLOCK_SIZE).to(tl.int32)


@triton.jit
def place_of_tile(tile, period, cycle_tiles, BLOCK_N: tl.constexpr):
    """(first key, one past the last, number in its cycle): tiles begin anew where positions wrap."""
    cycle = tile // cycle_tiles
    phase = tile - cycle * cycle_tiles
    base = cycle * period + phase * BLOCK_N
    return base, tl.minimum(base + BLOCK_N, cycle * period + period), phase


@triton.jit
def tile_of_key(key, period, cycle_tiles, BLOCK_N: tl.constexpr):
    return key // period * cycle_tiles + key % period // BLOCK_N


@triton.jit
def capped(scores, softcap):
    """Base-2 c·tanh(score/c), with tanh(x) = 1 − 2/(1 + exp(2x)), which is right at both ends."""
    return softcap * LOG2E * (1.0 - 2.0 / (1.0 + tl.exp(scores * (2.0 / softcap))))


@triton.jit
def softmax_step(scores, value, acc, high, total, PRECISION: tl.constexpr):
    """One more tile of base-2 scores: the running maximum, sum of weights and weighted values of each row."""
    new_high = tl.maximum(high, tl.max(scores, 1))
    weights = tl.exp2(scores - new_high[:, None])
    fade = tl.exp2(high - new_high)
    acc = tl.dot(weights.to(value.dtype), value, acc=acc * fade[:, None], input_precision=PRECISION)
    return acc, new_high, total * fade + tl.sum(weights, 1)
