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
#include "parts.h"
#include "vectors.h"

#define TILE 64
#define MAX_GROUP 16
#define MAX_WIDE_GROUP 8
#define MAX_WIDE 8 /* vectors of 16 dims */

INLINE float exp_neg(float x) { return exp_neg16((v16){x})[0]; }

/* --- any shape: plain loops ----------------------------------------------------------------------------------------- */

static void score_any(const float *query, const void *keys, const int64_t *at, const float *table, int count,
                      float *scores, const Shape *shape) {
    int dim = shape->head_dim, rotary = shape->rotary_dim, group = shape->num_query_heads / shape->num_kv_heads;
    float raw[MAX_DIM], key[MAX_DIM];
    for (int c = 0; c < count; c++) {
        unpair(keys, at[c], raw, dim, rotary, shape->interleaved, shape->dtype);
        const float *read = raw;
        if (table) {
            const float *cos_sin = table + (int64_t)c * rotary;
            turn(raw, key, cos_sin, cos_sin + rotary / 2, dim, rotary);
            read = key;
        }
        for (int g = 0; g < group; g++) {
            float sum = 0.0f;
            for (int d = 0; d < dim; d++) sum += query[g * dim + d] * read[d];
            scores[g * TILE + c] = sum;
        }
    }
}

static void accumulate_any(const float *weights, const void *values, const int64_t *at, int count, float *out,
                           const Shape *shape) {
    int dim = shape->head_dim, group = shape->num_query_heads / shape->num_kv_heads;
    float value[MAX_DIM];
    for (int c = 0; c < count; c++) {
        for (int d = 0; d < dim; d++) value[d] = load1(values, at[c] + d, shape->dtype);
        for (int g = 0; g < group; g++)
            for (int d = 0; d < dim; d++) out[g * dim + d] += weights[g * TILE + c] * value[d];
    }
}

/* --- whole vectors: D = 16·NV dims, all of them rotary in the half pairing, or none ---------------------------------- */

INLINE void score_wide(const float *query, const void *keys, const int64_t *at, const float *table, int count,
                       float *scores, const int G, const int NV, const int dtype) {
    for (int begin = 0; begin < count; begin += 16) {
        v16 partial[MAX_WIDE_GROUP][16];
        for (int i = 0; i < 16; i++) {
            int c = begin + i < count ? begin + i : count - 1; /* the last key again where there are fewer than 16 */
            v16 key[MAX_WIDE];
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) key[v] = load16(keys, at[c] + 16 * v, dtype);
            if (table) {
                const v16 *cos_sin = (const v16 *)(table + (int64_t)c * 16 * NV);
#pragma GCC unroll 4
                for (int v = 0; v < NV / 2; v++) {
                    v16 a = key[v], b = key[v + NV / 2], cs = cos_sin[v], sn = cos_sin[v + NV / 2];
                    key[v] = a * cs - b * sn;
                    key[v + NV / 2] = b * cs + a * sn;
                }
            }
#pragma GCC unroll 8
            for (int g = 0; g < G; g++) {
                v16 sum = *(const v16 *)(query + g * 16 * NV) * key[0];
#pragma GCC unroll 8
                for (int v = 1; v < NV; v++) sum += *(const v16 *)(query + g * 16 * NV + 16 * v) * key[v];
                partial[g][i] = sum;
            }
        }
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) *(v16 *)(scores + g * TILE + begin) = fold16(partial[g], 0);
    }
}

INLINE void accumulate_wide(const float *weights, const void *values, const int64_t *at, int count, float *out,
                            const int G, const int NV, const int dtype) {
    const int step = G > 4 ? 2 : 4; /* vectors of the output kept in registers at once: G·step of them */
    for (int v0 = 0; v0 < NV; v0 += step) {
        v16 sum[MAX_WIDE_GROUP][4];
#pragma GCC unroll 8
        for (int g = 0; g < G; g++)
#pragma GCC unroll 4
            for (int v = 0; v < step; v++) sum[g][v] = *(const v16 *)(out + (g * NV + v0 + v) * 16);
        for (int c = 0; c < count; c++) {
            v16 value[4];
#pragma GCC unroll 4
            for (int v = 0; v < step; v++) value[v] = load16(values, at[c] + 16 * (v0 + v), dtype);
#pragma GCC unroll 8
            for (int g = 0; g < G; g++)
#pragma GCC unroll 4
                for (int v = 0; v < step; v++) sum[g][v] += weights[g * TILE + c] * value[v];
        }
#pragma GCC unroll 8
        for (int g = 0; g < G; g++)
#pragma GCC unroll 4
            for (int v = 0; v < step; v++) *(v16 *)(out + (g * NV + v0 + v) * 16) = sum[g][v];
    }
}

/* Stamps out score and accumulate for the shapes that models have; anything else takes the plain loops. */
#define WIDE(F, ...) \
    switch (group * 100 + dim) { \
        case 164: F(__VA_ARGS__, 1, 4) return; \
        case 264: F(__VA_ARGS__, 2, 4) return; \
        case 364: F(__VA_ARGS__, 3, 4) return; \
        case 464: F(__VA_ARGS__, 4, 4) return; \
        case 228: F(__VA_ARGS__, 1, 8) return; \
        case 328: F(__VA_ARGS__, 2, 8) return; \
        case 428: F(__VA_ARGS__, 3, 8) return; \
        case 528: F(__VA_ARGS__, 4, 8) return; \
        case 728: F(__VA_ARGS__, 6, 8) return; \
        case 828: F(__VA_ARGS__, 7, 8) return; \
        case 928: F(__VA_ARGS__, 8, 8) return; \
    }
#define SCORE(T, G, NV) score_wide(query, keys, at, table, count, scores, G, NV, T);
#define ACCUMULATE(T, G, NV) accumulate_wide(weights, values, at, count, out, G, NV, T);

static void score(const float *query, const void *keys, const int64_t *at, const float *table, int count, float *scores,
                  const Shape *shape) {
    int group = shape->num_query_heads / shape->num_kv_heads, dim = shape->head_dim;
    int whole = !shape->interleaved && (shape->rotary_dim == dim || shape->rotary_dim == 0);
    if (whole && shape->dtype == BF16) WIDE(SCORE, BF16)
    if (whole && shape->dtype == FP32) WIDE(SCORE, FP32)
    score_any(query, keys, at, table, count, scores, shape);
}

static void accumulate(const float *weights, const void *values, const int64_t *at, int count, float *out,
                       const Shape *shape) {
    int group = shape->num_query_heads / shape->num_kv_heads, dim = shape->head_dim;
    if (shape->dtype == BF16) WIDE(ACCUMULATE, BF16)
    if (shape->dtype == FP32) WIDE(ACCUMULATE, FP32)
    accumulate_any(weights, values, at, count, out, shape);
}

/* --- one item: all heads over the segments [begin, end) of a row ------------------------------------------------------ */

/* scores [group, TILE] to weights in place; the running maxima and sums move on, and `out` fades by the same factor. */
static void soften(float *scores, int count, float *out, float *maxima, float *sums, const Shape *shape) {
    int dim = shape->head_dim, group = shape->num_query_heads / shape->num_kv_heads, wide = (count + 15) / 16;
    for (int g = 0; g < group; g++) {
        float *row = scores + g * TILE, best = maxima[g], sum = 0.0f;
        v16 *x = (v16 *)row, most = (v16){} + LOWEST, total = {};
        for (int c = 0; c < count; c++) row[c] *= shape->scale;
        if (shape->softcap > 0.0f)
            for (int c = 0; c < count; c++) row[c] = shape->softcap * tanhf(row[c] / shape->softcap);
        for (int c = count; c < 16 * wide; c++) row[c] = LOWEST;
        for (int v = 0; v < wide; v++) most = larger(x[v], most);
        for (int lane = 0; lane < 16; lane++) best = most[lane] > best ? most[lane] : best;
        for (int v = 0; v < wide; v++) {
            x[v] = exp_neg16(x[v] - best);
            total += x[v];
        }
        for (int lane = 0; lane < 16; lane++) sum += total[lane];
        if (count < 16 * wide) { /* exp_neg16 does not go below e^-87: take the padding out exactly */
            sum = 0.0f;
            for (int c = 0; c < count; c++) sum += row[c];
        }
        float fade = exp_neg(maxima[g] - best);
        maxima[g] = best;
        sums[g] = sums[g] * fade + sum;
        if (fade != 1.0f)
            for (int d = 0; d < dim; d++) out[g * dim + d] *= fade;
    }
}

static void run(const Shape *shape, const Plan *plan, int64_t item, const float *query, const void *keys,
                const void *values, float *plain, float *turned, float *out, float *maxima, float *sums) {
    int64_t heads = shape->num_query_heads, dim = shape->head_dim, rotary = shape->rotary_dim;
    int64_t kv_heads = shape->num_kv_heads, group = heads / kv_heads;
    const int32_t *blocks = plan->blocks + plan->item_row[item] * shape->max_blocks;
    float scores[MAX_GROUP * TILE] __attribute__((aligned(64)));
    int64_t slots[TILE], at[TILE];
    for (int64_t h = 0; h < heads; h++) {
        unpair(query, h * dim, plain + h * dim, dim, rotary, shape->interleaved, FP32);
        maxima[h] = LOWEST;
        sums[h] = 0.0f;
    }
    memset(out, 0, sizeof(float) * heads * dim);
    for (int64_t s = plan->item_begin[item], last = -2; s < plan->item_end[item]; s++) {
        if (plan->turn[s] != last) {
            last = plan->turn[s];
            const float *cos_sin = plan->turns + last * rotary;
            for (int64_t h = 0; h < heads; h++) {
                if (last < 0) memcpy(turned + h * dim, plain + h * dim, sizeof(float) * dim);
                else turn(plain + h * dim, turned + h * dim, cos_sin, cos_sin + rotary / 2, dim, rotary);
            }
        }
        int32_t start = plan->start[s];
        int count = plan->stop[s] - start;
        const float *table = 0;
        if (plan->table[s] >= 0) table = plan->tables + ((int64_t)plan->table[s] * TILE + start % TILE) * rotary;
        int64_t block = start / shape->block_size, offset = start % shape->block_size;
        for (int c = 0; c < count; c++) {
            slots[c] = blocks[block] * shape->block_size + offset;
            if (++offset == shape->block_size) offset = 0, block++;
        }
        int64_t row_bytes = kv_heads * dim * (shape->dtype == FP32 ? 4 : 2);
        for (int c = 0; c < count; c++) /* values arrive while the keys are scored */
            for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch((const char *)values + slots[c] * row_bytes + b);
        for (int64_t head = 0; head < kv_heads; head++) {
            for (int c = 0; c < count; c++) at[c] = (slots[c] * kv_heads + head) * dim;
            float *to = out + head * group * dim;
            score(turned + head * group * dim, keys, at, table, count, scores, shape);
            soften(scores, count, to, maxima + head * group, sums + head * group, shape);
            accumulate(scores, values, at, count, to, shape);
        }
    }
}

/* Floats of scratch of one item: its partial result, the query as it is and as turned, maxima and sums. */
INLINE int64_t stride_of(const Shape *shape) { return shape->num_query_heads * (3 * shape->head_dim + 2); }

void decode_items(const Shape *shape, const Plan *plan, int64_t rows, const float *query, const void *keys,
                  const void *values, float *scratch) {
    int64_t heads = shape->num_query_heads, size = heads * shape->head_dim, items = plan->row_items[rows];
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
        float *mine = scratch + item * stride_of(shape), *maxima = mine + 3 * size;
        run(shape, plan, item, query + plan->item_row[item] * size, keys, values, mine + size, mine + 2 * size, mine,
            maxima, maxima + heads);
    }
}

void decode_merge(const Shape *shape, const Plan *plan, int64_t row, const float *sinks, const float *scratch, float *out) {
    int64_t heads = shape->num_query_heads, dim = shape->head_dim, stride = stride_of(shape);
    int64_t maxima = 3 * heads * dim, sums = maxima + heads, begin = plan->row_items[row], end = plan->row_items[row + 1];
    for (int64_t h = 0; h < heads; h++) {
        float best = sinks ? sinks[h] : LOWEST, sum = 0.0f, *to = out + (row * heads + h) * dim;
        for (int64_t item = begin; item < end; item++) {
            float m = scratch[item * stride + maxima + h];
            best = m > best ? m : best;
        }
        if (sinks) sum = exp_neg(sinks[h] - best);
        for (int64_t d = 0; d < dim; d++) to[d] = 0.0f;
        for (int64_t item = begin; item < end; item++) {
            const float *partial = scratch + item * stride;
            float weight = exp_neg(partial[maxima + h] - best);
            sum += weight * partial[sums + h];
            for (int64_t d = 0; d < dim; d++) to[d] += weight * partial[h * dim + d];
        }
        for (int64_t d = 0; d < dim; d++) to[d] /= sum;
    }
}

/* query, out: [rows, Hq, D] fp32. keys, values: [num_blocks, block_size, Hkv, D]. sinks: [Hq] or null.
 * scratch: [items, Hq, 3·D + 2] fp32. */
void prerope_decode(const Shape *shape, const Plan *plan, int64_t rows, const float *query, const void *keys,
                    const void *values, const float *sinks, float *scratch, float *out) {
#pragma omp parallel
    decode_items(shape, plan, rows, query, keys, values, scratch);
    for (int64_t row = 0; row < rows; row++) decode_merge(shape, plan, row, sinks, scratch, out);
}
