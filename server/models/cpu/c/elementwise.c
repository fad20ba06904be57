/* What stands between products in a layer: RMS norm, SiLU gate and the sum of two rows, rounded where torch's modules round. */
#include "elementwise.h"

#include "vectors.h"

/* gate, up [n] → gate: silu(gate)·up, each rounded. n: a multiple of 16. */
INLINE void silu_as(void *gate, const void *up, int64_t n, const int dtype) {
    for (int64_t i = 0; i < n; i += LANES) {
        vfloat x = load(gate, i, dtype), small = larger(x, -x);
        vfloat e = exp_neg(-small); /* of −|x|, so that nothing overflows */
        vint negative = x < 0.0f;
        vfloat top = (vfloat)((negative & (vint)e) | (~negative & (vint)splat(1.0f)));
        vfloat result = x * top / (1.0f + e);
        store(gate, i, (dtype == BF16 ? rounded(result) : result) * load(up, i, dtype), dtype);
    }
}

void silu_mul(void *gate, const void *up, int64_t n, int64_t dtype) {
    if (dtype == BF16) silu_as(gate, up, n, BF16);
    else silu_as(gate, up, n, FP32);
}

/* x [n] → out: x/√(mean x² + eps), rounded, times weight, rounded; with `add_one` times 1 + weight, rounded once. */
INLINE void norm_as(const void *x, const void *weight, void *out, int64_t n, float eps, int64_t add_one, const int dtype) {
    vfloat sum = {};
    for (int64_t i = 0; i < n; i += LANES) {
        vfloat value = load(x, i, dtype);
        sum = vfma(value, value, sum);
    }
    float total = 0.0f;
    for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    float factor = 1.0f / sqrtf(total / n + eps);
    for (int64_t i = 0; i < n; i += LANES) {
        vfloat value = load(x, i, dtype) * factor, w = load(weight, i, dtype);
        if (dtype == BF16 && !add_one) value = rounded(value);
        store(out, i, value * (add_one ? 1.0f + w : w), dtype);
    }
}

void rms_norm(const void *x, const void *weight, void *out, int64_t n, float eps, int64_t add_one, int64_t dtype) {
    if (dtype == BF16) norm_as(x, weight, out, n, eps, add_one, BF16);
    else norm_as(x, weight, out, n, eps, add_one, FP32);
}

/* n: a multiple of 16. */
void add_rows(uint16_t *to, const uint16_t *from, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) *(vhalf *)(to + i) = narrow(load(to, i, BF16) + load(from, i, BF16));
}

/* x, out: [rows, n] of fp32 or bf16, as the weight. */
void prerope_rms_norm(const char *x, const void *weight, char *out, int64_t rows, int64_t n, float eps, int64_t add_one,
                      int64_t dtype) {
    int64_t size = n * (dtype == BF16 ? 2 : 4);
#pragma omp parallel for schedule(static) if (rows * n > 65536)
    for (int64_t row = 0; row < rows; row++) rms_norm(x + row * size, weight, out + row * size, n, eps, add_one, dtype);
}
