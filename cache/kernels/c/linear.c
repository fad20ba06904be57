/* Products of bf16 activations and weights, bf16 as they lie in the checkpoint or int8 with a scale a row, fp32 arithmetic,
 * and what stands between them in a layer: RMS norm and SiLU gate. Every result is rounded to bf16 where torch's modules
 * round it. An int8 member is exact in fp32, and its row's scale multiplies the finished sum.
 *
 * Few rows are bound by reading the weights: they are streamed once, 32 members of a weight row at a time. Many rows are
 * bound by arithmetic: a panel of 48 weight rows is widened and transposed into L2, and tiles of 8 rows run over it. An
 * output is summed in an order that depends on neither the other rows nor the number of threads.
 */
#include <stddef.h>

#include "parts.h"
#include "vectors.h"

#define BLOCK 16 /* weight rows of a unit of work of few rows */
#define BESIDE 4  /* of them are streamed side by side: 16, and 1, were slower */
#define AHEAD 4096 /* bytes before its use that a weight is asked for */
#define PANEL 48
#define TILE 8
#define LEAST_ROWS 128 /* of many rows, a unit of work */

int omp_get_thread_num(void);

INLINE u32x16 pairs_at(const uint16_t *from) { return *(const u32x16 *)from; }
INLINE v16 even(u32x16 pairs) { return (v16)(pairs << 16); }
INLINE v16 odd(u32x16 pairs) { return (v16)(pairs & 0xffff0000u); }
INLINE v16 bytes_at(const int8_t *from) {
#ifdef __AVX512F__
    i32x16 wide = (i32x16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#else
    i32x16 wide = __builtin_convertvector(__builtin_convertvector(*(const i8x16 *)from, i16x16), i32x16);
#endif
    return __builtin_convertvector(wide, v16);
}

/* To the nearest bf16, ties to even. */
INLINE u16x16 narrow16(v16 x) {
    u32x16 bits = (u32x16)x, nan = (u32x16)(x != x);
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), u16x16);
}
INLINE v16 widen16(u16x16 x) { return (v16)(__builtin_convertvector(x, u32x16) << 16); }
INLINE v16 round16(v16 x) { return widen16(narrow16(x)); }
INLINE float widen(uint16_t x) { return load1(&x, 0, BF16); }

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

/* x [R, in] as `linear_widen` leaves it, against weight rows n, n + 1, … of 16/R: sums [R, 16/R]. */
INLINE v16 dots(const float *x, const Part *part, int64_t n, int64_t in, const int R, const int int8) {
    const int C = 16 / R, beside = C < BESIDE ? C : BESIDE;
    v16 all[16];
#pragma GCC unroll 16
    for (int begin = 0; begin < C; begin += beside) {
        v16 sum[16];
#pragma GCC unroll 16
        for (int i = 0; i < R * beside; i++) sum[i] = (v16){};
        for (int64_t k = 0; k < in; k += 32) {
            v16 low[8], high[8];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                low[r] = *(const v16 *)(x + r * in + k);
                high[r] = *(const v16 *)(x + r * in + k + 16);
            }
#pragma GCC unroll 4
            for (int c = 0; c < beside; c++) {
                const char *at = (const char *)part->weight + ((n + begin + c) * in + k) * (int8 ? 1 : 2);
                __builtin_prefetch(at + AHEAD);
                v16 first, second;
                if (int8) {
                    first = bytes_at((const int8_t *)at), second = bytes_at((const int8_t *)at + 16);
                } else {
                    u32x16 pairs = pairs_at((const uint16_t *)at);
                    first = even(pairs), second = odd(pairs);
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) sum[r * beside + c] += first * low[r];
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) sum[r * beside + c] += second * high[r];
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < beside; c++) all[r * C + begin + c] = sum[r * beside + c];
    }
    return fold16(all, 0);
}

INLINE void rows_of(const Linear *linear, const Part *part, int64_t first, const float *x, const int R, const int int8) {
    const int C = 16 / R;
    for (int64_t row = 0; row < linear->rows; row += R)
        for (int64_t n = first; n < first + BLOCK; n += C) {
            v16 sums = dots(x + row * linear->in, part, n, linear->in, R, int8);
            for (int c = 0; c < C && int8; c++)
                for (int r = 0; r < R; r++) sums[r * C + c] *= part->scales[n + c];
            for (int c = 0; c < C && part->bias; c++)
                for (int r = 0; r < R; r++) sums[r * C + c] += widen(part->bias[n + c]);
            u16x16 out = narrow16(sums);
            for (int r = 0; r < R && row + r < linear->rows; r++)
                memcpy(part->out + (row + r) * part->features + n, (uint16_t *)&out + r * C, sizeof(uint16_t) * C);
        }
}

INLINE void block_of(const Linear *linear, const Part *part, int64_t first, const float *x, const int R) {
    if (part->scales) rows_of(linear, part, first, x, R, 1);
    else rows_of(linear, part, first, x, R, 0);
}

INLINE int64_t rows_together(int64_t rows) { return rows > 4 ? 8 : rows > 2 ? 4 : rows; }

/* In the order that `dots` takes members of the weights in: of every 32, for bf16, the even ones before the odd ones. */
void linear_widen(const Linear *linear, const uint16_t *from, float *to) {
    int int8 = linear->parts->scales != 0;
    for (int64_t i = 0; i < linear->in; i += 32) {
        *(v16 *)(to + i) = int8 ? load16(from, i, BF16) : even(pairs_at(from + i));
        *(v16 *)(to + i + 16) = int8 ? load16(from, i + 16, BF16) : odd(pairs_at(from + i));
    }
}

void linear_few(const Linear *linear, const float *x) {
    int64_t units = num_units(linear, BLOCK), together = rows_together(linear->rows);
#pragma omp for schedule(guided, 2) /* long stretches of weights, and short ones to end together */
    for (int64_t unit = 0; unit < units; unit++) {
        int64_t number = unit;
        const Part *part = part_of(linear, BLOCK, &number);
        /* The last block starts early where features are no multiple of it: some are worked out twice. */
        int64_t first = number * BLOCK + BLOCK <= part->features ? number * BLOCK : part->features - BLOCK;
        switch (together) {
            case 1: block_of(linear, part, first, x, 1); break;
            case 2: block_of(linear, part, first, x, 2); break;
            case 4: block_of(linear, part, first, x, 4); break;
            default: block_of(linear, part, first, x, 8);
        }
    }
}

static void few(const Linear *linear, float *x) {
    int64_t in = linear->in, rows = linear->rows, together = rows_together(rows);
    for (int64_t row = 0; row < rows; row++) linear_widen(linear, linear->x + row * in, x + row * in);
    memset(x + rows * in, 0, sizeof(float) * ((rows + together - 1) / together * together - rows) * in);
#pragma omp parallel num_threads(linear->threads)
    linear_few(linear, x);
}

/* --- many rows -------------------------------------------------------------------------------------------------------- */

/* 32 members of a weight row as pairs: bf16, or int8 whose sign reaches across the pair. */
INLINE u32x16 weight_pairs(const Part *part, int64_t at, const int int8) {
    if (int8) return (u32x16)__builtin_convertvector(*(const i16x16 *)((const int8_t *)part->weight + at), i32x16);
    return pairs_at((const uint16_t *)part->weight + at);
}
INLINE v16 even_of(u32x16 pairs, const int int8) {
    return int8 ? __builtin_convertvector((i32x16)(pairs << 24) >> 24, v16) : even(pairs);
}
INLINE v16 odd_of(u32x16 pairs, const int int8) {
    return int8 ? __builtin_convertvector((i32x16)pairs >> 8, v16) : odd(pairs);
}

/* Weight rows [first, first + 48) to panel [in, 48], fp32, without scales; zeros past the last. */
INLINE void pack_kind(const Part *part, int64_t first, int64_t in, float *panel, const int int8) {
    for (int64_t n = 0; n < PANEL; n += 16)
        for (int64_t k = 0; k < in; k += 32) {
            v16 pairs[16];
            for (int c = 0; c < 16; c++) {
                int64_t at = first + n + c;
                pairs[c] = at < part->features ? (v16)weight_pairs(part, at * in + k, int8) : (v16){};
            }
            transpose16(pairs);
            for (int i = 0; i < 16; i++) {
                *(v16 *)(panel + (k + 2 * i) * PANEL + n) = even_of((u32x16)pairs[i], int8);
                *(v16 *)(panel + (k + 2 * i + 1) * PANEL + n) = odd_of((u32x16)pairs[i], int8);
            }
        }
}

static void pack(const Part *part, int64_t first, int64_t in, float *panel) {
    if (part->scales) pack_kind(part, first, in, panel, 1);
    else pack_kind(part, first, in, panel, 0);
}

/* x [8, in] against a panel; `count` columns and `rows` rows of the result are written. */
static void tile(const float *x, const float *panel, int64_t in, const Part *part, int64_t first, int64_t row,
                 int64_t rows) {
    v16 sum[TILE][PANEL / 16];
#pragma GCC unroll 8
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 3
        for (int v = 0; v < PANEL / 16; v++) sum[r][v] = (v16){};
    for (int64_t k = 0; k < in; k++) {
        const v16 *at = (const v16 *)(panel + k * PANEL);
        v16 a = at[0], b = at[1], c = at[2];
        for (int v = 0; v < PANEL / 16; v++) __builtin_prefetch(at + v + 16 * PANEL / 16);
#pragma GCC unroll 8
        for (int r = 0; r < TILE; r++) {
            float value = x[r * in + k];
            sum[r][0] += a * value;
            sum[r][1] += b * value;
            sum[r][2] += c * value;
        }
    }
    for (int v = 0; v < PANEL / 16; v++) {
        int64_t n = first + 16 * v, count = part->features - n < 16 ? part->features - n : 16;
        v16 bias = {}, scale = (v16){} + 1.0f;
        for (int64_t c = 0; c < count && part->bias; c++) bias[c] = widen(part->bias[n + c]);
        for (int64_t c = 0; c < count && part->scales; c++) scale[c] = part->scales[n + c];
        for (int64_t r = 0; r < rows && count > 0; r++) {
            u16x16 out = narrow16(sum[r][v] * scale + bias);
            memcpy(part->out + (row + r) * part->features + n, &out, sizeof(uint16_t) * count);
        }
    }
}

static void many(const Linear *linear, float *scratch) {
    int64_t in = linear->in, rows = linear->rows, padded = (rows + TILE - 1) / TILE * TILE;
    int64_t panels = num_units(linear, PANEL), cuts = 4 * linear->threads / panels + 1;
    int64_t most = (rows + LEAST_ROWS - 1) / LEAST_ROWS;
    cuts = cuts < most ? cuts : most;
    int64_t step = (padded / TILE + cuts - 1) / cuts * TILE;
    float *x = scratch, *panel = scratch + padded * in;
#pragma omp parallel num_threads(linear->threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * in; i += 16) *(v16 *)(x + i) = load16(linear->x, i, BF16);
#pragma omp for schedule(static)
        for (int64_t i = rows * in; i < padded * in; i += 16) *(v16 *)(x + i) = (v16){};
        float *mine = panel + omp_get_thread_num() * PANEL * in;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < panels * cuts; unit++) {
            int64_t number = unit / cuts, begin = unit % cuts * step, end = begin + step < rows ? begin + step : rows;
            const Part *part = part_of(linear, PANEL, &number);
            if (begin < end) pack(part, number * PANEL, in, mine);
            for (int64_t row = begin; row < end; row += TILE)
                tile(x + row * in, mine, in, part, number * PANEL, row, end - row < TILE ? end - row : TILE);
        }
    }
}

/* Floats of scratch that `prerope_linear` wants for this many rows. */
int64_t prerope_linear_scratch(int64_t rows, int64_t in, int64_t threads, int64_t few_rows) {
    int64_t padded = (rows + TILE - 1) / TILE * TILE * in;
    return rows <= few_rows ? padded : padded + threads * PANEL * in;
}

/* in: a multiple of 32; features: at least 16. */
void prerope_linear(const Linear *linear, int64_t few_rows, float *scratch) {
    if (linear->rows == 0) return; /* lm_head in a step that only reads */
    if (linear->rows <= few_rows) few(linear, scratch);
    else many(linear, scratch);
}

/* --- between products ------------------------------------------------------------------------------------------------- */

/* gate, up [n] → gate: silu(gate)·up, each rounded. n: a multiple of 16. */
void silu_mul(uint16_t *gate, const uint16_t *up, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        v16 x = load16(gate, i, BF16), small = larger(x, -x);
        v16 e = exp_neg16(-small); /* of −|x|, so that nothing overflows */
        i32x16 negative = x < 0.0f;
        v16 top = (v16)((negative & (i32x16)e) | (~negative & (i32x16)((v16){} + 1.0f)));
        *(u16x16 *)(gate + i) = narrow16(round16(x * top / (1.0f + e)) * load16(up, i, BF16));
    }
}

/* x [n] → out: x/√(mean x² + eps), rounded, times weight, rounded; with `add_one` times 1 + weight, rounded once. */
void rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *out, int64_t n, float eps, int64_t add_one) {
    v16 sum = {};
    for (int64_t i = 0; i < n; i += 16) {
        v16 value = load16(x, i, BF16);
        sum += value * value;
    }
    float total = 0.0f;
    for (int lane = 0; lane < 16; lane++) total += sum[lane];
    float factor = 1.0f / sqrtf(total / n + eps);
    for (int64_t i = 0; i < n; i += 16) {
        v16 value = load16(x, i, BF16) * factor, w = load16(weight, i, BF16);
        value = add_one ? value * (1.0f + w) : round16(value) * w;
        *(u16x16 *)(out + i) = narrow16(value);
    }
}

/* n: a multiple of 16, as below. */
void add_rows(uint16_t *to, const uint16_t *from, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) *(u16x16 *)(to + i) = narrow16(load16(to, i, BF16) + load16(from, i, BF16));
}

void narrow_row(const float *from, uint16_t *to, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) *(u16x16 *)(to + i) = narrow16(*(const v16 *)(from + i));
}

/* x, out: [rows, n] */
void prerope_rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *out, int64_t rows, int64_t n, float eps,
                      int64_t add_one) {
#pragma omp parallel for schedule(static) if (rows * n > 65536)
    for (int64_t row = 0; row < rows; row++) rms_norm(x + row * n, weight, out + row * n, n, eps, add_one);
}

/* x → second(silu(gate x)·(up x)), where gate and up are the parts of `first` and second->x is where gate's result is. */
void prerope_gated(const Linear *first, const Linear *second, int64_t few_rows, float *scratch) {
    prerope_linear(first, few_rows, scratch);
    int64_t rows = first->rows, n = first->parts[0].features;
#pragma omp parallel for schedule(static) if (rows * n > 65536)
    for (int64_t row = 0; row < rows; row++) silu_mul(first->parts[0].out + row * n, first->parts[1].out + row * n, n);
    prerope_linear(second, few_rows, scratch);
}
