/* What the kernels share: vectors as wide as the processor's registers, dot products of bf16 pairs, exp, and heads as they
 * lie in the cache.
 *
 * A vector wider than a register is no choice: compilers take it apart into single floats. A row's result may not depend on
 * which kernel it meets, so the source says where everything is rounded: the library is built without -ffast-math and
 * without contraction, and a multiplication that is to be one with an addition is `vfma`.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

#include "dtypes.h"

#define MAX_DIM 256
#define INLINE static inline __attribute__((always_inline))
#define LOWEST (-1e30f)
#define LOG2_E 1.44269504f

/* Floats of a vector: sizes elsewhere are multiples of 16, and so of this. And how many vectors the processor holds. */
#if defined(__AVX512F__)
#define LANES 16
#define REGISTERS 32
#elif defined(__AVX2__)
#define LANES 8
#define REGISTERS 16
#else
#define LANES 4
#ifdef __ARM_NEON
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
#endif

typedef float vfloat __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* words lie where floats did */
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef int16_t vshort __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int8_t vbyte __attribute__((vector_size(LANES), aligned(1)));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE vfloat larger(vfloat a, vfloat b) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
    vint above = a > b;
    return (vfloat)((above & (vint)a) | (~above & (vint)b));
#endif
}

/* a·b + c, rounded once where the processor can. */
INLINE vfloat vfma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* x in a register: compilers otherwise load it again for every use, and loads are what such a loop waits for. */
INLINE vfloat held(vfloat x) {
#if defined(__AVX512F__)
    __m512 in = (__m512)x;
    __asm__("" : "+v"(in));
    return (vfloat)in;
#elif defined(__AVX2__)
    __m256 in = (__m256)x;
    __asm__("" : "+x"(in));
    return (vfloat)in;
#else
    return x;
#endif
}

/* Not {} + x: that is an addition to be waited for, since it makes 0 of −0. */
INLINE vfloat splat(float x) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (vfloat)_mm256_set1_ps(x);
#else
    return (vfloat){x, x, x, x};
#endif
}

/* 0, 1, 2, … */
INLINE vint lane_numbers(void) {
    vint lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane;
}

/* 2^x for x <= 0, to about 2 ulp and never below 2^-125: a power of two times a polynomial of what is left of x. */
INLINE vfloat exp2_neg(vfloat x) {
    x = larger(x, splat(-125.0f));
    vint whole = __builtin_convertvector(x - 0.5f, vint); /* towards zero: the nearest, for x <= 0 */
    vfloat r = x - __builtin_convertvector(whole, vfloat), p = vfma(splat(1.34004322e-3f), r, splat(9.67603710e-3f));
    p = vfma(p, r, splat(5.55032721e-2f));
    p = vfma(p, r, splat(2.40221074e-1f));
    p = vfma(p, r, splat(6.93147207e-1f));
    p = vfma(p, r, splat(1.0f));
    return (vfloat)((vint)p + (whole << 23));
}

INLINE vfloat exp_neg(vfloat x) { return exp2_neg(x * LOG2_E); }

/* Butterflies of shuffles. KEEP_n of (a, b) has a's first n lanes of every 2n and then b's; KEEP_n + n has the others. */
#if LANES == 16
#define KEEP_1 ((vint){0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30})
#define KEEP_2 ((vint){0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29})
#define KEEP_4 ((vint){0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27})
#define KEEP_8 ((vint){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23})
#define UPWARDS(DO) DO(1, KEEP_1) DO(2, KEEP_2) DO(4, KEEP_4) DO(8, KEEP_8)
#define DOWNWARDS(DO) DO(8, KEEP_8) DO(4, KEEP_4) DO(2, KEEP_2) DO(1, KEEP_1)
#elif LANES == 8
#define KEEP_1 ((vint){0, 8, 2, 10, 4, 12, 6, 14})
#define KEEP_2 ((vint){0, 1, 8, 9, 4, 5, 12, 13})
#define KEEP_4 ((vint){0, 1, 2, 3, 8, 9, 10, 11})
#define UPWARDS(DO) DO(1, KEEP_1) DO(2, KEEP_2) DO(4, KEEP_4)
#define DOWNWARDS(DO) DO(4, KEEP_4) DO(2, KEEP_2) DO(1, KEEP_1)
#else
#define KEEP_1 ((vint){0, 4, 2, 6})
#define KEEP_2 ((vint){0, 1, 4, 5})
#define UPWARDS(DO) DO(1, KEEP_1) DO(2, KEEP_2)
#define DOWNWARDS(DO) DO(2, KEEP_2) DO(1, KEEP_1)
#endif

INLINE vfloat fold(vfloat a, vfloat b, const int largest) { return largest ? larger(a, b) : a + b; }

/* The sums (or the largest members) of LANES vectors, as one vector: instead of as many horizontal sums. */
INLINE vfloat fold_all(vfloat *p, const int largest) {
#define FOLD(n, KEEP) \
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i += 2 * n) \
        p[i] = fold(__builtin_shuffle(p[i], p[i + n], KEEP), __builtin_shuffle(p[i], p[i + n], KEEP + n), largest);
    UPWARDS(FOLD)
#undef FOLD
    return p[0];
}

/* LANES vectors as a square. */
INLINE void transpose(vfloat *p) {
#define SWAP(n, KEEP) \
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) if (!(i & n)) { \
        vfloat a = p[i], b = p[i + n]; \
        p[i] = __builtin_shuffle(a, b, KEEP); \
        p[i + n] = __builtin_shuffle(a, b, KEEP + n); \
    }
    DOWNWARDS(SWAP)
#undef SWAP
}

/* --- bf16 ------------------------------------------------------------------------------------------------------------- */

/* 2·LANES bf16 as words: the even member of a pair in the low half. */
INLINE vuint pairs_at(const uint16_t *from) { return *(const vuint *)from; }
INLINE vfloat even(vuint pairs) { return (vfloat)(pairs << 16); }
INLINE vfloat odd(vuint pairs) { return (vfloat)(pairs & 0xffff0000u); }

/* To the nearest bf16, ties to even. */
INLINE vhalf narrow(vfloat x) {
    vuint bits = (vuint)x, nan = (vuint)(x != x);
    vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = (nan & 0x7fc0) | (~nan & rounded);
#ifdef __AVX512F__
    return (vhalf)_mm512_cvtepi32_epi16((__m512i)rounded);
#else
    return __builtin_convertvector(rounded, vhalf);
#endif
}

/* Compilers take four instructions for what is one. */
INLINE vuint to_words(vhalf x) {
#if defined(__AVX512F__)
    return (vuint)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
    return (vuint)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, vuint);
#endif
}
INLINE vfloat widened(vhalf x) { return (vfloat)(to_words(x) << 16); }
INLINE vfloat rounded(vfloat x) { return widened(narrow(x)); }

/* Both narrowed, one after the other: words of neighbours. */
INLINE vuint narrow_both(vfloat low, vfloat high) {
#ifdef __AVX512BF16__
    return (vuint)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
    union {
        vhalf halves[2];
        vuint words;
    } both = {{narrow(low), narrow(high)}};
    return both.words;
#endif
}

/* sum + a·b over the pairs of each lane: by the processor's own instruction, which rounds in a way of its own. */
#if defined(__AVX512BF16__)
#define HAS_DOTS 1
INLINE vfloat dot_pairs(vfloat sum, vuint a, vuint b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAS_DOTS 1
INLINE vfloat dot_pairs(vfloat sum, vuint a, vuint b) {
    return (vfloat)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
#else
#define HAS_DOTS 0
INLINE vfloat dot_pairs(vfloat sum, vuint a, vuint b) { return vfma(odd(a), odd(b), vfma(even(a), even(b), sum)); }
#endif

/* --- fp16: the processor's own conversions on x86, since GCC 11 has no _Float16 ----------------------------------------- */

#if defined(__F16C__)
#define HAS_FP16 1
INLINE float from_fp16(uint16_t bits) { return _cvtsh_ss(bits); }
INLINE uint16_t to_fp16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__FLT16_MAX__)
#define HAS_FP16 1
INLINE float from_fp16(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return (float)value;
}
INLINE uint16_t to_fp16(float value) {
    _Float16 half = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
#else /* never asked for: see capabilities.c */
#define HAS_FP16 0
INLINE float from_fp16(uint16_t bits) { return (void)bits, NAN; }
INLINE uint16_t to_fp16(float value) { return (void)value, 0; }
#endif

INLINE vfloat widened_fp16(vhalf halves) {
#if defined(__F16C__) && LANES == 16
    return (vfloat)_mm512_cvtph_ps((__m256i)halves);
#elif defined(__F16C__) && LANES == 8
    return (vfloat)_mm256_cvtph_ps((__m128i)halves);
#else
    vfloat value;
    for (int lane = 0; lane < LANES; lane++) value[lane] = from_fp16(halves[lane]);
    return value;
#endif
}

INLINE vhalf narrow_fp16(vfloat value) {
#if defined(__F16C__) && LANES == 16
    return (vhalf)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && LANES == 8
    return (vhalf)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
    vhalf halves;
    for (int lane = 0; lane < LANES; lane++) halves[lane] = to_fp16(value[lane]);
    return halves;
#endif
}

/* --- heads in the cache ----------------------------------------------------------------------------------------------- */

INLINE float load1(const void *base, int64_t at, int dtype) {
    if (dtype == FP32) return ((const float *)base)[at];
    if (dtype == BF16) {
        uint32_t bits = (uint32_t)((const uint16_t *)base)[at] << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    return from_fp16(((const uint16_t *)base)[at]);
}

INLINE void store1(void *base, int64_t at, float value, int dtype) {
    if (dtype == FP32) ((float *)base)[at] = value;
    else if (dtype == BF16) ((uint16_t *)base)[at] = narrow(splat(value))[0];
    else ((uint16_t *)base)[at] = to_fp16(value);
}

/* LANES members of a head. */
INLINE vfloat load(const void *base, int64_t at, int dtype) {
    if (dtype == FP32) return *(const vfloat *)((const float *)base + at);
    if (dtype == BF16) return widened(*(const vhalf *)((const uint16_t *)base + at));
    return widened_fp16(*(const vhalf *)((const uint16_t *)base + at));
}

INLINE void store(void *base, int64_t at, vfloat value, int dtype) {
    if (dtype == FP32) *(vfloat *)((float *)base + at) = value;
    else if (dtype == BF16) *(vhalf *)((uint16_t *)base + at) = narrow(value);
    else *(vhalf *)((uint16_t *)base + at) = narrow_fp16(value);
}

/* Split a head into the first and second members of its pairs, then what does not rotate. */
INLINE void unpair(const void *from, int64_t at, float *to, int dim, int rotary, int interleaved, int dtype) {
    int d = 0;
    if (interleaved)
        for (; d < rotary; d++) to[d / 2 + d % 2 * (rotary / 2)] = load1(from, at + d, dtype);
    for (; d + LANES <= dim; d += LANES) *(vfloat *)(to + d) = load(from, at + d, dtype);
    for (; d < dim; d++) to[d] = load1(from, at + d, dtype);
}

/* Turn an unpaired head by an angle a pair. */
INLINE void turn(const float *from, float *to, const float *cos, const float *sin, int dim, int rotary) {
    int half = rotary / 2, m = 0;
    for (; m + LANES <= half; m += LANES) {
        vfloat a = *(const vfloat *)(from + m), b = *(const vfloat *)(from + half + m);
        vfloat c = *(const vfloat *)(cos + m), s = *(const vfloat *)(sin + m);
        *(vfloat *)(to + m) = vfma(-b, s, a * c);
        *(vfloat *)(to + half + m) = vfma(a, s, b * c);
    }
    for (; m < half; m++) {
        float a = from[m], b = from[half + m];
        to[m] = a * cos[m] - b * sin[m];
        to[half + m] = b * cos[m] + a * sin[m];
    }
    if (rotary < dim && from != to) memcpy(to + rotary, from + rotary, sizeof(float) * (dim - rotary));
}
