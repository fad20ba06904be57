/* One product of rows and weight rows, `dots`: what its lanes do, and where its sums go.
 *
 * There is one order. LANES lanes run along a weight row, over STEP of its members after the other, and are folded at the
 * end; so the weights are read where the checkpoint or torchao put them. One row or hundreds, streamed from memory or from a
 * panel in L2, a product is `dots`, and its result depends on neither the other rows nor the number of threads.
 *
 * What the lanes do is the product's *kind*. Of bf16, either pairs are multiplied by the processor's bf16 dot products, or
 * both sides are widened to fp32: the two round differently, so a deployment keeps to one of them. An int8 member is exact
 * in bf16 and in fp32, and its row's scale multiplies the finished sum. Results are rounded where torch's modules round.
 */
#include "linear.h"
#include "vectors.h"

#define OUTPUTS 16 /* sums that are folded together, of R rows and OUTPUTS/R weight rows: a multiple of LANES */
#define BESIDE 4   /* of them are streamed side by side: 16, and 1, were slower */
/* Where bf16 is widened to vectors of eight, 2 are, and the 2 that follow are asked for: the processor's own prefetching
 * then joins in, as it does not when weights are asked for from further on. fp32 and int8 were slower so. */
#define BY_TWOS(kind) (LANES == 8 && (kind) == WIDENED)
#define STEP (2 * LANES) /* members of a row that lanes take at once: two vectors of floats, or one of pairs */
#define FEW_REGISTERS (REGISTERS <= 16)
#define AHEAD 8192 /* bytes before its use that a weight is asked for */
#define HOLD_WEIGHTS (LANES == 8)
#if LANES == 8
#define TILE_SUMS 24
#define UNROLLED _Pragma("GCC unroll 1") /* all registers are taken: unrolled, some sums would be in memory */
#else
#define TILE_SUMS OUTPUTS
#define UNROLLED _Pragma("GCC unroll 8")
#endif

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
INLINE int num_beside(const int R, const int C, const int kind) {
    return C % 3 == 0 ? 3 : least(least(C, BY_TWOS(kind) ? 2 : BESIDE), REGISTERS / 2 / R);
}

/* Lanes' sums of R rows and num_beside(R, C, kind) weight rows, over all members, to lanes [R, C]. */
INLINE void sum_all(const char *const *x, const char *weight, int64_t stride, int64_t in, int64_t ahead, vfloat *lanes,
                    const int R, const int C, const int kind, const int stream) {
    const int beside = num_beside(R, C, kind);
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
    const int beside = num_beside(R, C, kind);
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
