/* Many query rows over the raw keys of their sequence: one prefill chunk, or several of one sequence.
 *
 * Rows come in *runs* of consecutive positions that share a reading. Keys come in *passes*, one for each way of turning keys: a pass packs what
 * it turns once, for all runs. A *read* says which of a pass's keys the rows of one run see, and by what their queries
 * are turned; every row sees one stretch of keys a read.
 *
 *     unit: a span of a pass and one KV head: keys and values turned and packed, in L2
 *     tile: up to MAX_ROWS rows × heads of its group; all tiles read the unit
 *
 * Threads share a unit's tiles, and pack the next unit where no tile is left. A tile's results of a span are merged with
 * those of the spans before it as soon as they are there.
 */
#include "attend.h"

typedef struct {
    int64_t num_passes, num_runs, num_tiles;
    const int64_t *low, *high;         /* [passes]: keys [low, high) are packed */
    const Turns *const *turns;         /* [passes] */
    const int64_t *first_read;         /* [passes·runs + 1]: the first read of each pass and run */
    const Read *reads;
    const int64_t *run_first;          /* [runs]: its first row */
    const int64_t *run_start;          /* [runs]: what is added to one of its rows for its position */
    const int64_t *tile_run, *tile_first, *tile_stop; /* [tiles]: rows [first, stop) of a run, in order */
    const float *row_scale;            /* [rows] or null: on each row's queries, beside scale */
    const int64_t *blocks;             /* [blocks of the sequence] */
} Plan;

/* What all threads work on together: a span of a pass's keys, of one kv head. */
typedef struct {
    int64_t pass, head, begin, end;
} Unit;

INLINE int64_t packed_floats(const Shape *shape) { return packed_keys(shape, SPAN) + packed_values(shape, SPAN); }
INLINE int64_t rows_in_all(const Plan *plan) { return plan->num_tiles ? plan->tile_stop[plan->num_tiles - 1] : 0; }

static int64_t rows_of(const Shape *shape, const Plan *plan, int64_t t) {
    return (plan->tile_stop[t] - plan->tile_first[t]) * group_of(shape);
}

INLINE State state_in(const Shape *shape, float *out, int64_t rows) {
    float *sums = out + rows * padded(shape->value_dim);
    return (State){out, sums, sums + LANES * rows};
}

static State state_of(const Shape *shape, const Plan *plan, float *scratch, int64_t head, int64_t tile) {
    int64_t before = (head * rows_in_all(plan) + plan->tile_first[tile]) * group_of(shape);
    float *out = scratch + 2 * packed_floats(shape) + before * state_floats(shape);
    return state_in(shape, out, rows_of(shape, plan, tile));
}

static Packed packed_at(const Shape *shape, float *scratch, int64_t unit) {
    float *keys = scratch + unit % 2 * packed_floats(shape);
    return (Packed){keys, keys + packed_keys(shape, SPAN)};
}

int64_t prerope_chunk_scratch(const Shape *shape, const Plan *plan) {
    return 2 * packed_floats(shape) + shape->query_heads * rows_in_all(plan) * state_floats(shape);
}

/* The unit with this number; pass is num_passes where there are no more. */
static Unit unit_at(const Shape *shape, const Plan *plan, int64_t number) {
    Unit unit = {0};
    for (; unit.pass < plan->num_passes; unit.pass++) {
        int64_t first = plan->low[unit.pass] / SPAN * SPAN, high = plan->high[unit.pass];
        int64_t units = (high - first + SPAN - 1) / SPAN * shape->kv_heads;
        if (number < units) {
            unit.head = number % shape->kv_heads;
            unit.begin = first + number / shape->kv_heads * SPAN;
            unit.end = least(unit.begin + SPAN, high);
            break;
        }
        number -= units;
    }
    return unit;
}

/* Tile t through all reads of a unit's keys. */
static void tile_attend(const Shape *shape, const Plan *plan, int64_t t, const Unit *unit, const void *query,
                        const Source *source, float *scratch, int64_t number) {
    float found_in[MAX_ROWS * state_floats(shape)] __attribute__((aligned(64)));
    int64_t run = plan->tile_run[t], at = unit->pass * plan->num_runs + run;
    Packed packed = packed_at(shape, scratch, number);
    State state = state_of(shape, plan, scratch, unit->head, t), found = state_in(shape, found_in, MAX_ROWS);
    Rows rows = {query, plan->row_scale, plan->run_start[run], plan->run_first[run], plan->tile_first[t], plan->tile_stop[t]};
    for (int64_t read = plan->first_read[at]; read < plan->first_read[at + 1]; read++)
        if (attend(shape, &rows, plan->reads + read, source, unit->begin, unit->end, &packed, &found))
            state_merge(&state, &found, rows_of(shape, plan, t), shape->value_dim);
}

static void tile_finish(const Shape *shape, const Plan *plan, int64_t t, int64_t head, const float *sinks, float *scratch,
                        void *out) {
    int64_t group = group_of(shape);
    State state = state_of(shape, plan, scratch, head, t);
    for (int64_t n = 0; n < rows_of(shape, plan, t); n++) {
        int64_t row = plan->tile_first[t] + n / group, h = head * group + n % group;
        state_finish(shape, &state, n, sinks ? sinks + h : 0, (row * shape->query_heads + h) * shape->value_dim, out);
    }
}

/* query, out: [rows, Hq, D or Dv]. keys, values: [num_blocks, block_size, Hkv, D or Dv]. sinks: [Hq] fp32 or null.
 * scratch: as many floats as prerope_chunk_scratch says. */
void prerope_chunk(const Shape *shape, const Plan *plan, const void *query, const void *keys, const void *values,
                   const float *sinks, float *scratch, void *out) {
    int64_t heads = shape->kv_heads, tiles = plan->num_tiles;
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
        for (int64_t n = 0; n < heads * tiles; n++) {
            State state = state_of(shape, plan, scratch, n / tiles, n % tiles);
            state_clear(&state, rows_of(shape, plan, n % tiles), shape->value_dim);
        }
        Unit now = {.pass = -1}, next = unit_at(shape, plan, 0);
        for (int64_t number = 0; now.pass < plan->num_passes; number++, now = next, next = unit_at(shape, plan, number)) {
            Source source = {keys, values, plan->blocks, now.head};
            if (now.pass >= 0) {
#pragma omp for schedule(dynamic) nowait
                for (int64_t n = 0; n < tiles; n++)
                    tile_attend(shape, plan, tiles - 1 - n, &now, query, &source, scratch, number - 1);
            }
            Packed packed = packed_at(shape, scratch, number);
            int64_t packs = next.pass < plan->num_passes ? (next.end - next.begin + KEYS - 1) / KEYS : 0;
            source.head = next.head;
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < packs; n++) {
                Packed to = {packed.keys + packed_keys(shape, n * KEYS), packed.values + packed_values(shape, n * KEYS)};
                pack_tile(shape, &source, plan->turns[next.pass], next.begin + n * KEYS, plan->low[next.pass],
                          plan->high[next.pass], &to);
            }
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < heads * tiles; n++)
            tile_finish(shape, plan, n % tiles, n / tiles, sinks, scratch, out);
    }
}
