/* Single rows over the raw keys of their sequences: decode steps.
 *
 * The work of a row is cut into *items*, one for each part of its reading and span of keys, in the order in which they are
 * merged; heads of an item are taken by themselves. So few long rows use every thread, and nothing is summed in another
 * order than in a chunk. The plan of a step is made once for all layers, here: what queries are turned by, and the items.
 */
#include "attend.h"

typedef struct {
    const Reading *reading;
    const int64_t *blocks;
    int64_t position;
} Row;

typedef struct {
    int64_t row, part, span;
} Item;

struct RowPlan {
    int64_t num_rows, most_parts, reach; /* rows see keys with i − j < reach */
    const Row *rows;
    const float *scales; /* [rows] or null: on the queries, beside Shape.scale */
    float *turns;        /* [rows, most_parts, rotary_dim] */
    Item *items;
    int64_t *row_items; /* [rows + 1] */
};

void prerope_query_turns(const Reading *reading, int64_t part, int64_t start, int64_t count, float *to) {
    const AngleMap *map = &reading->parts[part].query;
    int64_t half = reading->rotary_dim / 2;
    for (int64_t i = start; i < start + count; i++, to += 2 * half) {
        int64_t position = least((map->period ? i % map->period : i) / map->group + map->shift, map->cap);
        for (int64_t m = 0; m < half; m++) {
            double angle = position * map->theta[m] + (map->offset ? map->offset[m] : 0.0), factor = reading->factor;
            if (reading->decay) factor *= exp(reading->decay[m] * (i % KEYS)); /* from the row's own tile on */
            to[m] = cos(angle) * factor;
            to[half + m] = sin(angle) * factor;
        }
    }
}

INLINE Read read_of(const RowPlan *plan, int64_t row, int64_t p) {
    const Reading *reading = plan->rows[row].reading;
    const ReadingPart *part = reading->parts + p;
    const float *turns = plan->turns + (row * plan->most_parts + p) * reading->rotary_dim;
    return (Read){part->turns, part->query.theta ? turns : 0, part->first_key, part->stop_key, part->d_min,
                  least(part->d_max, plan->reach)};
}

INLINE int64_t low_of(const Read *read, int64_t i) { return most(most(read->first_key, i - read->d_max + 1), 0); }
INLINE int64_t high_of(const Read *read, int64_t i) { return least(read->stop_key, i - read->d_min + 1); }

/* Turns and items of all rows; returns the number of items. */
int64_t prerope_plan_rows(RowPlan *plan) {
    int64_t items = 0;
    for (int64_t row = 0; row < plan->num_rows; row++) {
        const Reading *reading = plan->rows[row].reading;
        int64_t i = plan->rows[row].position, parts = reading->num_parts;
        plan->row_items[row] = items;
        for (int64_t p = 0; p < parts; p++)
            if (reading->parts[p].query.theta)
                prerope_query_turns(reading, p, i, 1, plan->turns + (row * plan->most_parts + p) * reading->rotary_dim);
        for (int64_t begin = 0, end; begin < parts; begin = end) { /* parts of one map of keys: a chunk packs them once */
            int64_t low = INT64_MAX, high = 0;
            for (end = begin; end < parts && reading->parts[end].turns == reading->parts[begin].turns; end++) {
                Read read = read_of(plan, row, end);
                if (low_of(&read, i) >= high_of(&read, i)) continue;
                low = least(low, low_of(&read, i)), high = most(high, high_of(&read, i));
            }
            for (int64_t span = low / SPAN; span * SPAN < high; span++)
                for (int64_t p = begin; p < end; p++) {
                    Read read = read_of(plan, row, p);
                    if (most(low_of(&read, i), span * SPAN) < least(high_of(&read, i), (span + 1) * SPAN))
                        plan->items[items++] = (Item){row, p, span};
                }
        }
    }
    plan->row_items[plan->num_rows] = items;
    return items;
}

/* Floats of what one KV head finds in one item. */
INLINE int64_t state_floats(const Shape *shape) { return group_of(shape) * (padded(shape->value_dim) + 17); }

INLINE State state_at(const Shape *shape, float *scratch, int64_t item, int64_t head) {
    int64_t group = group_of(shape);
    float *out = scratch + (item * shape->kv_heads + head) * state_floats(shape);
    float *sums = out + group * padded(shape->value_dim);
    return (State){out, sums, sums + 16 * group};
}

void rows_attend(const Shape *shape, const RowPlan *plan, const void *query, const void *keys, const void *values,
                 float *scratch) {
    int64_t heads = shape->kv_heads, work = plan->row_items[plan->num_rows] * heads;
    int64_t row_size = shape->query_heads * shape->head_dim * (shape->query_dtype == FP32 ? 4 : 2);
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < work; n++) {
        const Item *item = plan->items + n / heads;
        const Row *row = plan->rows + item->row;
        Rows rows = {(const char *)query + item->row * row_size, plan->scales ? plan->scales + item->row : 0,
                     row->position, 0, 0, 1};
        Read read = read_of(plan, item->row, item->part);
        Source source = {keys, values, row->blocks, n % heads};
        State state = state_at(shape, scratch, n / heads, n % heads);
        attend(shape, &rows, &read, &source, item->span * SPAN, (item->span + 1) * SPAN, 0, &state);
    }
}

void row_finish(const Shape *shape, const RowPlan *plan, int64_t row, const float *sinks, float *scratch, void *out) {
    int64_t group = group_of(shape), begin = plan->row_items[row], end = plan->row_items[row + 1];
    for (int64_t head = 0; head < shape->kv_heads; head++) {
        State state = state_at(shape, scratch, begin, head);
        for (int64_t item = begin + 1; item < end; item++) {
            State other = state_at(shape, scratch, item, head);
            state_merge(&state, &other, group, shape->value_dim);
        }
        for (int64_t g = 0; g < group; g++) {
            int64_t h = head * group + g;
            state_finish(shape, &state, g, sinks ? sinks + h : 0, (row * shape->query_heads + h) * shape->value_dim, out);
        }
    }
}

/* Floats of scratch for this many items. */
int64_t prerope_rows_scratch(const Shape *shape, int64_t items) { return items * shape->kv_heads * state_floats(shape); }

/* query, out: [rows, Hq, D or Dv]. keys, values: [num_blocks, block_size, Hkv, D or Dv]. sinks: [Hq] or null. */
void prerope_rows(const Shape *shape, const RowPlan *plan, const void *query, const void *keys, const void *values,
                  const float *sinks, float *scratch, void *out) {
#pragma omp parallel
    {
        rows_attend(shape, plan, query, keys, values, scratch);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < plan->num_rows; row++) row_finish(shape, plan, row, sinks, scratch, out);
    }
}
