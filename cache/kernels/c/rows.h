/* Attention of single rows: what kernels are given, and what a step of layers runs inside a parallel region of its own.
 * A function with a loop in it must be called by all threads of the region, and ends with their barrier. */
#include <stdint.h>

typedef struct {
    int64_t query_heads, kv_heads, head_dim, value_dim, rotary_dim, block_size;
    int64_t query_dtype, dtype; /* of queries and results; of keys and values */
    int64_t interleaved;        /* pairs are (2m, 2m+1) */
    int64_t dots;               /* keys and values of bf16 are multiplied in pairs */
    float scale, softcap;       /* softcap 0: off */
    const float *slopes;        /* [Hq] or null: a score falls by slope·(i − j) */
} Shape;

typedef struct RowPlan RowPlan;

/* A loop over the work of all rows, query [rows, Hq, D]; `bounds` and `scratch` as in prerope_rows. */
void rows_attend(const Shape *shape, const RowPlan *plan, const void *query, const void *keys, const void *values,
                 const void *bounds, float *scratch);
/* What was found for one row, merged, to out [rows, Hq, Dv]. */
void row_finish(const Shape *shape, const RowPlan *plan, int64_t row, const float *sinks, float *scratch, void *out);
