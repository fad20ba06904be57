/* Which units of far keys a row reads: see cache/attention/selection.py. Bounds, the smallest and the largest raw value of
 * each dim, are of *grains*: what a block of the cache and a unit have in common. */
#include "attend.h"
#include "select.h"

INLINE vfloat smaller(vfloat a, vfloat b) { return -larger(-a, -b); }

INLINE void bounds_of(const void *keys, int64_t from, int64_t size, int64_t width, void *bounds, int64_t at,
                      const int dtype) {
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) {
        vfloat least = load(keys, from + d, dtype), most = least;
        for (int64_t n = 1; n < size; n++) {
            vfloat key = load(keys, from + n * width + d, dtype);
            least = smaller(least, key), most = larger(most, key);
        }
        store(bounds, at + d, least, dtype), store(bounds, at + width + d, most, dtype);
    }
    for (; d < width; d++) {
        float least = load1(keys, from + d, dtype), most = least;
        for (int64_t n = 1; n < size; n++) {
            float key = load1(keys, from + n * width + d, dtype);
            least = key < least ? key : least, most = key > most ? key : most;
        }
        store1(bounds, at + d, least, dtype), store1(bounds, at + width + d, most, dtype);
    }
}

/* Of these grains: keys [grains, size, width] to bounds [grains, 2, width]. */
void prerope_bounds(const void *keys, void *bounds, const int64_t *grains, int64_t count, int64_t size, int64_t width,
                    int64_t dtype) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < count; n++) {
        int64_t from = grains[n] * size * width, at = 2 * grains[n] * width;
        WITH_DTYPE(dtype, bounds_of(keys, from, size, width, bounds, at, DTYPE))
    }
}

/* Where the bounds of a unit's grain n are, of one head. */
INLINE int64_t bounds_at(const Shape *shape, const int64_t *blocks, int64_t unit, int64_t n, int64_t head) {
    int64_t size = shape->block_size, grain = least(size, UNIT), key = unit * UNIT + n * grain;
    int64_t slot = blocks[key / size] * size + key % size;
    return (2 * (slot / grain) * shape->kv_heads + head) * shape->head_dim;
}

/* As `fetch_keys`. */
INLINE void fetch_bounds(const Shape *shape, const void *bounds, const int64_t *blocks, int64_t unit, int64_t head) {
    int64_t size = shape->dtype == FP32 ? 4 : 2, bytes = shape->head_dim * size, grains = UNIT / least(shape->block_size, UNIT);
    for (int64_t n = 0; n < grains; n++) {
        const char *low = (const char *)bounds + bounds_at(shape, blocks, unit, n, head) * size;
        for (int64_t byte = 0; byte < bytes; byte += LINE) {
            __builtin_prefetch(low + byte, 0, 2);
            __builtin_prefetch(low + shape->kv_heads * bytes + byte, 0, 2);
        }
    }
}

/* low, high: [D] of a unit, from those of its grains. */
INLINE void unit_bounds(const Shape *shape, const void *bounds, const int64_t *blocks, int64_t unit, int64_t head,
                        float *low, float *high, const int dtype) {
    int64_t dim = shape->head_dim, width = shape->kv_heads * dim, grains = UNIT / least(shape->block_size, UNIT);
    for (int64_t n = 0; n < grains; n++) {
        int64_t at = bounds_at(shape, blocks, unit, n, head), d = 0;
        for (; d + LANES <= dim; d += LANES) {
            vfloat least = load(bounds, at + d, dtype), most = load(bounds, at + width + d, dtype);
            if (n) least = smaller(*(vfloat *)(low + d), least), most = larger(*(vfloat *)(high + d), most);
            *(vfloat *)(low + d) = least, *(vfloat *)(high + d) = most;
        }
        for (; d < dim; d++) {
            float least = load1(bounds, at + d, dtype), most = load1(bounds, at + width + d, dtype);
            low[d] = n && low[d] < least ? low[d] : least, high[d] = n && high[d] > most ? high[d] : most;
        }
    }
}

/* The largest sums of any of the group's queries, for LANES units whose bounds are low, high [LANES, MAX_DIM]; parts: negative
 * and positive parts of the queries, [group, 2, wide]. */
INLINE vfloat unit_scores(const float *parts, const float *low, const float *high, int64_t group, int64_t wide) {
    vfloat best = splat(-INFINITY);
    for (int64_t g = 0; g < group; g++) {
        const float *negative = parts + 2 * g * wide, *positive = negative + wide;
        vfloat sums[LANES];
        for (int u = 0; u < LANES; u++) {
            sums[u] = (vfloat){};
            for (int64_t d = 0; d < wide; d += LANES) {
                sums[u] = vfma(*(vfloat *)(negative + d), *(vfloat *)(low + u * MAX_DIM + d), sums[u]);
                sums[u] = vfma(*(vfloat *)(positive + d), *(vfloat *)(high + u * MAX_DIM + d), sums[u]);
            }
        }
        best = larger(best, fold_all(sums, 0));
    }
    return best;
}

/* Floats as integers of the same order. */
INLINE uint32_t ordered(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The k largest of n, in their order, among equals the first: a bit of the least of them at a time. */
static void largest(const uint32_t *scores, int64_t n, int64_t k, int32_t first, int32_t *to) {
    uint32_t least = 0;
    for (int bit = 31; bit >= 0; bit--) {
        uint32_t higher = least | 1u << bit;
        int32_t count = 0;
        for (int64_t u = 0; u < n; u++) count += scores[u] >= higher;
        if (count >= k) least = higher;
    }
    int64_t equal = k;
    for (int64_t u = 0; u < n; u++) equal -= scores[u] > least;
    for (int64_t u = 0; u < n; u++)
        if (scores[u] > least || (scores[u] == least && equal-- > 0)) *to++ = first + u;
}

void score_units(const Shape *shape, const void *query, int64_t query_at, const void *bounds, const int64_t *blocks,
                 int64_t head, int64_t begin, int64_t end, uint32_t *scores) {
    int64_t dim = shape->head_dim, wide = (dim + 15) / 16 * 16, group = shape->query_heads / shape->kv_heads;
    float parts[2 * group * wide] __attribute__((aligned(64)));
    float low[LANES][MAX_DIM] __attribute__((aligned(64))), high[LANES][MAX_DIM] __attribute__((aligned(64)));
    for (int64_t i = 0; i < LANES; i++)
        for (int64_t d = 0; d < wide; d++) low[i][d] = high[i][d] = 0.0f;
    for (int64_t g = 0; g < group; g++)
        for (int64_t d = 0; d < wide; d++) {
            float x = d < dim ? load1(query, query_at + (head * group + g) * dim + d, shape->query_dtype) : 0.0f;
            parts[2 * g * wide + d] = x < 0.0f ? x : 0.0f, parts[(2 * g + 1) * wide + d] = x > 0.0f ? x : 0.0f;
        }
    for (int64_t unit = begin; unit < least(begin + LANES, end); unit++) fetch_bounds(shape, bounds, blocks, unit, head);
    for (int64_t unit = begin; unit < end; unit += LANES) {
        int64_t count = least(LANES, end - unit);
        for (int64_t next = unit + LANES; next < least(unit + 2 * LANES, end); next++) fetch_bounds(shape, bounds, blocks, next, head);
        for (int64_t i = 0; i < count; i++)
            WITH_DTYPE(shape->dtype, unit_bounds(shape, bounds, blocks, unit + i, head, low[i], high[i], DTYPE))
        vfloat found = unit_scores(parts, low[0], high[0], group, wide);
        for (int64_t i = 0; i < count; i++) scores[unit - begin + i] = ordered(found[i]);
    }
}

void choose_units(const Far *far, const uint32_t *scores, int32_t *chosen) {
    largest(scores, far->stop - far->first, far->count, far->first, chosen);
}
