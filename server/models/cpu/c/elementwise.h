/* Of one row: see elementwise.c. dtype: of everything in the row, FP32 or BF16. */
#include <stdint.h>

void silu_mul(void *gate, const void *up, int64_t n, int64_t dtype);
void rms_norm(const void *x, const void *weight, void *out, int64_t n, float eps, int64_t add_one, int64_t dtype);
void add_rows(uint16_t *to, const uint16_t *from, int64_t n); /* to += from, rounded */
