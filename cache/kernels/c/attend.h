/* The arithmetic of attention, which rows.c and chunk.c share: rows of one sequence and one KV head over a stretch of keys.
 *
 * A score is (R(−κ(t0)) R(φ(i)) q_i) · (R(κ(j) − κ(t0)) k_j), where t0 is the first position of the key's tile. What keys
 * are turned by is a table of one tile, and all tiles share a few; what is left of κ is on the queries, once a tile. Each
 * turn is fp32. Where keys and values are bf16 and the processor multiplies pairs, turned queries and keys are rounded to
 * bf16 once, and so are weights; sums stay fp32.
 *
 * A score is summed over dims in one chain, and a row's values over keys in another. Blocks of keys share a maximum; spans
 * of blocks are summed by themselves and then merged in order. Blocks and spans lie on multiples of their size, and keys
 * that a row does not see weigh 0, which changes no bit. So a row's result depends on nothing but its keys: whoever walks
 * over its spans, alone or with the rest of its chunk, in whatever order, and merges them in order, finds the same.
 */
#include "rows.h"
#include "vectors.h"

#define KEYS 64  /* of a tile */
#define BLOCK 128
#define SPAN 512
#define ROWS 6 /* of a product */
#define UNIT 16 /* keys that a row reads together or leaves out; of cache/attention/selection.py */
#define LINE 64  /* bytes that memory gives at once, or less */
#define AHEAD 64 /* keys: so long before its use one is fetched */
#define MAX_ROWS 96 /* rows × query heads of a KV head */

/* How the keys of one map are turned; all null: they are read as they lie. */
typedef struct {
    const float *bases;   /* [tiles, rotary_dim]: cos κ(t0), −sin κ(t0) */
    const int32_t *table; /* [tiles] */
    const float *tables;  /* [tables, KEYS, rotary_dim]: cos, sin of κ(t0 + n) − κ(t0) */
    const float *fades;   /* [tiles, rotary_dim/2]: what is left of a pair's score so many tiles further, or null */
} Turns;

/* A part of a reading, as a run of rows sees it. */
typedef struct {
    const Turns *turns;
    const float *query; /* [rows of the run, rotary_dim]: cos, sin of φ(i); null: queries stay as they are */
    int64_t first_key, stop_key, d_min, d_max; /* first_key ≤ j < stop_key, d_min ≤ i − j < d_max */
} Read;

/* p ↦ min(⌊(p mod period)/group⌋ + shift, cap)·θ + offset, as rope.reading.AngleMap; period 0: does not wrap. */
typedef struct {
    const double *theta, *offset; /* [rotary_dim/2]; theta null: nothing turns; offset null: 0 */
    const int64_t *groups; /* [rotary_dim/2], of each pair, or null */
    int64_t period, group, shift, cap;
} AngleMap;

typedef struct {
    AngleMap query;
    const Turns *turns;
    int64_t first_key, stop_key, d_min, d_max;
} ReadingPart;

/* As rope.reading.Reading. */
typedef struct {
    int64_t num_parts, rotary_dim;
    const ReadingPart *parts;
    double factor;       /* on the queries: both attention factors */
    const double *decay; /* [rotary_dim/2] or null */
} Reading;

/* cos and sin of the rows start, start + 1, … as a part's queries: [count, rotary_dim]. */
void prerope_query_turns(const Reading *reading, int64_t part, int64_t start, int64_t count, float *to);

/* Where keys and values are: those of one KV head of a sequence. */
typedef struct {
    const void *keys, *values; /* [num_blocks, block_size, Hkv, D or Dv] */
    const int64_t *blocks;
    int64_t head;
} Source;

/* Rows first … stop − 1, all in the run that begins with row `run`; row n is at position `start` + n. */
typedef struct {
    const void *query; /* [rows of the chunk, Hq, D] */
    const float *scale; /* [rows of the chunk] or null */
    int64_t start, run, first, stop;
} Rows;

/* Of rows × heads of a group: sums of weighted values, of weights by lane, and the maxima they refer to. */
typedef struct {
    float *out, *sums, *maxima; /* [rows, padded value dim], [rows, LANES], [rows] */
} State;

/* Keys as [tiles, words of a key, KEYS], values as [keys, padded] or, in pairs, [keys / 2, padded] words. */
typedef struct {
    float *keys, *values;
} Packed;

INLINE int64_t padded(int64_t dim) { return (dim + 31) / 32 * 32; }
INLINE int64_t words_of(const Shape *shape) { return shape->dots ? padded(shape->head_dim) / 2 : shape->head_dim; }
INLINE int64_t packed_keys(const Shape *shape, int64_t keys) { return keys * words_of(shape); }
INLINE int64_t packed_values(const Shape *shape, int64_t keys) {
    return keys * padded(shape->value_dim) / (shape->dots ? 2 : 1);
}
INLINE int64_t state_floats(const Shape *shape) { return padded(shape->value_dim) + LANES + 1; } /* of a row of a State */
INLINE int64_t group_of(const Shape *shape) { return shape->query_heads / shape->kv_heads; }

/* Where UNIT columns of packed keys begin, from column n of a block on, and the rows of their values. */
INLINE Packed columns_at(const Shape *shape, const Packed *block, int64_t n) {
    return (Packed){block->keys + packed_keys(shape, n / KEYS * KEYS) + n % KEYS, block->values + packed_values(shape, n)};
}

/* Keys [begin, end) and their values into L2, from where they are read without waiting: blocks lie anywhere, which no
 * processor foresees. Not into L1, which waits for few lines at a time. */
void fetch_keys(const Shape *shape, const Source *source, int64_t begin, int64_t end);
/* Keys [low, high) of the tile from `tile` on, turned, and their values, to the tile's place in `to`. */
void pack_tile(const Shape *shape, const Source *source, const Turns *turns, int64_t tile, int64_t low, int64_t high,
               const Packed *to);
/* The same of one unit of keys, all of which are read, to its columns. */
void pack_unit(const Shape *shape, const Source *source, const Turns *turns, int64_t unit, const Packed *to);
/* What `rows` find among the keys [begin, end) of one span, to `found`; 0: none of them reads any. Keys are packed from
 * `begin` on, or, where `packed` is null, as they are needed. */
int attend(const Shape *shape, const Rows *rows, const Read *read, const Source *source, int64_t begin, int64_t end,
           const Packed *packed, const State *found);
/* The same of up to BLOCK / UNIT units of keys, anywhere, all of which the rows read. */
void attend_units(const Shape *shape, const Rows *rows, const Read *read, const Source *source, const int32_t *units,
                  int64_t count, const State *found);
void state_clear(const State *state, int64_t rows, int64_t dim);
void state_merge(const State *to, const State *from, int64_t rows, int64_t dim);
/* Sums divide, after a sink has taken its share: rows × heads of a group to the heads of `out`. */
void state_finish(const Shape *shape, const State *state, int64_t row, const float *sink, int64_t out_at, void *out);
