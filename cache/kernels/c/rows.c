/* Few rows of a sequence over its raw keys: decode steps, drafts that are verified, the ends of prompts.
 *
 * Rows of one sequence that follow one another and share a reading are a *run*. Keys are turned once for as many rows of
 * it as a tile holds, MAX_ROWS over the query heads of a KV head. A run's work is cut into *items*, one for each part of its
 * reading and span of keys, in the order in which they are merged; heads of an item are taken by themselves. So few long
 * rows use every thread, and nothing is summed in another order than in a chunk. The plan of a step is made once for all
 * layers, here: what queries are turned by, and the items.
 *
 * A row that leaves far keys out is a run of its own, for each KV head reads keys of its own. Its units are chosen
 * before anything is read; an item is SPAN keys of them, through whatever parts they are in.
 */
#include "attend.h"
#include "select.h"

typedef struct {
    const Reading *reading;
    const int64_t *blocks;
    int64_t position;
    Far far;
    int64_t units_before, chosen_before; /* far units, and those that are read, of all rows before it */
} Row;

int omp_get_num_threads(void);

enum { CHOSEN = -1 }; /* in place of a part: the item's keys are those of the chosen units begin … end − 1 */

typedef struct {
    int64_t first, count, part, begin, end; /* rows of a run, keys of a span */
    int64_t before;                         /* rows of all items before it */
} Item;

struct RowPlan {
    int64_t num_rows, num_items, most_parts, reach; /* rows see keys with i − j < reach */
    int64_t num_found, num_units, num_chosen;       /* of all items and rows together */
    Row *rows;
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
            int64_t place = map->groups ? position / map->groups[m] : position;
            double angle = place * map->theta[m] + (map->offset ? map->offset[m] : 0.0), factor = reading->factor;
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
    while (row < plan->num_rows && !rows[row].far.count && !rows[first].far.count &&
           rows[row].reading == rows[first].reading && rows[row].blocks == rows[first].blocks &&
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

INLINE void add_item(RowPlan *plan, int64_t first, int64_t count, int64_t part, int64_t begin, int64_t end) {
    if (begin >= end) return;
    plan->items[plan->num_items++] = (Item){first, count, part, begin, end, plan->num_found};
    plan->num_found += count;
}

/* Of a part of the keys [begin, end) of a span, those that are not left to selection. */
static void add_span(RowPlan *plan, int64_t first, int64_t count, int64_t part, int64_t begin, int64_t end) {
    Far far = plan->rows[first].far;
    if (!far.count) return add_item(plan, first, count, part, begin, end);
    int64_t low, high;
    seen_of(plan, first, count, part, &low, &high);
    low = most(low, begin), high = least(high, end);
    add_item(plan, first, count, part, low, least(high, far.first * UNIT));
    add_item(plan, first, count, part, most(low, far.stop * UNIT), high);
}

/* Turns and items of one run. */
static void plan_run(RowPlan *plan, int64_t first, int64_t count) {
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
                add_span(plan, first, count, p, span * SPAN, (span + 1) * SPAN);
            }
    }
    int64_t chosen = plan->rows[first].far.count;
    for (int64_t unit = 0; unit < chosen; unit += SPAN / UNIT)
        add_item(plan, first, count, CHOSEN, unit, least(unit + SPAN / UNIT, chosen));
}

/* Turns and items of all rows. */
void prerope_plan_rows(RowPlan *plan) {
    plan->num_items = plan->num_found = plan->num_units = plan->num_chosen = 0;
    for (int64_t first = 0, count; first < plan->num_rows; first += count) {
        count = run_from(plan, first);
        for (int64_t row = first; row < first + count; row++) {
            Row *one = plan->rows + row;
            plan->row_items[row] = plan->num_items;
            one->units_before = plan->num_units, one->chosen_before = plan->num_chosen;
            if (one->far.count) plan->num_units += one->far.stop - one->far.first, plan->num_chosen += one->far.count;
        }
        plan_run(plan, first, count);
    }
}

/* Floats of what one KV head finds for one row of an item. */
INLINE int64_t found_floats(const Shape *shape) { return group_of(shape) * state_floats(shape); }

/* That of an item's rows from `row` of the step on. */
INLINE State state_at(const Shape *shape, float *scratch, const Item *item, int64_t head, int64_t row) {
    int64_t group = group_of(shape), rows = item->count * group, at = (row - item->first) * group;
    float *out = scratch + (item->before * shape->kv_heads + head * item->count) * found_floats(shape);
    float *sums = out + rows * padded(shape->value_dim), *maxima = sums + LANES * rows;
    return (State){out + at * padded(shape->value_dim), sums + LANES * at, maxima + at};
}

/* Where the units that a row reads are written, behind what is found; after those of all rows, room for their scores. */
INLINE int32_t *chosen_at(const Shape *shape, const RowPlan *plan, float *scratch, int64_t row, int64_t head) {
    int32_t *all = (int32_t *)(scratch + plan->num_found * shape->kv_heads * found_floats(shape));
    return all + plan->rows[row].chosen_before * shape->kv_heads + head * plan->rows[row].far.count;
}

INLINE uint32_t *scores_at(const Shape *shape, const RowPlan *plan, float *scratch, int64_t row, int64_t head) {
    const Row *one = plan->rows + row;
    float *all = scratch + plan->num_found * shape->kv_heads * found_floats(shape) + plan->num_chosen * shape->kv_heads;
    return (uint32_t *)all + one->units_before * shape->kv_heads + head * (one->far.stop - one->far.first);
}

/* What a row finds among the chosen units of an item: part by part, as many units at once as are wholly in one. */
static void attend_chosen(const Shape *shape, const RowPlan *plan, const Item *item, const Rows *rows,
                          const Source *source, const int32_t *chosen, const State *found) {
    int64_t group = group_of(shape), width = padded(shape->value_dim);
    float other_in[group * state_floats(shape)] __attribute__((aligned(64)));
    State other = {other_in, other_in + group * width, other_in + group * (width + LANES)};
    state_clear(found, group, shape->value_dim);
    for (int64_t part = 0; part < plan->rows[item->first].reading->num_parts; part++) {
        Read read = read_of(plan, item->first, 1, part);
        int64_t low, high, count = 0;
        int32_t units[BLOCK / UNIT];
        seen_of(plan, item->first, 1, part, &low, &high);
        for (int64_t n = item->begin; n <= item->end; n++) {
            int64_t begin = n < item->end ? (int64_t)chosen[n] * UNIT : high, end = begin + UNIT;
            if (begin >= low && end <= high) units[count++] = chosen[n];
            if (count == BLOCK / UNIT || (count && n == item->end)) {
                attend_units(shape, rows, &read, source, units, count, &other);
                state_merge(found, &other, group, shape->value_dim);
                count = 0;
            }
            if (begin < high && (begin < low || end > high) && attend(shape, rows, &read, source, begin, end, 0, &other))
                state_merge(found, &other, group, shape->value_dim);
        }
    }
}

/* Scores a slice at a time, since there may be fewer heads than threads; then what each head reads. */
static void rows_select(const Shape *shape, const RowPlan *plan, const void *query, const void *bounds, float *scratch) {
    enum { SLICES = 8 };
    int64_t heads = shape->kv_heads, work = plan->num_rows * heads;
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < work * SLICES; n++) {
        int64_t row = n / SLICES / heads, head = n / SLICES % heads, slice = n % SLICES;
        const Row *one = plan->rows + row;
        int64_t units = one->far.stop - one->far.first, begin = units * slice / SLICES, end = units * (slice + 1) / SLICES;
        if (!one->far.count) continue;
        score_units(shape, query, row * shape->query_heads * shape->head_dim, bounds, one->blocks, head,
                    one->far.first + begin, one->far.first + end, scores_at(shape, plan, scratch, row, head) + begin);
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < work; n++) {
        int64_t row = n / heads, head = n % heads;
        if (!plan->rows[row].far.count) continue;
        choose_units(&plan->rows[row].far, scores_at(shape, plan, scratch, row, head),
                     chosen_at(shape, plan, scratch, row, head));
    }
}

/* The first keys of an item, which a thread comes to next: nothing else asks for them before they are read. */
static void fetch_first(const Shape *shape, const RowPlan *plan, const Item *item, const Source *source) {
    int64_t low, high;
    if (item->part == CHOSEN) return;
    seen_of(plan, item->first, item->count, item->part, &low, &high);
    low = most(low, item->begin), high = least(high, item->end);
    fetch_keys(shape, source, low, least(low + AHEAD, high));
}

void rows_attend(const Shape *shape, const RowPlan *plan, const void *query, const void *keys, const void *values,
                 const void *bounds, float *scratch) {
    int64_t heads = shape->kv_heads, work = plan->num_items * heads, group = group_of(shape), tile = MAX_ROWS / group;
    int64_t row_size = shape->query_heads * shape->head_dim * (shape->query_dtype == FP32 ? 4 : 2);
    if (plan->num_chosen) rows_select(shape, plan, query, bounds, scratch);
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < work; n++) {
        const Item *item = plan->items + n / heads;
        int64_t first = item->first;
        Source source = {keys, values, plan->rows[first].blocks, n % heads};
        int64_t next = n + omp_get_num_threads();
        if (next < work) {
            const Item *then = plan->items + next / heads;
            Source there = {keys, values, plan->rows[then->first].blocks, next % heads};
            fetch_first(shape, plan, then, &there);
        }
        for (int64_t row = 0; row < item->count; row += tile) {
            Rows rows = {(const char *)query + first * row_size, plan->scales ? plan->scales + first : 0,
                         plan->rows[first].position, 0, row, least(row + tile, item->count)};
            State state = state_at(shape, scratch, item, n % heads, first + row);
            if (item->part == CHOSEN) {
                attend_chosen(shape, plan, item, &rows, &source, chosen_at(shape, plan, scratch, first, n % heads), &state);
                continue;
            }
            Read read = read_of(plan, first, item->count, item->part);
            if (!attend(shape, &rows, &read, &source, item->begin, item->end, 0, &state))
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

/* Floats of scratch for a plan. */
int64_t prerope_rows_scratch(const Shape *shape, const RowPlan *plan) {
    return (plan->num_found * found_floats(shape) + plan->num_chosen + plan->num_units) * shape->kv_heads;
}

/* query, out: [rows, Hq, D or Dv]. keys, values: [num_blocks, block_size, Hkv, D or Dv]. bounds: of keys, as in
 * select.h, where rows choose. sinks: [Hq] or null. */
void prerope_rows(const Shape *shape, const RowPlan *plan, const void *query, const void *keys, const void *values,
                  const void *bounds, const float *sinks, float *scratch, void *out) {
#pragma omp parallel
    {
        rows_attend(shape, plan, query, keys, values, bounds, scratch);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < plan->num_rows; row++) row_finish(shape, plan, row, sinks, scratch, out);
    }
}
