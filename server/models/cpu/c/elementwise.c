/* What stands between products in a layer: RMS norm, SiLU gate and the sum of two rows, rounded where torch's modules round. */
#include "elementwise.h"

#include "vectors.h"

/* gate, up [n] → gate: silu(gate)·up, each rounded. n: a multiple of 16. */
INLINE void silu_as(void *gate, const void *up, int64_t n, const int dtype) {
    for (int64_t i = 0; i < n; i += 16) {
        v16 x = load16(gate, i, dtype), small = larger(x, -x);
        v16 e = exp_neg16(-small); /* of −|x|, so that nothing overflows */
        i32x16 negative = x < 0.0f;
        v16 top = (v16)((negative & (i32x16)e) | (~negative & (i32x16)all16(1.0f)));
        v16 result = x * top / (1.0f + e);
        store16(gate, i, (dtype == BF16 ? round16(result) : result) * load16(up, i, dtype), dtype);
    }
}

void silu_mul(void *gate, const void *up, int64_t n, int64_t dtype) {
    if (dtype == BF16) silu_as(gate, up, n, BF16);
    else silu_as(gate, up, n, FP32);
}

/* x [n] → out: x/√(mean x² + eps), rounded, times weight, rounded; with `add_one` times 1 + weight, rounded once. */
INLINE void norm_as(const void *x, const void *weight, void *out, int64_t n, float eps, int64_t add_one, const int dtype) {
    v16 sum = {};
    for (int64_t i = 0; i < n; i += 16) {
        v16 value = load16(x, i, dtype);
        sum = fma16(value, value, sum);
    }
    float total = 0.0f;
    for (int lane = 0; lane < 16; lane++) total += sum[lane];
    float factor = 1.0f / sqrtf(total / n + eps);
    for (int64_t i = 0; i < n; i += 16) {
        v16 value = load16(x, i, dtype) * factor, w = load16(weight, i, dtype);
        if (dtype == BF16 && !add_one) value = round16(value);
        store16(out, i, value * (add_one ? 1.0f + w : w), dtype);
    }
}

void rms_norm(const void *x, const void *weight, void *out, int64_t n, float eps, int64_t add_one, int64_t dtype) {
    if (dtype == BF16) norm_as(x, weight, out, n, eps, add_one, BF16);
    else norm_as(x, weight, out, n, eps, add_one, FP32);
}

/* n: a multiple of 16. */
void add_rows(uint16_t *to, const uint16_t *from, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) *(u16x16 *)(to + i) = narrow16(load16(to, i, BF16) + load16(from, i, BF16));
}

/* x, out: [rows, n] of fp32 or bf16, as the weight. */
void prerope_rms_norm(const char *x, const void *weight, char *out, int64_t rows, int64_t n, float eps, int64_t add_one,
                      int64_t dtype) {
    int64_t size = n * (dtype == BF16 ? 2 : 4);
#pragma omp parallel for schedule(static) if (rows * n > 65536)
    for (int64_t row = 0; row < rows; row++) rms_norm(x + row * size, weight, out + row * size, n, eps, add_one, dtype);
}
