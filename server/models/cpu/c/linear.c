/* Products of activations and weights.
 *
 * There is one order. 16 lanes run along a weight row, over 32 of its members after the other, and are folded at the end;
 * so the weights are read where the checkpoint or torchao put them. One row or hundreds, streamed from memory or from a
 * panel in L2, a product is `dots`, and its result depends on neither the other rows nor the number of threads.
 *
 * What the lanes do is the product's *kind*. Of bf16, either pairs are multiplied by the processor's bf16 dot products, or
 * both sides are widened to fp32: the two round differently, so a deployment keeps to one of them. An int8 member is exact
 * in bf16 and in fp32, and its row's scale multiplies the finished sum. Results are rounded where torch's modules round.
 *
 * Few rows are bound by reading the weights, many by arithmetic: for them a panel of weight rows is copied, as the lanes
 * want them, into L2, and tiles of rows run over it.
 */
#include <stddef.h>

#include "elementwise.h"
#include "linear.h"
#include "vectors.h"

#define BLOCK 16 /* weight rows of a unit of work of few rows */
#define BESIDE 4  /* of them are streamed side by side: 16, and 1, were slower */
#define AHEAD 8192 /* bytes before its use that a weight is asked for */
#define PANEL 32 /* weight rows of a unit of work of many rows */
#define TILE 4   /* rows that run over a panel together */
#define LEAST_ROWS 64 /* of many rows, a unit of work */

int omp_get_thread_num(void);

INLINE v16 bytes_at(const int8_t *from) {
#ifdef __AVX512F__
    i32x16 wide = (i32x16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#else
    i32x16 wide = __builtin_convertvector(__builtin_convertvector(*(const i8x16 *)from, i16x16), i32x16);
#endif
    return __builtin_convertvector(wide, v16);
}

INLINE float widen(uint16_t x) { return load1(&x, 0, BF16); }
INLINE int in_pairs(int kind) { return kind == DOTS || kind == BYTE_DOTS; }
INLINE int dtype_of(int kind) { return kind == FULL ? FP32 : BF16; } /* of activations, biases and results */
INLINE int64_t weight_size(int kind) { return kind == FULL ? 4 : kind == WIDENED || kind == DOTS ? 2 : 1; }
INLINE int64_t panel_size(int kind) { return in_pairs(kind) ? 2 : 4; }

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

/* 32 members of a weight row as the lanes take them: two vectors of floats, or one of pairs. */
INLINE void weigh(const char *at, v16 *first, v16 *second, const int kind) {
    if (kind == FULL) *first = *(const v16 *)at, *second = *(const v16 *)(at + 64);
    if (kind == DOTS) *first = *(const v16 *)at;
    if (kind == WIDENED) {
        u32x16 pairs = pairs_at((const uint16_t *)at);
        *first = even(pairs), *second = odd(pairs);
    }
    if (kind == BYTES || kind == BYTE_DOTS) *first = bytes_at((const int8_t *)at), *second = bytes_at((const int8_t *)at + 16);
    if (kind == BYTE_DOTS) *first = (v16)narrow32(*first, *second);
}

/* C members, again for each of the 16/C rows. */
INLINE v16 for_each_row(const float *from, const int C) {
    float all[16] __attribute__((aligned(64)));
    for (int r = 0; r < 16 / C; r++) memcpy(all + r * C, from, sizeof(float) * C);
    return *(v16 *)all;
}

/* Lanes' sums of outputs n, n + 1, … of rows row, row + 1, …: [R, 16/R]. n < 0: there are none yet. */
typedef struct {
    v16 lanes[16];
    int64_t row, n;
} Sums;

/* The sums folded, to where they belong. */
INLINE void put(const Linear *linear, const Part *part, Sums *of, const int R, const int kind) {
    const int C = 16 / R, dtype = dtype_of(kind), size = dtype == FP32 ? 4 : 2;
    v16 sums = fold16(of->lanes, 0);
    if (part->scales) sums *= for_each_row(part->scales + of->n, C);
    if (part->bias) {
        float bias[16];
        for (int c = 0; c < C; c++) bias[c] = load1(part->bias, of->n + c, dtype);
        sums += for_each_row(bias, C);
    }
    u16x16 narrow = narrow16(sums);
    const char *from = dtype == FP32 ? (const char *)&sums : (const char *)&narrow;
    for (int r = 0; r < R && of->row + r < linear->rows; r++)
        memcpy((char *)part->out + ((of->row + r) * part->features + of->n) * size, from + r * C * size, size * C);
}

/* Sums [R, beside] go on over the members [from, to). */
INLINE void add_dots(const char *const *x, const char *weight, int64_t stride, int64_t from, int64_t to, v16 *sum, const int R,
                     const int beside, const int kind, const int stream, int64_t ahead) {
    const int pairs = in_pairs(kind);
    for (int64_t k = from; k < to; k += 32) {
        v16 low[8], high[8];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            low[r] = held16(*(const v16 *)(x[r] + k * (pairs ? 2 : 4)));
            if (!pairs) high[r] = held16(*(const v16 *)(x[r] + k * 4 + 64));
        }
#pragma GCC unroll 4
        for (int c = 0; c < beside; c++) {
            const char *at = weight + c * stride + k * weight_size(kind);
            if (stream) __builtin_prefetch(at + ahead, 0, 2);
            v16 first, second;
            weigh(at, &first, &second, kind);
            first = held16(first);
            if (!pairs) second = held16(second);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                v16 *here = sum + r * beside + c;
                *here = pairs ? dot16(*here, (u32x16)first, (u32x16)low[r]) : fma16(first, low[r], *here);
            }
#pragma GCC unroll 8
            for (int r = 0; r < R && !pairs; r++) sum[r * beside + c] = fma16(second, high[r], sum[r * beside + c]);
        }
    }
}

/* R rows of x, as `linear_ready` leaves them, against the 16/R weight rows from `weight` on. Where weights stream from
 * memory, what lies `ahead` bytes behind each is asked for. What the call before this one left in `sums` is put amid these
 * products: folding waits for itself, and they do not wait for it. `of`: the kind of the linear layer. */
INLINE void dots(const Linear *linear, const Part *part, const char *const *x, const char *weight, int64_t stride, int64_t row,
                 int64_t n, const int R, const int kind, const int of, const int stream, int64_t ahead, Sums *sums) {
    const int C = 16 / R, beside = C < BESIDE ? C : BESIDE;
    int64_t in = linear->in, middle = in / 64 * 32;
#pragma GCC unroll 16
    for (int begin = 0; begin < C; begin += beside) {
        const char *at = weight + begin * stride;
        v16 sum[16];
#pragma GCC unroll 16
        for (int i = 0; i < R * beside; i++) sum[i] = (v16){};
        add_dots(x, at, stride, 0, middle, sum, R, beside, kind, stream, ahead);
        if (begin == 0 && sums->n >= 0) put(linear, part, sums, R, of);
        add_dots(x, at, stride, middle, in, sum, R, beside, kind, stream, ahead);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < beside; c++) sums->lanes[r * C + begin + c] = sum[r * beside + c];
    }
    sums->row = row, sums->n = n;
}

/* Rows row, row + 1, …, the last one again where there are no more. */
INLINE void rows_at(const Linear *linear, const char *x, int64_t row, const char **rows, const int R, const int kind) {
    for (int r = 0; r < R; r++) rows[r] = x + least(row + r, linear->rows - 1) * linear->in * panel_size(kind);
}

/* --- few rows --------------------------------------------------------------------------------------------------------- */

INLINE void block_of(const Linear *linear, const Part *part, int64_t first, const char *x, const int R, const int kind) {
    int64_t stride = linear->in * weight_size(kind), most_rows = (linear->rows + R - 1) / R * R;
    Sums sums = {.n = -1};
    for (int64_t row = 0; row < linear->rows; row += R) {
        const char *rows[8];
        rows_at(linear, x, row, rows, R, kind);
        for (int64_t n = first; n < first + BLOCK; n += 16 / R) {
            /* Rows that come in several tiles share out the asking for the next block. */
            int64_t ahead = AHEAD, share = (n - first) * most_rows / BLOCK;
            if (most_rows > R) ahead = share >= row && share < row + R ? BLOCK * stride : 0;
            const char *weight = (const char *)part->weight + n * stride;
            dots(linear, part, rows, weight, stride, row, n, R, kind, kind, 1, ahead, &sums);
        }
    }
    put(linear, part, &sums, R, kind);
}

#define APART static __attribute__((noinline))
#define BLOCK_OF(kind) \
    APART void block_of_##kind(const Linear *linear, const Part *part, int64_t first, const char *x) { \
        int64_t rows = linear->rows; \
        if (rows == 1) block_of(linear, part, first, x, 1, kind); \
        else if (rows == 2) block_of(linear, part, first, x, 2, kind); \
        else if (rows <= 4) block_of(linear, part, first, x, 4, kind); \
        else block_of(linear, part, first, x, 8, kind); \
    }
BLOCK_OF(FULL)
BLOCK_OF(WIDENED)
BLOCK_OF(DOTS)
BLOCK_OF(BYTES)
BLOCK_OF(BYTE_DOTS)

int linear_is_wide(const Linear *linear) { return linear->kind == WIDENED || linear->kind == BYTES; }

/* In the order that the lanes take members of the weights in: of every 32 of bf16, the even ones before the odd ones. */
void linear_ready(const Linear *linear, const uint16_t *from, float *to) {
    int byte = linear->kind == BYTES;
    for (int64_t i = 0; i < linear->in && linear_is_wide(linear); i += 32) {
        *(v16 *)(to + i) = byte ? load16(from, i, BF16) : even(pairs_at(from + i));
        *(v16 *)(to + i + 16) = byte ? load16(from, i + 16, BF16) : odd(pairs_at(from + i));
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
        for (int64_t k = 0; k < in; k += 32) {
            v16 low, high;
            __builtin_prefetch(from + k * weight_size(kind) + AHEAD, 0, 2);
            weigh(from + k * weight_size(kind), &low, &high, kind);
            *(v16 *)(to + k * panel_size(kind)) = low;
            if (!in_pairs(kind)) *(v16 *)(to + k * 4 + 64) = high;
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

/* Rows [begin, end) of x against a panel of `count` ≥ 4 weight rows, as `kind` finds them there: FULL or DOTS. */
INLINE void tiles(const Linear *linear, const Part *part, int64_t first, int64_t count, const char *panel, const char *x,
                  int64_t begin, int64_t end, const int kind, const int of) {
    int64_t stride = linear->in * panel_size(kind);
    Sums sums = {.n = -1};
    for (int64_t row = begin; row < end; row += TILE) {
        const char *rows[TILE];
        rows_at(linear, x, row, rows, TILE, kind);
        for (int64_t n = 0; n < count; n += 16 / TILE) {
            int64_t at = least(n, count - 16 / TILE);
            dots(linear, part, rows, panel + at * stride, stride, row, first + at, TILE, kind, of, 0, 0, &sums);
        }
    }
    put(linear, part, &sums, TILE, of);
}
#define TILES(name, kind, of) \
    APART void name(const Linear *linear, const Part *part, int64_t first, int64_t count, const char *panel, \
                    const char *x, int64_t begin, int64_t end) { \
        tiles(linear, part, first, count, panel, x, begin, end, kind, of); \
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
