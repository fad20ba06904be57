/* What the kernels share: vectors of 16 floats, whatever the registers' width, exp, and heads as they lie in the cache. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define MAX_DIM 256
#define INLINE static inline __attribute__((always_inline))
#define LOWEST (-1e30f)
#define LOG2_E 1.44269504f

enum { FP32 = 0, BF16 = 1, FP16 = 2 };

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef int16_t i16x16 __attribute__((vector_size(32), aligned(2)));
typedef int8_t i8x16 __attribute__((vector_size(16), aligned(1)));

INLINE v16 larger(v16 a, v16 b) {
#ifdef __AVX512F__
    return (v16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    i32x16 above = a > b;
    return (v16)((above & (i32x16)a) | (~above & (i32x16)b));
#endif
}

/* 2^x for x <= 0, to about 2 ulp and never below 2^-125: a power of two times a polynomial of what is left of x. */
INLINE v16 exp2_neg16(v16 x) {
    x = larger(x, (v16){} - 125.0f);
    i32x16 whole = __builtin_convertvector(x - 0.5f, i32x16); /* towards zero: the nearest, for x <= 0 */
    v16 r = x - __builtin_convertvector(whole, v16);
    v16 p = ((((1.34004322e-3f * r + 9.67603710e-3f) * r + 5.55032721e-2f) * r + 2.40221074e-1f) * r + 6.93147207e-1f) * r +
            1.0f;
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
    for (int i = 0; i < 16; i += 2 * n) \
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
    return 0.0f;
#endif
}

/* 16 members of a head. */
INLINE v16 load16(const void *base, int64_t at, int dtype) {
    if (dtype == FP32) return *(const v16 *)((const float *)base + at);
    if (dtype == BF16) {
        u32x16 bits = __builtin_convertvector(*(const u16x16 *)((const uint16_t *)base + at), u32x16) << 16;
        return (v16)bits;
    }
    v16 value;
    for (int lane = 0; lane < 16; lane++) value[lane] = load1(base, at + lane, dtype);
    return value;
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
        *(v16 *)(to + m) = a * c - b * s;
        *(v16 *)(to + half + m) = b * c + a * s;
    }
    for (; m < half; m++) {
        to[m] = from[m] * cos[m] - from[half + m] * sin[m];
        to[half + m] = from[half + m] * cos[m] + from[m] * sin[m];
    }
    if (rotary < dim) memcpy(to + rotary, from + rotary, sizeof(float) * (dim - rotary));
}
