/* Keys and values as attend.c's products take them: see `Packed` in attend.h. */
#include "attend.h"

/* UNIT heads [UNIT, words] of floats or words to columns n, n + 1, … of a tile. */
INLINE void columns(const float *heads, int64_t stride, int64_t words, float *tile) {
    for (int64_t h = 0; h < UNIT; h += LANES)
        for (int64_t w = 0; w < words; w += LANES) {
            vfloat square[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) square[i] = *(const vfloat *)(heads + (h + i) * stride + w);
            transpose(square);
            for (int i = 0; i < LANES && w + i < words; i++) *(vfloat *)(tile + (w + i) * KEYS + h) = square[i];
        }
}

/* Where key j of a source is, in heads from the first of the cache on; keys of a block lie `kv_heads` apart. */
INLINE int64_t place_of(const Shape *shape, const Source *source, int64_t j) {
    int64_t block = j / shape->block_size;
    return ((source->blocks[block] - block) * shape->block_size + j) * shape->kv_heads + source->head;
}

/* One key and its value into L2. */
INLINE void fetch_key(const Shape *shape, const Source *source, int64_t j) {
    int64_t size = shape->dtype == FP32 ? 4 : 2, key_bytes = shape->head_dim * size, value_bytes = shape->value_dim * size;
    int64_t at = place_of(shape, source, j);
    const char *key = (const char *)source->keys + at * key_bytes, *value = (const char *)source->values + at * value_bytes;
    for (int64_t byte = 0; byte < key_bytes; byte += LINE) __builtin_prefetch(key + byte, 0, 2);
    for (int64_t byte = 0; byte < value_bytes; byte += LINE) __builtin_prefetch(value + byte, 0, 2);
}

void fetch_keys(const Shape *shape, const Source *source, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j++) fetch_key(shape, source, j);
}

/* Values of keys n and n + 1; null: of a key that is not read, which weighs 0, so that anything finite will do. */
INLINE void pack_values(const Shape *shape, const char *const *from, int64_t n, float *to, const int dtype) {
    int64_t dim = shape->value_dim, width = padded(dim);
    float last[2][LANES] = {};
    for (int64_t d = 0; d < width; d += LANES) {
        vfloat value[2] = {};
        for (int i = 0; i < 2; i++) {
            if (!from[i]) continue;
            if (d + LANES <= dim) value[i] = load(from[i], d, dtype);
            else {
                for (int64_t lane = 0; d + lane < dim; lane++) last[i][lane] = load1(from[i], d + lane, dtype);
                if (d < dim) value[i] = *(vfloat *)last[i];
            }
        }
        if (shape->dots) *(vuint *)(to + n / 2 * width + d) = ((vuint)value[0] >> 16) | (vuint)odd((vuint)value[1]);
        else {
            *(vfloat *)(to + n * width + d) = value[0];
            *(vfloat *)(to + (n + 1) * width + d) = value[1];
        }
    }
}

/* A head from member `at` of the cache on, as `turn` and `narrow_both` leave it, without a detour through memory. */
INLINE void turn_head(const void *from, int64_t at, const float *cos, float *to, int64_t dim, int64_t rotary, const int dots,
                      const int dtype) {
    const int vectors = dots ? 2 : 1;
    int64_t half = rotary / 2;
    for (int64_t m = 0; m < half; m += vectors * LANES) {
        vfloat x[2], y[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            int64_t n = m + LANES * v;
            vfloat a = load(from, at + n, dtype), b = load(from, at + half + n, dtype);
            vfloat c = *(const vfloat *)(cos + n), s = *(const vfloat *)(cos + half + n);
            x[v] = vfma(-b, s, a * c), y[v] = vfma(a, s, b * c);
        }
        if (dots) {
            *(vuint *)(to + m / 2) = narrow_both(x[0], x[1]);
            *(vuint *)(to + (half + m) / 2) = narrow_both(y[0], y[1]);
        } else *(vfloat *)(to + m) = x[0], *(vfloat *)(to + half + m) = y[0];
    }
    for (int64_t d = rotary; d < dim; d += vectors * LANES)
        if (dots) *(vuint *)(to + d / 2) = pairs_at((const uint16_t *)from + at + d);
        else *(vfloat *)(to + d) = load(from, at + d, dtype);
}

/* Whether heads and what turns of them are whole vectors, so that `pack_whole` takes them. */
INLINE int is_whole(const Shape *shape, int64_t rotary) {
    return !shape->interleaved && shape->block_size % UNIT == 0 && shape->head_dim % 32 == 0 && shape->value_dim % 32 == 0 &&
           rotary % ((shape->dots ? 4 : 2) * LANES) == 0;
}

/* As `pack_columns`, where all UNIT keys are read and lie in one block, from head `at` on; table: of the first key, or null. */
INLINE void pack_whole(const Shape *shape, const Source *source, const float *table, int64_t rotary, int64_t at,
                       int64_t next, int64_t stop, const Packed *to, const int dots, const int dtype) {
    int64_t dim = shape->head_dim, width = shape->value_dim, heads = shape->kv_heads;
    float turned[UNIT][MAX_DIM] __attribute__((aligned(64)));
    for (int64_t i = 0; i < UNIT; i++) {
        if (next + i < stop) fetch_key(shape, source, next + i);
        turn_head(source->keys, (at + i * heads) * dim, table + i * rotary, turned[i], dim, rotary, dots, dtype);
    }
    columns(turned[0], MAX_DIM, dots ? dim / 2 : dim, to->keys);
    const uint16_t *value = (const uint16_t *)source->values + at * width;
    for (int64_t i = 0; i < UNIT && dots; i += 2, value += 2 * heads * width)
        for (int64_t d = 0; d < width; d += LANES)
            *(vuint *)(to->values + i / 2 * width + d) = to_words(*(const vhalf *)(value + d)) |
                                                          to_words(*(const vhalf *)(value + heads * width + d)) << 16;
    for (int64_t i = 0; i < UNIT && !dots; i++)
        for (int64_t d = 0; d < width; d += LANES)
            *(vfloat *)(to->values + i * width + d) = load(source->values, (at + i * heads) * width + d, dtype);
}

/* UNIT keys from tile + n on, of them [low, high), turned, to as many columns of a tile; their values to rows. */
INLINE void pack_columns(const Shape *shape, const Source *source, const Turns *turns, int64_t tile, int64_t n, int64_t low,
                         int64_t high, int64_t next, int64_t stop, const Packed *to, const int dtype) {
    int64_t dim = shape->head_dim, wide = padded(dim), words = words_of(shape), rotary = shape->rotary_dim;
    int64_t size = dtype == FP32 ? 4 : 2, begin = tile + n;
    const float *table = 0;
    if (turns->bases) table = turns->tables + ((int64_t)turns->table[tile / KEYS] * KEYS + n) * rotary;
    if (begin >= low && begin + UNIT <= high && is_whole(shape, table ? rotary : 0)) {
        int64_t turning = table ? rotary : 0, at = place_of(shape, source, begin);
        if (!shape->dots) return pack_whole(shape, source, table, turning, at, next, stop, to, 0, dtype);
        if (dtype == BF16) return pack_whole(shape, source, table, turning, at, next, stop, to, 1, BF16);
    }
    float raw[MAX_DIM], heads[UNIT][MAX_DIM] __attribute__((aligned(64)));
    const char *values[2];
    for (int64_t i = 0; i < UNIT; i++) {
        float *head = heads[i];
        for (int64_t d = dim; d < wide; d++) head[d] = 0.0f;
        values[i % 2] = 0;
        if (next + i < stop) fetch_key(shape, source, next + i);
        if (begin + i >= low && begin + i < high) {
            int64_t at = place_of(shape, source, begin + i);
            values[i % 2] = (const char *)source->values + at * shape->value_dim * size;
            unpair(source->keys, at * dim, table ? raw : head, dim, rotary, shape->interleaved, dtype);
            if (table) turn(raw, head, table + i * rotary, table + i * rotary + rotary / 2, dim, rotary);
        } else {
            memset(head, 0, sizeof(float) * dim);
        }
        if (shape->dots) /* in place: a vector of words is written where its two of floats were read */
            for (int64_t d = 0; d < wide; d += 2 * LANES)
                *(vuint *)(head + d / 2) = narrow_both(*(vfloat *)(head + d), *(vfloat *)(head + d + LANES));
        if (i % 2) pack_values(shape, values, i - 1, to->values, dtype);
    }
    columns(heads[0], MAX_DIM, words, to->keys);
}

/* The same of any dtype. */
INLINE void pack_any(const Shape *shape, const Source *source, const Turns *turns, int64_t tile, int64_t n, int64_t low,
                     int64_t high, int64_t next, int64_t stop, const Packed *to) {
    WITH_DTYPE(shape->dtype, pack_columns(shape, source, turns, tile, n, low, high, next, stop, to, DTYPE))
}

void pack_tile(const Shape *shape, const Source *source, const Turns *turns, int64_t tile, int64_t low, int64_t high,
               const Packed *to) {
    for (int64_t n = 0; n < KEYS; n += UNIT) {
        Packed at = columns_at(shape, to, n);
        pack_any(shape, source, turns, tile, n, low, high, tile + n + AHEAD, high, &at);
    }
}

void pack_unit(const Shape *shape, const Source *source, const Turns *turns, int64_t unit, const Packed *to) {
    int64_t key = unit * UNIT, tile = key / KEYS * KEYS;
    pack_any(shape, source, turns, tile, key - tile, 0, INT64_MAX, 0, 0, to);
}
