/* Selection of far keys, for rows.c; after attend.h. */

/* Of the units [first, stop) a row reads `count`, each KV head its own; count 0: it reads all keys. */
typedef struct {
    int64_t count, first, stop;
} Far;

/* `chosen` [count], in ascending order, for one KV head of the row whose query [Hq, D] is at `query_at`.
 * bounds: [grains, 2, Hkv, D], as prerope_bounds makes them; blocks: of the row's sequence; scores: room for stop − first. */
void select_units(const Shape *shape, const void *query, int64_t query_at, const void *bounds, const int64_t *blocks,
                  int64_t head, const Far *far, uint32_t *scores, int32_t *chosen);
