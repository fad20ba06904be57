/* What queries, keys and values may be; see capabilities.c for what was compiled. */
enum { FP32 = 0, BF16 = 1, FP16 = 2 };

/* A statement in which DTYPE is this dtype as a constant, so that it is compiled once for each. */
#define WITH_DTYPE(dtype, statement) \
    switch (dtype) { \
        case BF16: { enum { DTYPE = BF16 }; statement; break; } \
        case FP16: { enum { DTYPE = FP16 }; statement; break; } \
        default: { enum { DTYPE = FP32 }; statement; } \
    }
