/* One query row over the raw keys of its sequence, read in place from the blocks of the cache.
 *
 * A row's keys come as *segments*, runs of at most TILE positions inside one tile of the position axis. With the tile's
 * base t0, a key at j = t0 + n is rotated by n·θ from a small table [TILE, D/2] that stays in L1, and the query by the
 * rest of the angle, once a segment (its *turn*): (R(i − t0) q) · (R(n) k). A segment whose table is -1 is read as it
 * lies: the far keys of ReRoPE, and layers without positions. One pass over K and V, online softmax, fp32 arithmetic.
 *
 * Work items are runs of segments of one row, so that few long rows use every thread; their partial results are merged
 * in a fixed order, so that the result does not depend on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 64
#define MAX_GROUP 16
#define MAX_DIM 256
#define INLINE static inline __attribute__((always_inline))

enum { FP32 = 0, BF16 = 1, FP16 = 2 };

typedef struct {
    int64_t num_query_heads, num_kv_heads, head_dim, rotary_dim, block_size, max_blocks;
    int64_t dtype;       /* of keys and values */
    int64_t interleaved; /* pairs are (2m, 2m+1) */
    float scale, softcap; /* softcap 0: off */
} Shape;

typedef struct {
    const int32_t *start, *stop, *turn, *table; /* [segments]: positions [start, stop), rows of turns, of tables */
    const float *turns;                         /* [turns, 2, rotary_dim/2]: cos, sin */
    const float *tables;                        /* [tables, TILE, 2, rotary_dim/2] */
    const int32_t *item_row, *item_begin, *item_end; /* [items]: row, segments [begin, end) */
    const int32_t *row_items;                   /* [rows + 1]: items of each row */
    const int32_t *blocks;                      /* [rows, max_blocks] */
} Plan;

INLINE float load1(const void *base, int64_t at, int dtype) {
    if (dtype == FP32) return ((const float *)base)[at];
    if (dtype == BF16) {
        uint32_t bits = (uint32_t)((const uint16_t *)base)[at] << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
#ifdef __FLT16_MAX__
    return (float)((const _Float16 *)base)[at];
#else
    return 0.0f;
#endif
}

/* exp for x <= 0, 2 ulp: 2^n times a polynomial of the rest; vectorises where libm's does not. */
INLINE float exp_neg(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = fmaf(n, -0.693145752f, x);
    r = fmaf(n, -1.42860677e-6f, r);
    float p = 1.98756915e-4f;
    p = fmaf(p, r, 1.39819995e-3f);
    p = fmaf(p, r, 8.33345190e-3f);
    p = fmaf(p, r, 4.16657962e-2f);
    p = fmaf(p, r, 1.66666655e-1f);
    p = fmaf(p, r, 5.00000012e-1f);
    p = fmaf(p * r, r, r) + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* Split a head into the first and second members of its pairs, then what does not rotate. */
INLINE void unpair(const void *from, int64_t at, float *to, int dim, int rotary, int interleaved, int dtype) {
    if (interleaved) {
        for (int m = 0; m < rotary / 2; m++) {
            to[m] = load1(from, at + 2 * m, dtype);
            to[rotary / 2 + m] = load1(from, at + 2 * m + 1, dtype);
        }
        for (int d = rotary; d < dim; d++) to[d] = load1(from, at + d, dtype);
    } else {
        for (int d = 0; d < dim; d++) to[d] = load1(from, at + d, dtype);
    }
}

INLINE void turn(const float *from, float *to, const float *cos_sin, int dim, int rotary) {
    int half = rotary / 2;
    const float *c = cos_sin, *s = cos_sin + half;
    for (int m = 0; m < half; m++) {
        float a = from[m], b = from[half + m];
        to[m] = a * c[m] - b * s[m];
        to[half + m] = b * c[m] + a * s[m];
    }
    for (int d = rotary; d < dim; d++) to[d] = from[d];
}

/* Scores of one KV head's keys of one segment: scores[g][c]. */
INLINE void score(const float *query, const void *keys, const int64_t *at, const float *table, int count,
                  float (*scores)[TILE], int group, int dim, int rotary, int interleaved, int dtype) {
    float raw[MAX_DIM], key[MAX_DIM];
    for (int c = 0; c < count; c++) {
        unpair(keys, at[c], raw, dim, rotary, interleaved, dtype);
        const float *read = raw;
        if (table) {
            turn(raw, key, table + (int64_t)c * rotary, dim, rotary);
            read = key;
        }
        for (int g = 0; g < group; g++) {
            float sum = 0.0f;
            for (int d = 0; d < dim; d++) sum += query[g * dim + d] * read[d];
            scores[g][c] = sum;
        }
    }
}

INLINE void accumulate(float (*weights)[TILE], const void *values, const int64_t *at, int count, float *out, int group,
                       int dim, int dtype) {
    float value[MAX_DIM];
    for (int c = 0; c < count; c++) {
        for (int d = 0; d < dim; d++) value[d] = load1(values, at[c] + d, dtype);
        for (int g = 0; g < group; g++) {
            float w = weights[g][c];
            for (int d = 0; d < dim; d++) out[g * dim + d] += w * value[d];
        }
    }
}

/* One KV head of one item: its `group` query heads over the segments [begin, end). */
INLINE void run(const Shape *shape, const Plan *plan, const float *query, const void *keys, const void *values,
                int64_t item, int64_t head, float *out, float *maxima, float *sums, int group, int dim, int rotary,
                int interleaved, int dtype) {
    const int32_t *blocks = plan->blocks + plan->item_row[item] * shape->max_blocks;
    float plain[MAX_GROUP * MAX_DIM], turned[MAX_GROUP * MAX_DIM], scores[MAX_GROUP][TILE];
    int64_t at[TILE];
    for (int g = 0; g < group; g++) {
        unpair(query, (int64_t)g * dim, plain + g * dim, dim, rotary, interleaved, FP32);
        maxima[g] = -1e30f;
        sums[g] = 0.0f;
    }
    memset(out, 0, sizeof(float) * group * dim);
    int last_turn = -2;
    for (int64_t s = plan->item_begin[item]; s < plan->item_end[item]; s++) {
        if (plan->turn[s] != last_turn) {
            last_turn = plan->turn[s];
            for (int g = 0; g < group; g++) {
                if (last_turn < 0) memcpy(turned + g * dim, plain + g * dim, sizeof(float) * dim);
                else turn(plain + g * dim, turned + g * dim, plan->turns + (int64_t)last_turn * rotary, dim, rotary);
            }
        }
        int32_t start = plan->start[s];
        int count = plan->stop[s] - start;
        for (int c = 0; c < count; c++) {
            int64_t position = start + c;
            int64_t slot = blocks[position / shape->block_size] * shape->block_size + position % shape->block_size;
            at[c] = (slot * shape->num_kv_heads + head) * dim;
        }
        const float *table = 0;
        if (plan->table[s] >= 0) table = plan->tables + ((int64_t)plan->table[s] * TILE + start % TILE) * rotary;
        score(turned, keys, at, table, count, scores, group, dim, rotary, interleaved, dtype);
        for (int g = 0; g < group; g++) {
            float best = maxima[g];
            for (int c = 0; c < count; c++) {
                float x = scores[g][c] * shape->scale;
                if (shape->softcap > 0.0f) x = shape->softcap * tanhf(x / shape->softcap);
                scores[g][c] = x;
                best = x > best ? x : best;
            }
            float fade = exp_neg(maxima[g] - best), sum = 0.0f;
            for (int c = 0; c < count; c++) {
                scores[g][c] = exp_neg(scores[g][c] - best);
                sum += scores[g][c];
            }
            maxima[g] = best;
            sums[g] = sums[g] * fade + sum;
            if (fade != 1.0f)
                for (int d = 0; d < dim; d++) out[g * dim + d] *= fade;
        }
        accumulate(scores, values, at, count, out, group, dim, dtype);
    }
}

#define CASE(G, D, T)                                                                                                  \
    if (group == G && dim == D && rotary == D && !interleaved && dtype == T) {                                         \
        run(shape, plan, query, keys, values, item, head, out, maxima, sums, G, D, D, 0, T);                           \
        return;                                                                                                        \
    }
#define CASES(D) \
    CASE(1, D, BF16) CASE(2, D, BF16) CASE(3, D, BF16) CASE(4, D, BF16) CASE(5, D, BF16) CASE(6, D, BF16) \
    CASE(7, D, BF16) CASE(8, D, BF16) CASE(3, D, FP32) CASE(4, D, FP32)

static void run_head(const Shape *shape, const Plan *plan, const float *query, const void *keys, const void *values,
                     int64_t item, int64_t head, float *out, float *maxima, float *sums) {
    int group = shape->num_query_heads / shape->num_kv_heads, dim = shape->head_dim, rotary = shape->rotary_dim;
    int interleaved = shape->interleaved, dtype = shape->dtype;
    CASES(64)
    CASES(128)
    run(shape, plan, query, keys, values, item, head, out, maxima, sums, group, dim, rotary, interleaved, dtype);
}

/* query, out: [rows, Hq, D] fp32. keys, values: [num_blocks, block_size, Hkv, D]. sinks: [Hq] or null.
 * scratch: [items, Hq, D + 2] fp32. */
void prerope_decode(const Shape *shape, const Plan *plan, int64_t rows, const float *query, const void *keys,
                    const void *values, const float *sinks, float *scratch, float *out) {
    int64_t heads = shape->num_query_heads, kv_heads = shape->num_kv_heads, dim = shape->head_dim;
    int64_t group = heads / kv_heads, items = plan->row_items[rows], stride = heads * (dim + 2);
#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int64_t item = 0; item < items; item++)
        for (int64_t head = 0; head < kv_heads; head++) {
            float *partial = scratch + item * stride;
            run_head(shape, plan, query + (plan->item_row[item] * heads + head * group) * dim, keys, values, item, head,
                     partial + head * group * dim, partial + heads * dim + head * group,
                     partial + heads * (dim + 1) + head * group);
        }
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++)
        for (int64_t h = 0; h < heads; h++) {
            float best = sinks ? sinks[h] : -1e30f, sum = 0.0f, *to = out + (row * heads + h) * dim;
            int64_t begin = plan->row_items[row], end = plan->row_items[row + 1];
            for (int64_t item = begin; item < end; item++) {
                float m = scratch[item * stride + heads * dim + h];
                best = m > best ? m : best;
            }
            if (sinks) sum = exp_neg(sinks[h] - best);
            for (int64_t d = 0; d < dim; d++) to[d] = 0.0f;
            for (int64_t item = begin; item < end; item++) {
                const float *partial = scratch + item * stride;
                float weight = exp_neg(partial[heads * dim + h] - best);
                sum += weight * partial[heads * (dim + 1) + h];
                for (int64_t d = 0; d < dim; d++) to[d] += weight * partial[h * dim + d];
            }
            for (int64_t d = 0; d < dim; d++) to[d] /= sum;
        }
}
