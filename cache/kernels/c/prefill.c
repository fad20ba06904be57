/* Many query rows over the raw keys of their sequence: one prefill chunk.
 *
 * Rows come in *runs* that share a reading. Keys come in *passes*, one for each way of turning keys: a pass packs what
 * it turns once, for all runs. A *read* says which of a pass's keys the rows of one run see, and by what their queries
 * are turned; every row sees one stretch of keys a read. One softmax runs on through all reads of a row.
 *
 *     unit: SPAN keys of a pass and one KV head: keys turned and packed as [D, KEYS] tiles, values as [SPAN, 16·n] panels
 *     tile: TILE_ROWS rows × heads of its group: scores of BLOCK keys, weights, values; all tiles read the unit from L2
 *
 * Threads share a unit's tiles, and pack the next unit where no tile is left. Both products are one loop, with
 * ROWS × 16·WIDE sums in registers. Blocks of keys lie on multiples of BLOCK of the position axis, so a row's result
 * depends neither on where its chunk began nor on the number of threads. fp32 arithmetic.
 */
#include "vectors.h"

#define APART static __attribute__((noinline)) /* inlined together, the loops would lack registers */
#define KEYS 64
#define BLOCK 128
#define SPAN 1024
#define ROWS 6
#define TILE_ROWS 96
#ifdef __AVX512F__
#define WIDE 4 /* 24 sums, 4 vectors of b and 1 of a: 29 of 32 registers */
#else
#define WIDE 1 /* a vector of 16 takes several registers */
#endif

typedef struct {
    int64_t query_heads, kv_heads, head_dim, value_dim, rotary_dim, block_size, start; /* start: position of row 0 */
    int64_t query_dtype, dtype;                                                        /* dtype: of keys and values */
    int64_t interleaved;
    float scale, softcap; /* softcap 0: off */
} Shape;

typedef struct {
    int64_t num_passes, num_runs, num_tiles;
    const int64_t *low, *high;             /* [passes]: keys [low, high) are packed */
    const float *const *key_cos, *const *key_sin; /* [passes]: [high − low, rotary_dim/2], or null: as they lie */
    const int64_t *reads;                  /* [passes·runs + 1]: the first read of each pass and run */
    const int64_t *first_key, *stop_key, *d_min, *d_max; /* [reads]: first_key ≤ j < stop_key, d_min ≤ i − j < d_max */
    const float *const *query_cos, *const *query_sin; /* [reads]: [rows of the run, rotary_dim/2], or null */
    const int64_t *run_first;              /* [runs]: its first row */
    const int64_t *tile_run, *tile_first, *tile_stop; /* [tiles]: rows [first, stop) of a run */
    const int64_t *tile_state;             /* [tiles + 1]: where a tile's rows × heads begin; multiples of ROWS */
    const float *row_scale;                /* [rows] or null: on each row's queries, beside scale */
    const int32_t *blocks;                 /* [blocks of the sequence] */
} Plan;

/* Of a kv head, the running results of all its row tiles. */
typedef struct {
    float *out, *sums, *maxima; /* [state rows, padded value dim], [state rows, 16], [state rows] */
} State;

typedef struct {
    float *keys, *values; /* [SPAN / KEYS, D, KEYS], panels of [SPAN, 16·n] */
} Packed;

/* What all threads work on together: a span of a pass's keys, of one kv head. */
typedef struct {
    int64_t pass, head, begin, end;
} Unit;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t vectors(int64_t dim) { return (dim + 15) / 16; }

/* Vectors in the next panel of `left`: not 4 and 1 but 3 and 2. */
INLINE int panel(int64_t left) { return left == WIDE + 1 && WIDE > 2 ? WIDE - 1 : least(left, WIDE); }

/* c [ROWS, 16·n] = fades·c + a [ROWS, depth] · b [depth, 16·n]; without fades, what c held does not count. */
INLINE void multiply(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth,
                     const float *fades, float *c, int64_t c_stride, const int n) {
    v16 sum[ROWS][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < n; v++) sum[r][v] = fades ? fades[r] * *(const v16 *)(c + r * c_stride + 16 * v) : (v16){};
    for (int64_t k = 0; k < depth; k++) {
        v16 x[WIDE];
#pragma GCC unroll 8
        for (int v = 0; v < n; v++) x[v] = *(const v16 *)(b + k * b_stride + 16 * v);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < n; v++) sum[r][v] += a[r * a_stride + k] * x[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < n; v++) *(v16 *)(c + r * c_stride + 16 * v) = sum[r][v];
}

APART void score(const float *query, int64_t dim, const float *keys, float *scores) {
    for (int v = 0; v < KEYS / 16; v += WIDE)
        multiply(query, dim, keys + 16 * v, KEYS, dim, 0, scores + 16 * v, BLOCK, WIDE);
}

/* values: from the first key of `weights` on, in the first panel; panels are SPAN keys long. */
APART void accumulate(const float *weights, int64_t count, const float *values, int64_t first, const float *fades,
                      float *out, int64_t dim) {
    for (int64_t v = 0, n; v < dim / 16; v += n) {
        n = panel(dim / 16 - v);
        const float *from = values + 16 * (v * SPAN + first * n);
        float *to = out + 16 * v;
        switch (n) {
            case 1: multiply(weights, BLOCK, from, 16, count, fades, to, dim, 1); break;
#if WIDE > 1
            case 2: multiply(weights, BLOCK, from, 32, count, fades, to, dim, 2); break;
            case 3: multiply(weights, BLOCK, from, 48, count, fades, to, dim, 3); break;
            case 4: multiply(weights, BLOCK, from, 64, count, fades, to, dim, 4); break;
#endif
        }
    }
}

/* --- packing: a tile of KEYS keys and their values ------------------------------------------------------------------- */

INLINE void pack_as(const Shape *shape, const Plan *plan, const Unit *unit, int64_t in_span, const void *keys,
                    const void *values, const Packed *to, const int dtype) {
    int64_t dim = shape->head_dim, value_dim = shape->value_dim, half = shape->rotary_dim / 2;
    int64_t low = plan->low[unit->pass], high = plan->high[unit->pass];
    const float *cos = plan->key_cos[unit->pass], *sin = plan->key_sin[unit->pass];
    int64_t slot = 0, offset = shape->block_size;
    float raw[MAX_DIM], heads[16][MAX_DIM] __attribute__((aligned(64))) = {};
    float *tile = to->keys + in_span * dim;
    for (int64_t n = 0; n < KEYS; n++) {
        int64_t j = unit->begin + in_span + n, read = j >= low && j < high;
        float *key = heads[n % 16];
        if (read) {
            if (offset >= shape->block_size) {
                offset = j % shape->block_size;
                slot = plan->blocks[j / shape->block_size] * shape->block_size + offset;
            }
            int64_t row = (j - low) * half;
            unpair(keys, (slot * shape->kv_heads + unit->head) * dim, cos ? raw : key, dim, shape->rotary_dim,
                   shape->interleaved, dtype);
            if (cos) turn(raw, key, cos + row, sin + row, dim, shape->rotary_dim);
        } else {
            memset(key, 0, sizeof(float) * dim);
        }
        for (int64_t v = 0, width; v < vectors(value_dim); v += width) {
            width = panel(vectors(value_dim) - v);
            for (int64_t w = v; w < v + width; w++) {
                v16 value = {}; /* of keys that are not read too: weighed with 0, anything finite will do */
                int64_t left = value_dim - 16 * w, at = (slot * shape->kv_heads + unit->head) * value_dim + 16 * w;
                if (read && left >= 16) value = load16(values, at, dtype);
                else if (read)
                    for (int64_t lane = 0; lane < left; lane++) value[lane] = load1(values, at + lane, dtype);
                *(v16 *)(to->values + 16 * (v * SPAN + (in_span + n) * width + w - v)) = value;
            }
        }
        if (read) slot++, offset++;
        if (n % 16 < 15) continue;
        for (int64_t d = 0; d < dim; d += 16) {
            v16 square[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) square[i] = *(v16 *)(heads[i] + d);
            transpose16(square);
            for (int i = 0; i < 16 && d + i < dim; i++) *(v16 *)(tile + (d + i) * KEYS + n - 15) = square[i];
        }
    }
}

static void pack(const Shape *shape, const Plan *plan, const Unit *unit, int64_t in_span, const void *keys,
                 const void *values, const Packed *to) {
    if (shape->dtype == BF16) pack_as(shape, plan, unit, in_span, keys, values, to, BF16);
    else if (shape->dtype == FP16) pack_as(shape, plan, unit, in_span, keys, values, to, FP16);
    else pack_as(shape, plan, unit, in_span, keys, values, to, FP32);
}

/* --- one row tile of one kv head -------------------------------------------------------------------------------------- */

typedef struct {
    float query[TILE_ROWS * MAX_DIM], scores[TILE_ROWS * BLOCK]; /* rows × heads of the group */
    float fades[TILE_ROWS], maxima[TILE_ROWS];
    int64_t low[TILE_ROWS], high[TILE_ROWS]; /* keys that a row sees */
    int32_t from[TILE_ROWS], to[TILE_ROWS];  /* the same in the block at hand */
} __attribute__((aligned(64))) Tile;

/* Queries turned, and multiplied by all that multiplies scores, so that these are powers of two's exponents. */
APART void turn_queries(const Shape *shape, const Plan *plan, int64_t t, int64_t read, int64_t head, const void *query,
                        Tile *tile) {
    int64_t dim = shape->head_dim, group = shape->query_heads / shape->kv_heads, half = shape->rotary_dim / 2, r = 0;
    int64_t rows = plan->tile_state[t + 1] - plan->tile_state[t];
    float unit = shape->scale * (shape->softcap > 0.0f ? 1.0f / shape->softcap : LOG2_E), raw[MAX_DIM];
    for (int64_t row = plan->tile_first[t]; row < plan->tile_stop[t]; row++) {
        int64_t i = shape->start + row, at = (row - plan->run_first[plan->tile_run[t]]) * half;
        float scale = plan->row_scale ? unit * plan->row_scale[row] : unit;
        for (int64_t g = 0; g < group; g++, r++) {
            float *to = tile->query + r * dim;
            int64_t from = (row * shape->query_heads + head * group + g) * dim;
            unpair(query, from, raw, dim, shape->rotary_dim, shape->interleaved, shape->query_dtype);
            for (int64_t d = 0; d < dim; d++) raw[d] *= scale;
            const float *cos = plan->query_cos[read], *sin = plan->query_sin[read];
            if (cos) turn(raw, to, cos + at, sin + at, dim, shape->rotary_dim);
            else memcpy(to, raw, sizeof(float) * dim);
            tile->low[r] = most(plan->first_key[read], i - plan->d_max[read] + 1);
            tile->high[r] = least(plan->stop_key[read], i - plan->d_min[read] + 1);
        }
    }
    for (; r < rows; r++) { /* rows that fill the last group of ROWS: nothing reads what they get */
        memset(tile->query + r * dim, 0, sizeof(float) * dim);
        tile->low[r] = tile->low[r - 1];
        tile->high[r] = tile->high[r - 1];
    }
}

INLINE v16 capped(v16 x, float cap) {
    const i32x16 sign = (i32x16){} + INT32_MIN;
    v16 e = exp2_neg16((v16)((i32x16)x | sign) * (2.0f * LOG2_E));
    v16 tanh = (1.0f - e) / (1.0f + e);
    return (v16)((i32x16)tanh | ((i32x16)x & sign)) * (cap * LOG2_E);
}

/* Lanes of vector v that the row sees. */
INLINE i32x16 seen(const Tile *tile, int64_t row, int v) {
    i32x16 lane = (i32x16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + 16 * v;
    return (lane >= tile->from[row]) & (lane < tile->to[row]);
}

/* Scores to weights in place; the running maxima and sums move on, and `fades` is what earlier results fade by. */
APART void soften(Tile *tile, int64_t rows, float softcap, float *sums) {
    for (int64_t begin = 0; begin < rows; begin += 16) {
        v16 best[16];
        int64_t count = least(16, rows - begin);
        for (int64_t n = 0; n < 16; n++) {
            v16 *x = (v16 *)(tile->scores + (begin + n) * BLOCK);
            best[n] = (v16){} + LOWEST;
            if (n >= count) continue;
            if (softcap > 0.0f)
                for (int v = 0; v < BLOCK / 16; v++) x[v] = capped(x[v], softcap);
            if (tile->to[begin + n] - tile->from[begin + n] < BLOCK)
                for (int v = 0; v < BLOCK / 16; v++) {
                    i32x16 in = seen(tile, begin + n, v);
                    x[v] = (v16)((in & (i32x16)x[v]) | (~in & (i32x16)best[n]));
                }
            for (int v = 0; v < BLOCK / 16; v++) best[n] = larger(best[n], x[v]);
        }
        v16 before = *(v16 *)(tile->maxima + begin), now = larger(before, fold16(best, 1));
        *(v16 *)(tile->maxima + begin) = now;
        *(v16 *)(tile->fades + begin) = exp2_neg16(before - now);
        for (int64_t n = 0; n < count; n++) {
            v16 *x = (v16 *)(tile->scores + (begin + n) * BLOCK), *sum = (v16 *)(sums + (begin + n) * 16), total = {};
            float top = tile->maxima[begin + n];
#pragma GCC unroll 8
            for (int v = 0; v < BLOCK / 16; v++) x[v] = exp2_neg16(x[v] - top);
            if (tile->to[begin + n] - tile->from[begin + n] < BLOCK)
                for (int v = 0; v < BLOCK / 16; v++) x[v] = (v16)(seen(tile, begin + n, v) & (i32x16)x[v]);
            for (int v = 0; v < BLOCK / 16; v++) total += x[v];
            *sum = *sum * tile->fades[begin + n] + total;
        }
    }
}

/* Tile t through one read of a unit's keys. */
static void attend(const Shape *shape, const Plan *plan, int64_t t, int64_t read, const Unit *unit, const void *query,
                   const Packed *packed, const State *state) {
    int64_t dim = shape->head_dim, padded = 16 * vectors(shape->value_dim);
    int64_t first_row = plan->tile_state[t], rows = plan->tile_state[t + 1] - first_row;
    int64_t low = most(plan->first_key[read], shape->start + plan->tile_first[t] - plan->d_max[read] + 1);
    int64_t high = least(plan->stop_key[read], shape->start + plan->tile_stop[t] - plan->d_min[read]);
    low = most(low, unit->begin), high = least(high, unit->end);
    if (low >= high) return;
    Tile tile;
    turn_queries(shape, plan, t, read, unit->head, query, &tile);
    memcpy(tile.maxima, state->maxima + first_row, sizeof(float) * rows);
    for (int64_t block = low / BLOCK * BLOCK; block < high; block += BLOCK) {
        int64_t in_span = block - unit->begin;
        for (int64_t r = 0; r < rows; r++) {
            tile.from[r] = least(most(tile.low[r] - block, 0), BLOCK);
            tile.to[r] = most(least(tile.high[r] - block, BLOCK), tile.from[r]);
        }
        for (int64_t k = 0; k < BLOCK; k += KEYS)
            for (int64_t r = 0; r < rows; r += ROWS)
                if (tile.from[r] < k + KEYS && tile.to[r + ROWS - 1] > k)
                    score(tile.query + r * dim, dim, packed->keys + (in_span + k) * dim, tile.scores + r * BLOCK + k);
        soften(&tile, rows, shape->softcap, state->sums + first_row * 16);
        for (int64_t r = 0; r < rows; r += ROWS) {
            int64_t from = tile.from[r], to = tile.to[r + ROWS - 1];
            if (from < to)
                accumulate(tile.scores + r * BLOCK + from, to - from, packed->values, in_span + from, tile.fades + r,
                           state->out + (first_row + r) * padded, padded);
        }
    }
    memcpy(state->maxima + first_row, tile.maxima, sizeof(float) * rows);
}

/* Sums divide, after a sink has taken its share. */
static void finish(const Shape *shape, const Plan *plan, int64_t t, int64_t head, const float *sinks, const State *state,
                   float *out) {
    int64_t dim = shape->value_dim, padded = 16 * vectors(dim), group = shape->query_heads / shape->kv_heads;
    int64_t s = plan->tile_state[t];
    for (int64_t row = plan->tile_first[t]; row < plan->tile_stop[t]; row++)
        for (int64_t h = head * group; h < (head + 1) * group; h++, s++) {
            float sum = 0.0f, weight = 1.0f, *to = out + (row * shape->query_heads + h) * dim;
            for (int lane = 0; lane < 16; lane++) sum += state->sums[s * 16 + lane];
            if (sinks) {
                float sink = sinks[h] * LOG2_E, best = fmaxf(state->maxima[s], sink);
                v16 parts = exp2_neg16((v16){state->maxima[s] - best, sink - best});
                weight = parts[0];
                sum = sum * weight + parts[1];
            }
            weight = sum > 0.0f ? weight / sum : 0.0f; /* a row that sees no key gets 0 */
            for (int64_t d = 0; d < dim; d++) to[d] = state->out[s * padded + d] * weight;
        }
}

static int64_t state_rows(const Plan *plan) { return (plan->tile_state[plan->num_tiles] + 15) / 16 * 16; }

static int64_t state_floats(const Shape *shape, const Plan *plan) {
    return state_rows(plan) * (16 * vectors(shape->value_dim) + 17);
}

static int64_t packed_floats(const Shape *shape) {
    return SPAN * 16 * (vectors(shape->head_dim) + vectors(shape->value_dim));
}

static State state_of(const Shape *shape, const Plan *plan, float *scratch, int64_t head) {
    float *out = scratch + 2 * packed_floats(shape) + head * state_floats(shape, plan);
    float *sums = out + state_rows(plan) * 16 * vectors(shape->value_dim);
    return (State){out, sums, sums + state_rows(plan) * 16};
}

static Packed packed_at(const Shape *shape, float *scratch, int64_t unit) {
    float *keys = scratch + unit % 2 * packed_floats(shape);
    return (Packed){keys, keys + SPAN * 16 * vectors(shape->head_dim)};
}

int64_t prerope_prefill_scratch(const Shape *shape, const Plan *plan) {
    return 2 * packed_floats(shape) + shape->kv_heads * state_floats(shape, plan);
}

/* The unit with this number; pass is num_passes where there are no more. */
static Unit unit_at(const Shape *shape, const Plan *plan, int64_t number) {
    Unit unit = {0};
    for (; unit.pass < plan->num_passes; unit.pass++) {
        int64_t first = plan->low[unit.pass] / BLOCK * BLOCK, high = plan->high[unit.pass];
        int64_t units = (high - first + SPAN - 1) / SPAN * shape->kv_heads;
        if (number < units) {
            unit.head = number % shape->kv_heads;
            unit.begin = first + number / shape->kv_heads * SPAN;
            unit.end = least(unit.begin + SPAN, high);
            break;
        }
        number -= units;
    }
    return unit;
}

/* query: [rows, Hq, D]. keys, values: [num_blocks, block_size, Hkv, D or Dv]. sinks: [Hq] fp32 or null.
 * scratch: as many floats as prerope_prefill_scratch says. out: [rows, Hq, Dv] fp32. */
void prerope_prefill(const Shape *shape, const Plan *plan, const void *query, const void *keys, const void *values,
                     const float *sinks, float *scratch, float *out) {
    int64_t heads = shape->kv_heads, tiles = plan->num_tiles;
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
        for (int64_t head = 0; head < heads; head++) {
            State state = state_of(shape, plan, scratch, head);
            memset(state.out, 0, (state.maxima - state.out) * sizeof(float));
            for (int64_t r = 0; r < state_rows(plan); r++) state.maxima[r] = LOWEST;
        }
        Unit now = {.pass = -1}, next = unit_at(shape, plan, 0);
        for (int64_t number = 0; now.pass < plan->num_passes; number++, now = next, next = unit_at(shape, plan, number)) {
            if (now.pass >= 0) {
                Packed packed = packed_at(shape, scratch, number - 1);
                State state = state_of(shape, plan, scratch, now.head);
#pragma omp for schedule(dynamic) nowait
                for (int64_t n = 0; n < tiles; n++) {
                    int64_t t = tiles - 1 - n, at = now.pass * plan->num_runs + plan->tile_run[t];
                    for (int64_t read = plan->reads[at]; read < plan->reads[at + 1]; read++)
                        attend(shape, plan, t, read, &now, query, &packed, &state);
                }
            }
            Packed packed = packed_at(shape, scratch, number);
            int64_t packs = next.pass < plan->num_passes ? (next.end - next.begin + KEYS - 1) / KEYS : 0;
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < packs; n++) pack(shape, plan, &next, n * KEYS, keys, values, &packed);
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < heads * tiles; n++) {
            State state = state_of(shape, plan, scratch, n / tiles);
            finish(shape, plan, n % tiles, n / tiles, sinks, &state, out);
        }
    }
}
