/* What the kernels share: vectors of 16 floats, whatever the registers' width, dot products of bf16 pairs, exp, and heads
 * as they lie in the cache.
 *
 * A row's result may not depend on which kernel it meets, so the source says where everything is rounded: the library is
 * built without -ffast-math and without contraction, and a multiplication that is to be one with an addition is `fma16`.
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

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef int16_t i16x16 __attribute__((vector_size(32), aligned(2)));
typedef int8_t i8x16 __attribute__((vector_size(16), aligned(1)));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE v16 larger(v16 a, v16 b) {
#ifdef __AVX512F__
    return (v16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    i32x16 above = a > b;
    return (v16)((above & (i32x16)a) | (~above & (i32x16)b));
#endif
}

/* a·b + c, rounded once where the processor can. */
INLINE v16 fma16(v16 a, v16 b, v16 c) {
#if defined(__AVX512F__)
    return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) || defined(__ARM_NEON)
    typedef union {
        v16 all;
#ifdef __FMA__
        __m256 part[2];
#else
        float32x4_t part[4];
#endif
    } Parts;
    Parts x = {a}, y = {b}, z = {c};
#ifdef __FMA__
    for (int i = 0; i < 2; i++) z.part[i] = _mm256_fmadd_ps(x.part[i], y.part[i], z.part[i]);
#else
    for (int i = 0; i < 4; i++) z.part[i] = vfmaq_f32(z.part[i], x.part[i], y.part[i]);
#endif
    return z.all;
#else
    return a * b + c;
#endif
}

/* x in a register: compilers otherwise load it again for every use, and loads are what such a loop waits for. */
INLINE v16 held16(v16 x) {
#ifdef __AVX512F__
    __m512 held = (__m512)x;
    __asm__("" : "+v"(held));
    return (v16)held;
#else
    return x;
#endif
}

INLINE v16 all16(float x) { return (v16){} + x; }

/* 2^x for x <= 0, to about 2 ulp and never below 2^-125: a power of two times a polynomial of what is left of x. */
INLINE v16 exp2_neg16(v16 x) {
    x = larger(x, all16(-125.0f));
    i32x16 whole = __builtin_convertvector(x - 0.5f, i32x16); /* towards zero: the nearest, for x <= 0 */
    v16 r = x - __builtin_convertvector(whole, v16), p = fma16(all16(1.34004322e-3f), r, all16(9.67603710e-3f));
    p = fma16(p, r, all16(5.55032721e-2f));
    p = fma16(p, r, all16(2.40221074e-1f));
    p = fma16(p, r, all16(6.93147207e-1f));
    p = fma16(p, r, all16(1.0f));
    return (v16)((i32x16)p + (whole << 23));
}

INLINE v16 exp_neg16(v16 x) { return exp2_neg16(x * LOG2_E); }

/* Butterflies of shuffles. KEEP_n of (a, b) has a's first n lanes of every 2n and then b's; KEEP_n + n has the others. */
#define KEEP_1 ((i32x16){0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30})
#define KEEP_2 ((i32x16){0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29})
#define KEEP_4 ((i32x16){0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27})
#define KEEP_8 ((i32x16){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23})

INLINE v16 fold(v16 a, v16 b, const int most) { return most ? larger(a, b) : a + b; }

/* The sums (or the largest members) of 16 vectors, as one vector: instead of 16 horizontal sums. */
INLINE v16 fold16(v16 *p, const int most) {
#define FOLD(n, KEEP) \
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i += 2 * n) \
        p[i] = fold(__builtin_shuffle(p[i], p[i + n], KEEP), __builtin_shuffle(p[i], p[i + n], KEEP + n), most);
    FOLD(1, KEEP_1) FOLD(2, KEEP_2) FOLD(4, KEEP_4) FOLD(8, KEEP_8)
#undef FOLD
    return p[0];
}

INLINE void transpose16(v16 *p) {
#define SWAP(n, KEEP) \
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) if (!(i & n)) { \
        v16 a = p[i], b = p[i + n]; \
        p[i] = __builtin_shuffle(a, b, KEEP); \
        p[i + n] = __builtin_shuffle(a, b, KEEP + n); \
    }
    SWAP(8, KEEP_8) SWAP(4, KEEP_4) SWAP(2, KEEP_2) SWAP(1, KEEP_1)
#undef SWAP
}

/* --- bf16 ------------------------------------------------------------------------------------------------------------- */

/* 32 bf16 as 16 words: the even member of a pair in the low half. */
INLINE u32x16 pairs_at(const uint16_t *from) { return *(const u32x16 *)from; }
INLINE v16 even(u32x16 pairs) { return (v16)(pairs << 16); }
INLINE v16 odd(u32x16 pairs) { return (v16)(pairs & 0xffff0000u); }

/* To the nearest bf16, ties to even. */
INLINE u16x16 narrow16(v16 x) {
    u32x16 bits = (u32x16)x, nan = (u32x16)(x != x);
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = (nan & 0x7fc0) | (~nan & rounded);
#ifdef __AVX512F__
    return (u16x16)_mm512_cvtepi32_epi16((__m512i)rounded);
#else
    return __builtin_convertvector(rounded, u16x16);
#endif
}

/* Compilers take four instructions for what is one. */
INLINE u32x16 words16(u16x16 x) {
#ifdef __AVX512F__
    return (u32x16)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return __builtin_convertvector(x, u32x16);
#endif
}
INLINE v16 widen16(u16x16 x) { return (v16)(words16(x) << 16); }
INLINE v16 round16(v16 x) { return widen16(narrow16(x)); }

/* Both narrowed, one after the other: words of neighbours. */
INLINE u32x16 narrow32(v16 low, v16 high) {
#ifdef __AVX512BF16__
    return (u32x16)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
    union {
        u16x16 halves[2];
        u32x16 words;
    } both = {{narrow16(low), narrow16(high)}};
    return both.words;
#endif
}

/* sum + a·b over the pairs of each lane: by the processor's own instruction, which rounds in a way of its own. */
#if defined(__AVX512BF16__)
#define HAS_DOTS 1
INLINE v16 dot16(v16 sum, u32x16 a, u32x16 b) {
    return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAS_DOTS 1
INLINE v16 dot16(v16 sum, u32x16 a, u32x16 b) {
    union {
        v16 all;
        float32x4_t part[4];
    } s = {sum};
    union {
        u32x16 all;
        bfloat16x8_t part[4];
    } x = {a}, y = {b};
    for (int i = 0; i < 4; i++) s.part[i] = vbfdotq_f32(s.part[i], x.part[i], y.part[i]);
    return s.all;
}
#else
#define HAS_DOTS 0
INLINE v16 dot16(v16 sum, u32x16 a, u32x16 b) { return fma16(odd(a), odd(b), fma16(even(a), even(b), sum)); }
#endif

/* --- heads in the cache ----------------------------------------------------------------------------------------------- */

INLINE float load1(const void *base, int64_t at, int dtype) {
    if (dtype == FP32) return ((const float *)base)[at];
    if (dtype == BF16) {
        uint32_t bits = (uint32_t)((const uint16_t *)base)[at] << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
#ifdef __FLT16_MAX__
    return (float)((const _Float16 *)base)[at];
#else
    return NAN; /* never asked for: see capabilities.c */
#endif
}

INLINE void store1(void *base, int64_t at, float value, int dtype) {
    if (dtype == FP32) ((float *)base)[at] = value;
    else if (dtype == BF16) ((uint16_t *)base)[at] = narrow16(all16(value))[0];
#ifdef __FLT16_MAX__
    else ((_Float16 *)base)[at] = (_Float16)value;
#endif
}

/* 16 members of a head. */
INLINE v16 load16(const void *base, int64_t at, int dtype) {
    if (dtype == FP32) return *(const v16 *)((const float *)base + at);
    if (dtype == BF16) return widen16(*(const u16x16 *)((const uint16_t *)base + at));
    v16 value;
    for (int lane = 0; lane < 16; lane++) value[lane] = load1(base, at + lane, dtype);
    return value;
}

INLINE void store16(void *base, int64_t at, v16 value, int dtype) {
    if (dtype == FP32) *(v16 *)((float *)base + at) = value;
    else if (dtype == BF16) *(u16x16 *)((uint16_t *)base + at) = narrow16(value);
    else
        for (int lane = 0; lane < 16; lane++) store1(base, at + lane, value[lane], dtype);
}

/* Split a head into the first and second members of its pairs, then what does not rotate. */
INLINE void unpair(const void *from, int64_t at, float *to, int dim, int rotary, int interleaved, int dtype) {
    int d = 0;
    if (interleaved)
        for (; d < rotary; d++) to[d / 2 + d % 2 * (rotary / 2)] = load1(from, at + d, dtype);
    for (; d + 16 <= dim; d += 16) *(v16 *)(to + d) = load16(from, at + d, dtype);
    for (; d < dim; d++) to[d] = load1(from, at + d, dtype);
}

/* Turn an unpaired head by an angle a pair. */
INLINE void turn(const float *from, float *to, const float *cos, const float *sin, int dim, int rotary) {
    int half = rotary / 2, m = 0;
    for (; m + 16 <= half; m += 16) {
        v16 a = *(const v16 *)(from + m), b = *(const v16 *)(from + half + m);
        v16 c = *(const v16 *)(cos + m), s = *(const v16 *)(sin + m);
        *(v16 *)(to + m) = fma16(-b, s, a * c);
        *(v16 *)(to + half + m) = fma16(a, s, b * c);
    }
    for (; m < half; m++) {
        float a = from[m], b = from[half + m];
        to[m] = a * cos[m] - b * sin[m];
        to[half + m] = b * cos[m] + a * sin[m];
    }
    if (rotary < dim && from != to) memcpy(to + rotary, from + rotary, sizeof(float) * (dim - rotary));
}
