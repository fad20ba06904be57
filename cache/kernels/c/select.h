/* Selection of far keys, for rows.c; after attend.h. */

/* Of the units [first, stop) a row reads `count`, each KV head its own; count 0: it reads all keys. */
typedef struct {
    int64_t count, first, stop;
} Far;

/* Scores of the units [begin, end) for one KV head of the row whose query [Hq, D] is at `query_at`, as integers of their
 * order. bounds: [grains, 2, Hkv, D], as prerope_bounds makes them; blocks: of the row's sequence. */
void score_units(const Shape *shape, const void *query, int64_t query_at, const void *bounds, const int64_t *blocks,
                 int64_t head, int64_t begin, int64_t end, uint32_t *scores);
/* `chosen` [count], in ascending order, by the scores of all far units. */
void choose_units(const Far *far, const uint32_t *scores, int32_t *chosen);
