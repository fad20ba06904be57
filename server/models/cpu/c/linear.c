/* Linear layers: who multiplies which rows by which weights, by `dots` (dots.h).
 *
 * Few rows are bound by reading the weights, many by arithmetic: for them a panel of weight rows is copied, as the lanes
 * want them, into L2, and tiles of rows run over it.
 */
#include <stddef.h>

#include "dots.h"
#include "elementwise.h"

#define BLOCK 16 /* weight rows of a unit of work of few rows */
#define TILE 4   /* rows of many that run over a panel together */
#define PANEL (LANES == 8 ? 24 : 32) /* weight rows of a unit of work of many rows */
#define LEAST_ROWS 64 /* of many rows, a unit of work */
int omp_get_thread_num(void);

/* The part that unit `number` falls into, when each part has ceil(features / size) of them; number becomes the part's own. */
INLINE const Part *part_of(const Linear *linear, int64_t size, int64_t *number) {
    const Part *part = linear->parts;
    for (int64_t units; *number >= (units = (part->features + size - 1) / size); part++) *number -= units;
    return part;
}

static int64_t num_units(const Linear *linear, int64_t size) {
    int64_t units = 0;
    for (int64_t p = 0; p < linear->num_parts; p++) units += (linear->parts[p].features + size - 1) / size;
    return units;
}

/* --- few rows --------------------------------------------------------------------------------------------------------- */

INLINE void block_of(const Linear *linear, const Part *part, int64_t first, const char *x, const int R, const int kind,
                     SumAll *apart) {
    int64_t stride = linear->in * weight_size(kind), most_rows = (linear->rows + R - 1) / R * R;
    Sums sums = {.n = -1};
    for (int64_t row = 0; row < linear->rows; row += R) {
        const char *rows[8];
        rows_at(linear, x, row, rows, R, kind);
        for (int64_t n = first; n < first + BLOCK; n += OUTPUTS / R) {
            /* Rows that come in several tiles share out the asking for the next block. */
            int64_t ahead = BY_TWOS(kind) ? 2 * stride : AHEAD, share = (n - first) * most_rows / BLOCK;
            if (most_rows > R) ahead = share >= row && share < row + R ? BLOCK * stride : 0;
            const char *weight = (const char *)part->weight + n * stride;
            dots(linear, part, rows, weight, stride, row, n, R, OUTPUTS / R, kind, kind, 1, ahead, apart, &sums);
        }
    }
    put(linear, part, &sums, R, OUTPUTS / R, kind);
}

#define BLOCK_OF(kind) \
    SUM_ALL(sum1_##kind, 1, 16, kind, 1) SUM_ALL(sum2_##kind, 2, 8, kind, 1) SUM_ALL(sum4_##kind, 4, 4, kind, 1) \
    APART void block_of_##kind(const Linear *linear, const Part *part, int64_t first, const char *x) { \
        int64_t rows = linear->rows; \
        if (rows == 1) block_of(linear, part, first, x, 1, kind, sum1_##kind); \
        else if (rows == 2) block_of(linear, part, first, x, 2, kind, sum2_##kind); \
        else if (rows <= 4 || FEW_REGISTERS) block_of(linear, part, first, x, 4, kind, sum4_##kind); \
        else block_of(linear, part, first, x, 8, kind, 0); \
    }
BLOCK_OF(FULL)
BLOCK_OF(WIDENED)
BLOCK_OF(DOTS)
BLOCK_OF(BYTES)
BLOCK_OF(BYTE_DOTS)

int linear_is_wide(const Linear *linear) { return linear->kind == WIDENED || linear->kind == BYTES; }

/* In the order that the lanes take members of the weights in: of every STEP of bf16, the even ones before the odd ones. */
void linear_ready(const Linear *linear, const uint16_t *from, float *to) {
    int byte = linear->kind == BYTES;
    for (int64_t i = 0; i < linear->in && linear_is_wide(linear); i += STEP) {
        *(vfloat *)(to + i) = byte ? load(from, i, BF16) : even(pairs_at(from + i));
        *(vfloat *)(to + i + LANES) = byte ? load(from, i + LANES, BF16) : odd(pairs_at(from + i));
    }
}

void linear_few(const Linear *linear, const void *x) {
    int64_t units = num_units(linear, BLOCK);
#pragma omp for schedule(guided, 2) /* long stretches of weights, and short ones to end together */
    for (int64_t unit = 0; unit < units; unit++) {
        int64_t number = unit;
        const Part *part = part_of(linear, BLOCK, &number);
        /* The last block starts early where features are no multiple of it: some are worked out twice. */
        int64_t first = least(number * BLOCK, part->features - BLOCK);
        switch (linear->kind) {
            case FULL: block_of_FULL(linear, part, first, x); break;
            case WIDENED: block_of_WIDENED(linear, part, first, x); break;
            case DOTS: block_of_DOTS(linear, part, first, x); break;
            case BYTES: block_of_BYTES(linear, part, first, x); break;
            default: block_of_BYTE_DOTS(linear, part, first, x);
        }
    }
}

static void few(const Linear *linear, float *scratch) {
    int64_t in = linear->in, rows = linear->rows;
    const void *x = linear_is_wide(linear) ? scratch : linear->x;
    for (int64_t row = 0; row < rows; row++)
        linear_ready(linear, (const uint16_t *)linear->x + row * in, scratch + row * in);
#pragma omp parallel num_threads(linear->threads)
    linear_few(linear, x);
}

/* --- many rows -------------------------------------------------------------------------------------------------------- */

INLINE void pack_as(const Part *part, int64_t first, int64_t count, int64_t in, char *panel, const int kind) {
    for (int64_t c = 0; c < count; c++) {
        const char *from = (const char *)part->weight + (first + c) * in * weight_size(kind);
        char *to = panel + c * in * panel_size(kind);
        for (int64_t k = 0; k < in; k += STEP) {
            const char *at = from + k * weight_size(kind);
            if (k % 32 == 0) __builtin_prefetch(at + AHEAD, 0, 2);
            *(vfloat *)(to + k * panel_size(kind)) = weights_at(at, 0, kind);
            if (!in_pairs(kind)) *(vfloat *)(to + (k + LANES) * 4) = weights_at(at, 1, kind);
        }
    }
}

static void pack(const Linear *linear, const Part *part, int64_t first, int64_t count, char *panel) {
    switch (linear->kind) {
        case FULL: pack_as(part, first, count, linear->in, panel, FULL); break;
        case WIDENED: pack_as(part, first, count, linear->in, panel, WIDENED); break;
        case DOTS: pack_as(part, first, count, linear->in, panel, DOTS); break;
        case BYTES: pack_as(part, first, count, linear->in, panel, BYTES); break;
        default: pack_as(part, first, count, linear->in, panel, BYTE_DOTS);
    }
}

/* Rows [begin, end) of x against a panel of `count` ≥ 6 weight rows, as `kind` finds them there: FULL or DOTS. */
INLINE void tiles(const Linear *linear, const Part *part, int64_t first, int64_t count, const char *panel, const char *x,
                  int64_t begin, int64_t end, const int kind, const int of, SumAll *apart) {
    const int C = TILE_SUMS / TILE;
    int64_t stride = linear->in * panel_size(kind);
    Sums sums = {.n = -1};
    for (int64_t row = begin; row < end; row += TILE) {
        const char *rows[TILE];
        rows_at(linear, x, row, rows, TILE, kind);
        for (int64_t n = 0; n < count; n += C) {
            int64_t at = least(n, count - C);
            dots(linear, part, rows, panel + at * stride, stride, row, first + at, TILE, C, kind, of, 0, 0, apart, &sums);
        }
    }
    put(linear, part, &sums, TILE, C, of);
}
SUM_ALL(sum_tile_FULL, TILE, TILE_SUMS / TILE, FULL, 0)
SUM_ALL(sum_tile_DOTS, TILE, TILE_SUMS / TILE, DOTS, 0)
#define TILES(name, kind, of) \
    APART void name(const Linear *linear, const Part *part, int64_t first, int64_t count, const char *panel, \
                    const char *x, int64_t begin, int64_t end) { \
        tiles(linear, part, first, count, panel, x, begin, end, kind, of, sum_tile_##kind); \
    }
TILES(tiles_full, FULL, FULL)
TILES(tiles_widened, FULL, WIDENED)
TILES(tiles_dots, DOTS, DOTS)

static void many(const Linear *linear, float *scratch) {
    int64_t in = linear->in, rows = linear->rows, size = panel_size(linear->kind);
    int64_t panels = num_units(linear, PANEL), cuts = 4 * linear->threads / panels + 1;
    cuts = least(cuts, (rows + LEAST_ROWS - 1) / LEAST_ROWS);
    int64_t step = (rows + TILE * cuts - 1) / (TILE * cuts) * TILE;
    const char *x = linear_is_wide(linear) ? (const char *)scratch : linear->x;
    char *panel = (char *)(scratch + rows * in);
#pragma omp parallel num_threads(linear->threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            linear_ready(linear, (const uint16_t *)linear->x + row * in, scratch + row * in);
        char *mine = panel + omp_get_thread_num() * PANEL * in * size;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < panels * cuts; unit++) {
            int64_t number = unit / cuts, begin = unit % cuts * step, end = least(begin + step, rows);
            if (begin >= end) continue;
            const Part *part = part_of(linear, PANEL, &number);
            int64_t count = least(PANEL, part->features), first = least(number * PANEL, part->features - count);
            pack(linear, part, first, count, mine);
            if (linear->kind == FULL) tiles_full(linear, part, first, count, mine, x, begin, end);
            else if (in_pairs(linear->kind)) tiles_dots(linear, part, first, count, mine, x, begin, end);
            else tiles_widened(linear, part, first, count, mine, x, begin, end);
        }
    }
}

/* Floats of scratch that `prerope_linear` wants for this many rows. */
int64_t prerope_linear_scratch(int64_t rows, int64_t in, int64_t threads, int64_t few_rows) {
    return rows * in + (rows <= few_rows ? 0 : threads * PANEL * in);
}

/* in: a multiple of 32; features: at least 16. */
void prerope_linear(const Linear *linear, int64_t few_rows, float *scratch) {
    if (linear->rows == 0) return; /* lm_head in a step that only reads */
    if (linear->rows <= few_rows) few(linear, scratch);
    else many(linear, scratch);
}

/* x → second(silu(gate x)·(up x)), where gate and up are the parts of `first` and second->x is where gate's result is. */
void prerope_gated(const Linear *first, const Linear *second, int64_t few_rows, float *scratch) {
    prerope_linear(first, few_rows, scratch);
    int64_t rows = first->rows, n = first->parts[0].features, dtype = dtype_of(first->kind);
    int64_t size = n * (dtype == BF16 ? 2 : 4);
    char *gate = first->parts[0].out, *up = first->parts[1].out;
#pragma omp parallel for schedule(static) if (rows * n > 65536)
    for (int64_t row = 0; row < rows; row++) silu_mul(gate + row * size, up + row * size, n, dtype);
    prerope_linear(second, few_rows, scratch);
}
