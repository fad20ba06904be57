/* Products of activations and weights.
 *
 * There is one order. LANES lanes run along a weight row, over STEP of its members after the other, and are folded at the end; so the weights
 * are read where the checkpoint or torchao put them. One row or hundreds, streamed from memory or from a
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

#define OUTPUTS 16 /* sums that are folded together, of R rows and OUTPUTS/R weight rows: a multiple of LANES */
#define BLOCK 16   /* weight rows of a unit of work of few rows */
#define BESIDE 4   /* of them are streamed side by side: 16, and 1, were slower */
#define STEP (2 * LANES) /* members of a row that lanes take at once: two vectors of floats, or one of pairs */
#define FEW_REGISTERS (REGISTERS <= 16)
#define AHEAD 8192 /* bytes before its use that a weight is asked for */
#define TILE 4 /* rows of many that run over a panel together */
#define HOLD_WEIGHTS (LANES == 8)
#if LANES == 8
#define PANEL 24 /* weight rows of a unit of work of many rows */
#define TILE_SUMS 24
#define UNROLLED _Pragma("GCC unroll 1") /* all registers are taken: unrolled, some sums would be in memory */
#else
#define PANEL 32
#define TILE_SUMS OUTPUTS
#define UNROLLED _Pragma("GCC unroll 8")
#endif
#define LEAST_ROWS 64 /* of many rows, a unit of work */
int omp_get_thread_num(void);

INLINE vfloat bytes_at(const int8_t *from) {
#if defined(__AVX512F__)
    vint wide = (vint)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__)
    vint wide = (vint)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    vint wide = __builtin_convertvector(__builtin_convertvector(*(const vbyte *)from, vshort), vint);
#endif
    return __builtin_convertvector(wide, vfloat);
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

/* STEP members of a weight row as the lanes take them: a vector of pairs, or the first or second one of floats. */
INLINE vfloat weights_at(const char *at, const int second, const int kind) {
    const int8_t *bytes = (const int8_t *)at;
    switch (kind) {
        case FULL: return *(const vfloat *)(at + second * 4 * LANES);
        case WIDENED: return second ? odd(pairs_at((const uint16_t *)at)) : even(pairs_at((const uint16_t *)at));
        case DOTS: return *(const vfloat *)at;
        case BYTES: return bytes_at(bytes + second * LANES);
        default: return (vfloat)narrow_both(bytes_at(bytes), bytes_at(bytes + LANES));
    }
}

/* Lanes' sums of outputs n, n + 1, … of rows row, row + 1, …: [R, C]. n < 0: there are none yet. */
typedef struct {
    vfloat lanes[TILE_SUMS];
    int64_t row, n;
} Sums;

/* C members, again for each of R rows. */
INLINE void for_each_row(const float *from, float *to, const int R, const int C) {
    for (int r = 0; r < R; r++) memcpy(to + r * C, from, sizeof(float) * C);
}

/* The sums folded, to where they belong. */
INLINE void put(const Linear *linear, const Part *part, Sums *of, const int R, const int C, const int kind) {
    const int dtype = dtype_of(kind), size = dtype == FP32 ? 4 : 2;
    float scales[TILE_SUMS], biases[TILE_SUMS], wide[TILE_SUMS];
    uint16_t halves[TILE_SUMS];
    if (part->scales) for_each_row(part->scales + of->n, scales, R, C);
    if (part->bias) {
        float bias[TILE_SUMS];
        for (int c = 0; c < C; c++) bias[c] = load1(part->bias, of->n + c, dtype);
        for_each_row(bias, biases, R, C);
    }
#pragma GCC unroll 4
    for (int i = 0; i < R * C; i += LANES) {
        vfloat sums = fold_all(of->lanes + i, 0);
        if (part->scales) sums *= *(vfloat *)(scales + i);
        if (part->bias) sums += *(vfloat *)(biases + i);
        if (dtype == FP32) *(vfloat *)(wide + i) = sums;
        else *(vhalf *)(halves + i) = narrow(sums);
    }
    const char *from = dtype == FP32 ? (const char *)wide : (const char *)halves;
    for (int r = 0; r < R && of->row + r < linear->rows; r++)
        memcpy((char *)part->out + ((of->row + r) * part->features + of->n) * size, from + r * C * size, size * C);
}

/* A vector of a row as the weights' lanes want it, the first or second of those that STEP members from k on are. */
INLINE vfloat row_at(const char *x, int64_t k, const int second, const int pairs) {
    return *(const vfloat *)(x + k * (pairs ? 2 : 4) + second * 4 * LANES);
}

INLINE vfloat add(vfloat sum, vfloat weights, vfloat row, const int pairs) {
    return pairs ? dot_pairs(sum, (vuint)weights, (vuint)row) : vfma(weights, row, sum);
}

/* Sums [R, beside] go on over a vector of the rows and weights. Either the weights are held and rows come one at a
 * time, or the other way round. */
INLINE void add_vector(const char *const *x, const char *weight, int64_t stride, int64_t k, const int second, vfloat *sum,
                       const int R, const int beside, const int kind) {
    const int pairs = in_pairs(kind);
    vfloat here[8];
#pragma GCC unroll 8
    for (int i = 0; i < (HOLD_WEIGHTS ? beside : R); i++) {
        here[i] = HOLD_WEIGHTS ? weights_at(weight + i * stride + k * weight_size(kind), second, kind)
                                : row_at(x[i], k, second, pairs);
        if (HOLD_WEIGHTS || beside > 1) here[i] = held(here[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < (HOLD_WEIGHTS ? R : beside); i++) {
        vfloat next = HOLD_WEIGHTS ? row_at(x[i], k, second, pairs)
                                    : weights_at(weight + i * stride + k * weight_size(kind), second, kind);
        if (!HOLD_WEIGHTS || beside > 1) next = held(next);
#pragma GCC unroll 8
        for (int j = 0; j < (HOLD_WEIGHTS ? beside : R); j++) {
            if (HOLD_WEIGHTS) sum[i * beside + j] = add(sum[i * beside + j], here[j], next, pairs);
            else sum[j * beside + i] = add(sum[j * beside + i], next, here[j], pairs);
        }
    }
}

/* The same over the members [from, to). */
INLINE void add_dots(const char *const *x, const char *weight, int64_t stride, int64_t from, int64_t to, vfloat *sum,
                     const int R, const int beside, const int kind, const int stream, int64_t ahead) {
    for (int64_t k = from; k < to; k += 32) {
#pragma GCC unroll 4
        for (int c = 0; c < beside && stream; c++)
            __builtin_prefetch(weight + (k * beside + c * 32) * weight_size(kind) + ahead, 0, 2);
        UNROLLED
        for (int at = 0; at < 32; at += kind == FULL ? LANES : STEP) {
            add_vector(x, weight, stride, k + at, 0, sum, R, beside, kind);
            if (kind == WIDENED || kind == BYTES) add_vector(x, weight, stride, k + at, 1, sum, R, beside, kind);
        }
    }
}

/* How many of C weight rows run side by side: as many sums as leave registers for what is multiplied. */
INLINE int num_beside(const int R, const int C) {
    return C % 3 == 0 ? 3 : least(least(C, BESIDE), REGISTERS / 2 / R);
}

/* Lanes' sums of R rows and num_beside(R, C) weight rows, over all members, to lanes [R, C]. */
INLINE void sum_all(const char *const *x, const char *weight, int64_t stride, int64_t in, int64_t ahead, vfloat *lanes,
                    const int R, const int C, const int kind, const int stream) {
    const int beside = num_beside(R, C);
    vfloat sum[OUTPUTS] = {};
    add_dots(x, weight, stride, 0, in, sum, R, beside, kind, stream, ahead);
#pragma GCC unroll 16
    for (int i = 0; i < R * beside; i++) lanes[i / beside * C + i % beside] = sum[i];
}

/* With few registers compilers only keep sums in them in a function of their own. */
typedef void SumAll(const char *const *x, const char *weight, int64_t stride, int64_t in, int64_t ahead, vfloat *lanes);
#define APART static __attribute__((noinline))
#define SUM_ALL(name, R, C, kind, stream) \
    APART void name(const char *const *x, const char *weight, int64_t stride, int64_t in, int64_t ahead, vfloat *lanes) { \
        sum_all(x, weight, stride, in, ahead, lanes, R, C, kind, stream); \
    }

/* R rows of x, as `linear_ready` leaves them, against the C weight rows from `weight` on. Where weights stream from
 * memory, what lies `ahead` bytes behind each is asked for. What the call before this one left in `sums` is put first, or, if
 * there are registers for it, amid these products: folding waits for itself, and they do not wait for it. `of`: the kind of
 * the linear layer. apart: `sum_all` with few registers; not called with many. */
INLINE void dots(const Linear *linear, const Part *part, const char *const *x, const char *weight, int64_t stride, int64_t row,
                 int64_t n, const int R, const int C, const int kind, const int of, const int stream, int64_t ahead,
                 SumAll *apart, Sums *sums) {
    const int beside = num_beside(R, C);
    int64_t in = linear->in, middle = in / 64 * 32;
    if (FEW_REGISTERS) {
        if (sums->n >= 0) put(linear, part, sums, R, C, of);
        for (int begin = 0; begin < C; begin += beside) apart(x, weight + begin * stride, stride, in, ahead, sums->lanes + begin);
    }
#pragma GCC unroll 16
    for (int begin = 0; begin < C && !FEW_REGISTERS; begin += beside) {
        const char *at = weight + begin * stride;
        vfloat sum[OUTPUTS];
#pragma GCC unroll 16
        for (int i = 0; i < R * beside; i++) sum[i] = (vfloat){};
        add_dots(x, at, stride, 0, middle, sum, R, beside, kind, stream, ahead);
        if (begin == 0 && sums->n >= 0) put(linear, part, sums, R, C, of);
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

INLINE void block_of(const Linear *linear, const Part *part, int64_t first, const char *x, const int R, const int kind,
                     SumAll *apart) {
    int64_t stride = linear->in * weight_size(kind), most_rows = (linear->rows + R - 1) / R * R;
    Sums sums = {.n = -1};
    for (int64_t row = 0; row < linear->rows; row += R) {
        const char *rows[8];
        rows_at(linear, x, row, rows, R, kind);
        for (int64_t n = first; n < first + BLOCK; n += OUTPUTS / R) {
            /* Rows that come in several tiles share out the asking for the next block. */
            int64_t ahead = AHEAD, share = (n - first) * most_rows / BLOCK;
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
