/* What queries, keys and values may be; see capabilities.c for what was compiled. */
enum { FP32 = 0, BF16 = 1, FP16 = 2 };
