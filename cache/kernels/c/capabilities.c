/* What these kernels can do as they were compiled. */
#include "vectors.h"

/* Whether keys, values and queries of this dtype are read. */
int64_t prerope_reads(int64_t dtype) {
#ifdef __FLT16_MAX__
    return dtype == FP32 || dtype == BF16 || dtype == FP16;
#else
    return dtype == FP32 || dtype == BF16;
#endif
}

/* Whether this processor multiplies pairs of bf16. */
int64_t prerope_has_dots(void) { return HAS_DOTS; }
