/* A step of few rows through decoder layers of the common shape, in one parallel region:
 *
 *     h += output(attention(query, key, value of norm h));   h += down(silu(gate)·up of norm h)
 *
 * Called one by one these products wait for each other's callers longer than for the weights of a small model. Each
 * result is rounded to bf16 where the calls would round it, so that it is theirs to the bit.
 */
#include "elementwise.h"
#include "linear.h"
#include "rows.h"
#include "vectors.h"

typedef struct {
    const uint16_t *weight;
    double eps;
    int64_t add_one;
} Norm;

typedef struct {
    Norm before_attention, before_mlp;
    Linear query_key_value, output, gate_up, down; /* parts point to buffers that all layers share */
    char *keys, *values;                           /* [slots, Hkv, D] bf16: this layer's cache */
    const char *bounds;                            /* of the keys, where rows choose which they read */
    const Shape *shape;
    const RowPlan *plan;
} Layer;

typedef struct {
    int64_t rows, hidden, threads;
    uint16_t *h;          /* [rows, hidden], in place */
    const int64_t *slots; /* [rows]: where the rows' K and V go */
    uint16_t *row;        /* [rows, widest input]: what a product reads */
    float *x;             /* [rows, widest input]: the same, widened, where a product wants it so */
    float *scratch;       /* as in prerope_rows */
} Step;

INLINE const void *read_by(const Linear *linear, const Step *step, const uint16_t *row) {
    return linear_is_wide(linear) ? (const void *)step->x : row;
}

/* A loop; `row`: what step->x is made of. */
INLINE void multiply(Linear linear, const Step *step, const uint16_t *row) {
    linear.rows = step->rows;
    linear_few(&linear, read_by(&linear, step, row));
}

/* h += added, where there is any, and its norm to x, for the product that reads it. */
static void enter(const Step *step, const uint16_t *added, const Norm *norm, const Linear *next) {
    int64_t n = step->hidden;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < step->rows; r++) {
        uint16_t *h = step->h + r * n, *to = step->row + r * n;
        if (added) add_rows(h, added + r * n, n);
        if (!norm) continue;
        rms_norm(h, norm->weight, to, n, (float)norm->eps, norm->add_one, BF16);
        linear_ready(next, to, step->x + r * n);
    }
}

static void attend(const Step *step, const Layer *layer) {
    const Shape *shape = layer->shape;
    const Part *parts = layer->query_key_value.parts;
    int64_t query = shape->query_heads * shape->head_dim, key_bytes = shape->kv_heads * shape->head_dim * 2;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < step->rows; r++) {
        memcpy(layer->keys + step->slots[r] * key_bytes, (char *)parts[1].out + r * key_bytes, key_bytes);
        memcpy(layer->values + step->slots[r] * key_bytes, (char *)parts[2].out + r * key_bytes, key_bytes);
    }
    rows_attend(shape, layer->plan, parts[0].out, layer->keys, layer->values, layer->bounds, step->scratch);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < step->rows; r++) {
        row_finish(shape, layer->plan, r, 0, step->scratch, step->row);
        linear_ready(&layer->output, step->row + r * query, step->x + r * query);
    }
}

static void gate(const Step *step, const Layer *layer) {
    const Part *parts = layer->gate_up.parts;
    uint16_t *gates = parts[0].out, *ups = parts[1].out;
    int64_t n = parts->features;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < step->rows; r++) {
        silu_mul(gates + r * n, ups + r * n, n, BF16);
        linear_ready(&layer->down, gates + r * n, step->x + r * n);
    }
}

/* Inputs and features: multiples of 32. */
void prerope_layers(const Layer *layers, int64_t num_layers, const Step *step) {
#pragma omp parallel num_threads(step->threads)
    {
        const uint16_t *added = 0;
        for (const Layer *layer = layers; layer < layers + num_layers; layer++) {
            enter(step, added, &layer->before_attention, &layer->query_key_value);
            multiply(layer->query_key_value, step, step->row);
            attend(step, layer);
            multiply(layer->output, step, step->row);
            enter(step, layer->output.parts->out, &layer->before_mlp, &layer->gate_up);
            multiply(layer->gate_up, step, step->row);
            gate(step, layer);
            multiply(layer->down, step, layer->gate_up.parts->out);
            added = layer->down.parts->out;
        }
        enter(step, added, 0, 0);
    }
}
