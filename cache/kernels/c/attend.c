/* See attend.h. */
#include "attend.h"

#define APART static __attribute__((noinline)) /* inlined together, the loops would lack registers */
#define WIDE (REGISTERS / 8) /* 24 sums, 4 vectors of b and 1 of a: 29 of 32 registers; or 15 of 16 */

/* --- products ---------------------------------------------------------------------------------------------------------- */

INLINE vfloat broadcast(const float *from) { return splat(*from); }
INLINE vuint broadcast_word(const float *from) {
    uint32_t word;
    memcpy(&word, from, 4);
    return (vuint){} + word;
}

/* c [R, LANES·n] = fades·c + a [R, depth] · b [depth, LANES·n], of floats or of words; without fades, c's old content is lost. */
INLINE void multiply(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth, const float *fades,
                     float *c, int64_t c_stride, const int R, const int n, const int dots) {
    vfloat sum[ROWS][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < n; v++) sum[r][v] = fades ? fades[r] * *(const vfloat *)(c + r * c_stride + LANES * v) : (vfloat){};
    for (int64_t k = 0; k < depth; k++) {
        vfloat x[WIDE];
#pragma GCC unroll 8
        for (int v = 0; v < n; v++) x[v] = *(const vfloat *)(b + k * b_stride + LANES * v);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const float *at = a + r * a_stride + k;
#pragma GCC unroll 8
            for (int v = 0; v < n; v++)
                sum[r][v] = dots ? dot_pairs(sum[r][v], broadcast_word(at), (vuint)x[v]) : vfma(broadcast(at), x[v], sum[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < n; v++) *(vfloat *)(c + r * c_stride + LANES * v) = sum[r][v];
}

#define MULTIPLY(R, n) \
    case 10 * R + n: \
        if (dots) multiply(a, a_stride, b, b_stride, depth, fades, c, c_stride, R, n, 1); \
        else multiply(a, a_stride, b, b_stride, depth, fades, c, c_stride, R, n, 0); \
        break;
#define MULTIPLY_ROWS(n) MULTIPLY(1, n) MULTIPLY(2, n) MULTIPLY(3, n) MULTIPLY(4, n) MULTIPLY(5, n) MULTIPLY(6, n)

/* The same for any width of whole vectors, and up to ROWS rows. */
APART void product(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth, const float *fades,
                   float *c, int64_t c_stride, int64_t rows, int64_t vectors, int64_t dots) {
    for (int64_t n; vectors > 0; vectors -= n, b += LANES * n, c += LANES * n) {
        n = vectors == WIDE + 1 && WIDE > 2 ? WIDE - 1 : least(vectors, WIDE); /* not 4 and 1 but 3 and 2 */
        switch (10 * rows + n) {
            MULTIPLY_ROWS(1) MULTIPLY_ROWS(2)
#if WIDE > 2
            MULTIPLY_ROWS(3) MULTIPLY_ROWS(4)
#endif
        }
    }
}

/* --- rows over blocks of keys ------------------------------------------------------------------------------------------ */

typedef struct {
    float query[MAX_ROWS * MAX_DIM], turned[MAX_ROWS * MAX_DIM], scores[MAX_ROWS * BLOCK];
    float fades[MAX_ROWS];
    int64_t low[MAX_ROWS], high[MAX_ROWS]; /* keys that a row sees */
    int32_t from[MAX_ROWS], to[MAX_ROWS];  /* the same in the block at hand */
    int32_t own[MAX_ROWS];                 /* the tile that a row is in */
} __attribute__((aligned(64))) Tile;

/* What multiplies scores beside the model's scale, so that these are powers of two's exponents. */
INLINE float unit_of(const Shape *shape) { return shape->softcap > 0.0f ? 1.0f / shape->softcap : LOG2_E; }

/* Queries turned, and multiplied by all that multiplies scores. */
APART int64_t turn_queries(const Shape *shape, const Rows *rows, const Read *read, int64_t kv_head, Tile *tile) {
    int64_t dim = shape->head_dim, wide = padded(dim), group = group_of(shape), rotary = shape->rotary_dim, r = 0;
    float unit = shape->scale * unit_of(shape), raw[MAX_DIM];
    for (int64_t row = rows->first; row < rows->stop; row++) {
        int64_t i = rows->start + row;
        float scale = rows->scale ? unit * rows->scale[row] : unit;
        for (int64_t g = 0; g < group; g++, r++) {
            float *to = tile->query + r * wide;
            int64_t from = (row * shape->query_heads + kv_head * group + g) * dim;
            unpair(rows->query, from, raw, dim, rotary, shape->interleaved, shape->query_dtype);
            for (int64_t d = 0; d < dim; d++) raw[d] *= scale;
            const float *cos = read->query + (row - rows->run) * rotary;
            if (read->query) turn(raw, to, cos, cos + rotary / 2, dim, rotary);
            else memcpy(to, raw, sizeof(float) * dim);
            for (int64_t d = dim; d < wide; d++) to[d] = 0.0f;
            tile->low[r] = most(read->first_key, i - read->d_max + 1);
            tile->high[r] = least(read->stop_key, i - read->d_min + 1);
            tile->own[r] = i / KEYS;
        }
    }
    return r;
}

/* Queries as a tile's keys want them: R(−κ(t0)), and in pairs. */
APART void turn_back(const Shape *shape, const Turns *turns, int64_t at, int64_t rows, Tile *tile) {
    int64_t dim = shape->head_dim, wide = padded(dim), rotary = shape->rotary_dim, half = rotary / 2;
    const float *base = turns->bases ? turns->bases + at / KEYS * rotary : 0;
    for (int64_t r = 0; r < rows; r++) {
        const float *from = tile->query + r * wide;
        float *to = tile->turned + r * wide;
        if (base) {
            turn(from, to, base, base + half, dim, rotary);
            for (int64_t d = dim; d < wide; d++) to[d] = 0.0f;
        } else memcpy(to, from, sizeof(float) * wide);
        if (turns->fades) {
            const float *fade = turns->fades + most(tile->own[r] - at / KEYS, 0) * half; /* less: not seen */
            for (int64_t m = 0; m < half; m++) to[m] *= fade[m], to[half + m] *= fade[m];
        }
        if (shape->dots)
            for (int64_t d = 0; d < wide; d += 2 * LANES)
                *(vuint *)(to + d / 2) = narrow_both(*(vfloat *)(to + d), *(vfloat *)(to + d + LANES));
    }
}

/* Scores of the block from key `block` on fall with the distance. */
APART void fall(const Shape *shape, const Rows *rows, int64_t kv_head, int64_t block, Tile *tile) {
    const vfloat lane = __builtin_convertvector(lane_numbers(), vfloat);
    int64_t group = group_of(shape), r = 0;
    for (int64_t row = rows->first; row < rows->stop; row++)
        for (int64_t g = 0; g < group; g++, r++) {
            float slope = shape->slopes[kv_head * group + g] * unit_of(shape), first = block - (rows->start + row);
            vfloat *x = (vfloat *)(tile->scores + r * BLOCK);
            for (int v = 0; v < BLOCK / LANES; v++) x[v] += slope * (lane + (first + LANES * v));
        }
}

INLINE vfloat capped(vfloat x, float cap) {
    const vint sign = (vint){} + INT32_MIN;
    vfloat e = exp2_neg((vfloat)((vint)x | sign) * (2.0f * LOG2_E));
    vfloat tanh = (1.0f - e) / (1.0f + e);
    return (vfloat)((vint)tanh | ((vint)x & sign)) * (cap * LOG2_E);
}

/* Lanes of vector v that the row sees. */
INLINE vint seen(const Tile *tile, int64_t row, int v) {
    vint lane = lane_numbers() + LANES * v;
    return (lane >= tile->from[row]) & (lane < tile->to[row]);
}

/* Scores to weights in place, in pairs if need be; maxima and sums move on, `fades` is what earlier results fade by. */
APART void soften(Tile *tile, int64_t rows, float softcap, int64_t dots, const State *state) {
    for (int64_t begin = 0; begin < rows; begin += LANES) {
        vfloat best[LANES];
        int64_t count = least(LANES, rows - begin);
        for (int64_t n = 0; n < LANES; n++) {
            vfloat *x = (vfloat *)(tile->scores + (begin + n) * BLOCK);
            best[n] = splat(LOWEST);
            if (n >= count) continue;
            if (softcap > 0.0f)
                for (int v = 0; v < BLOCK / LANES; v++) x[v] = capped(x[v], softcap);
            if (tile->to[begin + n] - tile->from[begin + n] < BLOCK)
                for (int v = 0; v < BLOCK / LANES; v++) {
                    vint in = seen(tile, begin + n, v);
                    x[v] = (vfloat)((in & (vint)x[v]) | (~in & (vint)best[n]));
                }
            for (int v = 0; v < BLOCK / LANES; v++) best[n] = larger(best[n], x[v]);
        }
        float tops[LANES], before[LANES] = {};
        memcpy(before, state->maxima + begin, sizeof(float) * count);
        vfloat now = larger(*(vfloat *)before, fold_all(best, 1));
        memcpy(tops, &now, sizeof tops);
        memcpy(state->maxima + begin, tops, sizeof(float) * count);
        *(vfloat *)(tile->fades + begin) = exp2_neg(*(vfloat *)before - now);
        for (int64_t n = 0; n < count; n++) {
            vfloat *x = (vfloat *)(tile->scores + (begin + n) * BLOCK), *sum = (vfloat *)(state->sums + (begin + n) * LANES), total = {};
            float top = tops[n];
#pragma GCC unroll 8
            for (int v = 0; v < BLOCK / LANES; v++) x[v] = exp2_neg(x[v] - top);
            if (tile->to[begin + n] - tile->from[begin + n] < BLOCK)
                for (int v = 0; v < BLOCK / LANES; v++) x[v] = (vfloat)(seen(tile, begin + n, v) & (vint)x[v]);
            for (int v = 0; v < BLOCK / LANES; v++) total += x[v];
            *sum = vfma(*sum, splat(tile->fades[begin + n]), total);
#pragma GCC unroll 8
            for (int v = 0; v < BLOCK / LANES && dots; v += 2) *(vuint *)(x + v / 2) = narrow_both(x[v], x[v + 1]);
        }
    }
}

/* Of the block at hand, the keys that rows [r, stop) see. */
INLINE void seen_by(const Tile *tile, int64_t r, int64_t stop, int32_t *from, int32_t *to) {
    *from = BLOCK, *to = 0;
    for (; r < stop; r++)
        if (tile->from[r] < tile->to[r]) {
            *from = least(*from, tile->from[r]);
            *to = most(*to, tile->to[r]);
        }
}

/* Sums of the block's values to `found`. */
INLINE void weigh(const Shape *shape, Tile *tile, int64_t rows, const float *values, const State *found) {
    int64_t width = padded(shape->value_dim), shift = shape->dots ? 1 : 0;
    for (int64_t r = 0; r < rows; r += ROWS) {
        int32_t from, to;
        seen_by(tile, r, least(r + ROWS, rows), &from, &to);
        if (from >= to) continue; /* then nothing fades either */
        from = from >> shift, to = (to + shift) >> shift;
        product(tile->scores + r * BLOCK + from, BLOCK, values + from * width, width, to - from, tile->fades + r,
                found->out + r * width, width, least(ROWS, rows - r), width / LANES, shape->dots);
    }
}

int attend(const Shape *shape, const Rows *rows, const Read *read, const Source *source, int64_t begin, int64_t end,
           const Packed *packed, const State *found) {
    int64_t low = most(read->first_key, rows->start + rows->first - read->d_max + 1);
    int64_t high = least(read->stop_key, rows->start + rows->stop - read->d_min);
    low = most(low, begin), high = least(high, end);
    if (low >= high) return 0;
    Tile tile;
    float keys[packed ? 1 : packed_keys(shape, BLOCK)] __attribute__((aligned(64)));
    float values[packed ? 1 : packed_values(shape, BLOCK)] __attribute__((aligned(64)));
    if (!packed) fetch_keys(shape, source, low, least(low + AHEAD, high));
    int64_t count = turn_queries(shape, rows, read, source->head, &tile), wide = padded(shape->head_dim);
    state_clear(found, count, shape->value_dim);
    for (int64_t block = low / BLOCK * BLOCK; block < high; block += BLOCK) {
        for (int64_t r = 0; r < count; r++) {
            tile.from[r] = least(most(most(tile.low[r], low) - block, 0), BLOCK);
            tile.to[r] = most(least(least(tile.high[r], high) - block, BLOCK), tile.from[r]);
        }
        Packed here = {keys, values};
        if (packed) {
            here.keys = packed->keys + packed_keys(shape, block - begin);
            here.values = packed->values + packed_values(shape, block - begin);
        }
        for (int64_t k = 0; k < BLOCK; k += KEYS) {
            Packed at = {here.keys + packed_keys(shape, k), here.values + packed_values(shape, k)};
            if (block + k >= high || block + k + KEYS <= low) continue;
            if (!packed) pack_tile(shape, source, read->turns, block + k, low, high, &at);
            turn_back(shape, read->turns, block + k, count, &tile);
            for (int64_t r = 0; r < count; r += ROWS) {
                int32_t from, to;
                seen_by(&tile, r, least(r + ROWS, count), &from, &to);
                if (from < k + KEYS && to > k)
                    product(tile.turned + r * wide, wide, at.keys, KEYS, words_of(shape), 0, tile.scores + r * BLOCK + k,
                            BLOCK, least(ROWS, count - r), KEYS / LANES, shape->dots);
            }
        }
        if (shape->slopes) fall(shape, rows, source->head, block, &tile);
        soften(&tile, count, shape->softcap, shape->dots, found);
        weigh(shape, &tile, count, here.values, found);
    }
    return 1;
}

void attend_units(const Shape *shape, const Rows *rows, const Read *read, const Source *source, const int32_t *units,
                  int64_t count, const State *found) {
    Tile tile;
    float keys[packed_keys(shape, BLOCK)] __attribute__((aligned(64)));
    float values[packed_values(shape, BLOCK)] __attribute__((aligned(64)));
    Packed here = {keys, values};
    for (int64_t n = 0; n < count; n++) fetch_keys(shape, source, UNIT * (int64_t)units[n], UNIT * ((int64_t)units[n] + 1));
    int64_t num_rows = turn_queries(shape, rows, read, source->head, &tile), wide = padded(shape->head_dim);
    state_clear(found, num_rows, shape->value_dim);
    for (int64_t r = 0; r < num_rows; r++) tile.from[r] = 0, tile.to[r] = UNIT * count;
    for (int64_t n = 0; n < count; n++) {
        int64_t base = (int64_t)units[n] * UNIT / KEYS * KEYS;
        Packed at = columns_at(shape, &here, UNIT * n);
        pack_unit(shape, source, read->turns, units[n], &at);
        turn_back(shape, read->turns, base, num_rows, &tile);
        for (int64_t r = 0; r < num_rows; r += ROWS)
            product(tile.turned + r * wide, wide, at.keys, KEYS, words_of(shape), 0, tile.scores + r * BLOCK + UNIT * n,
                    BLOCK, least(ROWS, num_rows - r), UNIT / LANES, shape->dots);
    }
    soften(&tile, num_rows, shape->softcap, shape->dots, found);
    weigh(shape, &tile, num_rows, values, found);
}

/* --- states ------------------------------------------------------------------------------------------------------------ */

void state_clear(const State *state, int64_t rows, int64_t dim) {
    memset(state->out, 0, sizeof(float) * rows * padded(dim));
    memset(state->sums, 0, sizeof(float) * rows * LANES);
    for (int64_t r = 0; r < rows; r++) state->maxima[r] = LOWEST;
}

void state_merge(const State *to, const State *from, int64_t rows, int64_t dim) {
    int64_t width = padded(dim);
    for (int64_t r = 0; r < rows; r++) {
        float best = to->maxima[r] > from->maxima[r] ? to->maxima[r] : from->maxima[r];
        vfloat shares = exp2_neg((vfloat){to->maxima[r] - best, from->maxima[r] - best});
        vfloat own = splat(shares[0]), other = splat(shares[1]);
        to->maxima[r] = best;
        vfloat *sums = (vfloat *)(to->sums + LANES * r);
        *sums = vfma(*sums, own, *(vfloat *)(from->sums + LANES * r) * other);
        for (int64_t d = 0; d < width; d += LANES) {
            vfloat *out = (vfloat *)(to->out + r * width + d);
            *out = vfma(*out, own, *(vfloat *)(from->out + r * width + d) * other);
        }
    }
}

void state_finish(const Shape *shape, const State *state, int64_t row, const float *sink, int64_t out_at, void *out) {
    int64_t dim = shape->value_dim;
    float sum = 0.0f, weight = 1.0f, *from = state->out + row * padded(dim);
    for (int lane = 0; lane < LANES; lane++) sum += state->sums[row * LANES + lane];
    if (sink) {
        float own = *sink * LOG2_E, best = fmaxf(state->maxima[row], own);
        vfloat parts = exp2_neg((vfloat){state->maxima[row] - best, own - best});
        weight = parts[0];
        sum = sum * weight + parts[1];
    }
    weight = sum > 0.0f ? weight / sum : 0.0f; /* a row that sees no key gets 0 */
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) store(out, out_at + d, *(vfloat *)(from + d) * weight, shape->query_dtype);
    for (; d < dim; d++) store1(out, out_at + d, from[d] * weight, shape->query_dtype);
}
