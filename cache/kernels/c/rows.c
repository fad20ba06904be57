/* Few rows of a sequence over its raw keys: decode steps, drafts that are verified, the ends of prompts.
 *
 * Rows of one sequence that follow one another and share a reading are a *run*. Keys are turned once for as many rows of
 * it as a tile holds, MAX_ROWS over the query heads of a KV head. A run's work is cut into *items*, one for each part of its
 * reading and span of keys, in the order in which they are merged; heads of an item are taken by themselves. So few long
 * rows use every thread, and nothing is summed in another order than in a chunk. The plan of a step is made once for all
 * layers, here: what queries are turned by, and the items.
 */
#include "attend.h"

typedef struct {
    const Reading *reading;
    const int64_t *blocks;
    int64_t position;
} Row;

typedef struct {
    int64_t first, count, part, span; /* rows of a run */
    int64_t before;                   /* rows of all items before it */
} Item;

struct RowPlan {
    int64_t num_rows, num_items, most_parts, reach; /* rows see keys with i − j < reach */
    const Row *rows;
    const float *scales; /* [rows] or null: on the queries, beside Shape.scale */
    float *turns;        /* of each run [most_parts, rows, rotary_dim] */
    Item *items;
    int64_t *row_items; /* [rows]: the first item of the row's run */
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

INLINE float *turns_of(const RowPlan *plan, int64_t first, int64_t count, int64_t part) {
    return plan->turns + (first * plan->most_parts + part * count) * plan->rows[first].reading->rotary_dim;
}

INLINE Read read_of(const RowPlan *plan, int64_t first, int64_t count, int64_t p) {
    const ReadingPart *part = plan->rows[first].reading->parts + p;
    return (Read){part->turns, part->query.theta ? turns_of(plan, first, count, p) : 0, part->first_key, part->stop_key,
                  part->d_min, least(part->d_max, plan->reach)};
}

/* Rows from `first` on that are one run. */
static int64_t run_from(const RowPlan *plan, int64_t first) {
    int64_t row = first + 1;
    const Row *rows = plan->rows;
    while (row < plan->num_rows && rows[row].reading == rows[first].reading && rows[row].blocks == rows[first].blocks &&
           rows[row].position == rows[first].position + row - first)
        row++;
    return row - first;
}

/* Keys [low, high) that a run may see of a part. */
INLINE void seen_of(const RowPlan *plan, int64_t first, int64_t count, int64_t part, int64_t *low, int64_t *high) {
    int64_t i = plan->rows[first].position;
    Read read = read_of(plan, first, count, part);
    *low = most(most(read.first_key, i - read.d_max + 1), 0);
    *high = least(read.stop_key, i + count - read.d_min);
}

/* Turns and items of one run; `before`: rows of all items so far, which is moved on. */
static void plan_run(RowPlan *plan, int64_t first, int64_t count, int64_t *before) {
    const Reading *reading = plan->rows[first].reading;
    int64_t parts = reading->num_parts;
    for (int64_t p = 0; p < parts; p++)
        if (reading->parts[p].query.theta)
            prerope_query_turns(reading, p, plan->rows[first].position, count, turns_of(plan, first, count, p));
    for (int64_t begin = 0, end; begin < parts; begin = end) { /* parts of one map of keys: a chunk packs them once */
        int64_t low = INT64_MAX, high = 0, from, to;
        for (end = begin; end < parts && reading->parts[end].turns == reading->parts[begin].turns; end++) {
            seen_of(plan, first, count, end, &from, &to);
            if (from < to) low = least(low, from), high = most(high, to);
        }
        for (int64_t span = low / SPAN; span * SPAN < high; span++)
            for (int64_t p = begin; p < end; p++) {
                seen_of(plan, first, count, p, &from, &to);
                if (most(from, span * SPAN) >= least(to, (span + 1) * SPAN)) continue;
                plan->items[plan->num_items++] = (Item){first, count, p, span, *before};
                *before += count;
            }
    }
}

/* Turns and items of all rows; returns how many rows the items have together. */
int64_t prerope_plan_rows(RowPlan *plan) {
    int64_t before = 0;
    plan->num_items = 0;
    for (int64_t first = 0, count; first < plan->num_rows; first += count) {
        count = run_from(plan, first);
        for (int64_t row = first; row < first + count; row++) plan->row_items[row] = plan->num_items;
        plan_run(plan, first, count, &before);
    }
    return before;
}

/* Floats of what one KV head finds for one row of an item. */
INLINE int64_t state_floats(const Shape *shape) { return group_of(shape) * (padded(shape->value_dim) + 17); }

/* That of an item's rows from `row` of the step on. */
INLINE State state_at(const Shape *shape, float *scratch, const Item *item, int64_t head, int64_t row) {
    int64_t group = group_of(shape), rows = item->count * group, at = (row - item->first) * group;
    float *out = scratch + (item->before * shape->kv_heads + head * item->count) * state_floats(shape);
    float *sums = out + rows * padded(shape->value_dim), *maxima = sums + 16 * rows;
    return (State){out + at * padded(shape->value_dim), sums + 16 * at, maxima + at};
}

void rows_attend(const Shape *shape, const RowPlan *plan, const void *query, const void *keys, const void *values,
                 float *scratch) {
    int64_t heads = shape->kv_heads, work = plan->num_items * heads, group = group_of(shape), tile = MAX_ROWS / group;
    int64_t row_size = shape->query_heads * shape->head_dim * (shape->query_dtype == FP32 ? 4 : 2);
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < work; n++) {
        const Item *item = plan->items + n / heads;
        int64_t first = item->first;
        Read read = read_of(plan, first, item->count, item->part);
        Source source = {keys, values, plan->rows[first].blocks, n % heads};
        for (int64_t row = 0; row < item->count; row += tile) {
            Rows rows = {(const char *)query + first * row_size, plan->scales ? plan->scales + first : 0,
                         plan->rows[first].position, 0, row, least(row + tile, item->count)};
            State state = state_at(shape, scratch, item, n % heads, first + row);
            if (!attend(shape, &rows, &read, &source, item->span * SPAN, (item->span + 1) * SPAN, 0, &state))
                state_clear(&state, (rows.stop - row) * group, shape->value_dim);
        }
    }
}

void row_finish(const Shape *shape, const RowPlan *plan, int64_t row, const float *sinks, float *scratch, void *out) {
    int64_t group = group_of(shape);
    const Item *first = plan->items + plan->row_items[row], *end = plan->items + plan->num_items;
    for (int64_t head = 0; head < shape->kv_heads; head++) {
        State state = state_at(shape, scratch, first, head, row);
        for (const Item *item = first + 1; item < end && item->first == first->first; item++) {
            State other = state_at(shape, scratch, item, head, row);
            state_merge(&state, &other, group, shape->value_dim);
        }
        for (int64_t g = 0; g < group; g++) {
            int64_t h = head * group + g;
            state_finish(shape, &state, g, sinks ? sinks + h : 0, (row * shape->query_heads + h) * shape->value_dim, out);
        }
    }
}

/* Floats of scratch for items of this many rows together. */
int64_t prerope_rows_scratch(const Shape *shape, int64_t rows) { return rows * shape->kv_heads * state_floats(shape); }

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
