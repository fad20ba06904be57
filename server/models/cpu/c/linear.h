/* Linear layers: what kernels are given, and the parts of them that `layers.c` runs inside a parallel region of its own: a
 * function with a loop in it must be called by all threads of the region, and ends with their barrier. */
#include <stdint.h>

/* Weights in fp32; in bf16, widened or multiplied in pairs; in int8 with scales, likewise. Activations, biases and results
 * are fp32 with weights in fp32, else bf16. */
enum { FULL = 0, WIDENED = 1, DOTS = 2, BYTES = 3, BYTE_DOTS = 4 };

typedef struct {
    const void *weight;  /* [features, in] */
    const float *scales; /* [features] or null: what a row of int8 is multiplied by */
    const void *bias;    /* [features] or null */
    void *out;           /* [rows, features] */
    int64_t features;
} Part;

typedef struct {
    int64_t rows, in, num_parts, threads, kind;
    const void *x;     /* [rows, in] */
    const Part *parts; /* products of the same x */
} Linear;

int linear_is_wide(const Linear *linear); /* whether it reads bf16 widened to floats, as `linear_ready` leaves a row */
void linear_ready(const Linear *linear, const uint16_t *from, float *to);
void linear_few(const Linear *linear, const void *x);                            /* a loop: few rows, x made ready */
