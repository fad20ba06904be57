/* What kernels are given, and the parts of them that `layers.c` runs inside a parallel region of its own: a function with
 * a loop in it must be called by all threads of the region, and ends with their barrier. */
#include <stdint.h>

/* --- linear.c --- */

typedef struct {
    const void *weight;     /* [features, in], bf16, or int8 where there are scales: all parts of a product alike */
    const float *scales;    /* [features] or null: what a row of int8 is multiplied by */
    const uint16_t *bias;   /* [features] or null */
    uint16_t *out;          /* [rows, features] */
    int64_t features;
} Part;

typedef struct {
    int64_t rows, in, num_parts, threads;
    const uint16_t *x; /* [rows, in] */
    const Part *parts; /* products of the same x */
} Linear;

void linear_widen(const Linear *linear, const uint16_t *from, float *to); /* a row, as `linear_few` reads it */
void linear_few(const Linear *linear, const float *x);                    /* a loop: few rows, x widened and padded to 8 */
void silu_mul(uint16_t *gate, const uint16_t *up, int64_t n);
void rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *out, int64_t n, float eps, int64_t add_one);
void add_rows(uint16_t *to, const uint16_t *from, int64_t n); /* to += from, rounded */
void narrow_row(const float *from, uint16_t *to, int64_t n);

/* --- decode.c --- */

typedef struct {
    int64_t num_query_heads, num_kv_heads, head_dim, rotary_dim, block_size, max_blocks;
    int64_t dtype;        /* of keys and values */
    int64_t interleaved;  /* pairs are (2m, 2m+1) */
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

/* A loop over the items of `rows` rows; `scratch` as in prerope_decode. */
void decode_items(const Shape *shape, const Plan *plan, int64_t rows, const float *query, const void *keys,
                  const void *values, float *scratch);
/* The items of one row, merged: out [rows, Hq, D]. */
void decode_merge(const Shape *shape, const Plan *plan, int64_t row, const float *sinks, const float *scratch, float *out);
