/* What these kernels can do as they were compiled. */
#include "vectors.h"

/* Whether keys, values and queries of this dtype are read. */
int64_t prerope_reads(int64_t dtype) {
    return dtype == FP32 || dtype == BF16 || (HAS_FP16 && dtype == FP16);
}

/* Whether this processor multiplies pairs of bf16. */
int64_t prerope_has_dots(void) { return HAS_DOTS; }
