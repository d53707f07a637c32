/* The block map: see lhb_map.h. */
#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "lhb_fault.h"
#include "lhb_limits.h"
#include "lhb_lock.h"
#include "lhb_map.h"
#include "map_bits.h"

#define CHUNK_BLOCKS (1u << LHB_MAP_CHUNK_SHIFT)
#define HEAD_BYTES (CHUNK_BLOCKS / 8)
#define LOWER_BYTES CHUNK_BLOCKS
/* Sizes are signed 64-bit byte counts on disk. */
#define BLOCKS_MAX (UINT64_C (1) << (63 - LHB_BLOCK_SHIFT))

/* Both entries are either a pointer to a chunk's array or, when all blocks are
 * alike, their value: 0, or an odd number. */
struct chunk {
  uintptr_t head;
  uintptr_t lower;
  uint32_t head_set;                    /* bits set, while 'head' points */
};

struct stripe {
  _Alignas (64) struct lhb_lock lock;
};

struct lhb_map {
  struct stripe stripes[LHB_MAP_STRIPES];
  struct chunk *chunks;
  uint64_t chunk_count;
  uint64_t blocks;
  _Atomic uint64_t bytes;
};

/* The part of a range that lies in one chunk. */
struct span {
  struct chunk *chunk;
  struct lhb_lock *lock;
  uint32_t first, end;                  /* blocks in the chunk */
  uint32_t size;                        /* blocks the chunk has at all */
};

static inline uintptr_t
uniform (uint8_t value)
{
  return value == 0 ? 0 : (uintptr_t) value << 1 | 1;
}

#define HEAD_NONE 0
#define HEAD_ALL uniform (1)

static inline bool
is_uniform (uintptr_t entry)
{
  return entry == 0 || (entry & 1) != 0;
}

static inline uint8_t
uniform_value (uintptr_t entry)
{
  return (uint8_t) (entry >> 1);
}

static inline uint64_t *
array_of (uintptr_t entry)
{
  return (uint64_t *) entry;
}

static inline struct span
span_at (struct lhb_map *map, uint64_t block, uint64_t blocks)
{
  uint64_t index = block >> LHB_MAP_CHUNK_SHIFT;
  uint64_t size = map->blocks - (index << LHB_MAP_CHUNK_SHIFT);
  struct span span;

  assert (block < map->blocks && blocks <= map->blocks - block);
  span.chunk = &map->chunks[index];
  span.lock = &map->stripes[index % LHB_MAP_STRIPES].lock;
  span.size = size < CHUNK_BLOCKS ? (uint32_t) size : CHUNK_BLOCKS;
  span.first = (uint32_t) (block & (CHUNK_BLOCKS - 1));
  span.end = blocks < span.size - span.first ? span.first + (uint32_t) blocks
                                             : span.size;
  return span;
}

static inline bool
is_whole (const struct span *span)
{
  return span->first == 0 && span->end == span->size;
}

/* Every span of [block, block + blocks) in turn. */
#define FOR_SPANS(map, span, block, blocks)                                   \
  for (struct span span;                                                      \
       (blocks) > 0                                                           \
       && (span = span_at ((map), (block), (blocks)), true);                  \
       (block) += span.end - span.first, (blocks) -= span.end - span.first)

/* ---- Memory.  Chunks are charged to map->bytes. */

static void *
array_new (struct lhb_map *map, size_t bytes)
{
  void *array;

  if (lhb_fault (LHB_FAULT_MAP_ALLOC, 0) != 0)
    return NULL;
  array = malloc (bytes);
  if (array != NULL)
    atomic_fetch_add_explicit (&map->bytes, bytes, memory_order_relaxed);
  return array;
}

/* Replace an entry, which may point to an array of 'bytes', by a value. */
static void
entry_make_uniform (struct lhb_map *map, uintptr_t *entry, size_t bytes,
                    uint8_t value)
{
  if (!is_uniform (*entry)) {
    free (array_of (*entry));
    atomic_fetch_sub_explicit (&map->bytes, bytes, memory_order_relaxed);
  }
  *entry = uniform (value);
}

static int
lower_make_array (struct lhb_map *map, struct chunk *chunk)
{
  uint64_t *bytes;

  if (!is_uniform (chunk->lower))
    return 0;
  bytes = array_new (map, LOWER_BYTES);
  if (bytes == NULL)
    return -ENOMEM;
  memset (bytes, uniform_value (chunk->lower), LOWER_BYTES);
  chunk->lower = (uintptr_t) bytes;
  return 0;
}

/* 'size': blocks of the chunk; bits beyond it stay clear. */
static int
head_make_array (struct lhb_map *map, struct chunk *chunk, uint32_t size)
{
  uint64_t *bits;

  if (!is_uniform (chunk->head))
    return 0;
  bits = array_new (map, HEAD_BYTES);
  if (bits == NULL)
    return -ENOMEM;
  memset (bits, 0, HEAD_BYTES);
  chunk->head_set = chunk->head == HEAD_ALL
                    ? bits_assign (bits, 0, size, true) : 0;
  chunk->head = (uintptr_t) bits;
  return 0;
}

static void
head_collapse (struct lhb_map *map, const struct span *span)
{
  struct chunk *chunk = span->chunk;

  if (!is_uniform (chunk->head) && chunk->head_set == span->size)
    entry_make_uniform (map, &chunk->head, HEAD_BYTES, 1);
}

/* Called after updates that could have made all bytes alike.  The first two
 * comparisons answer nearly always, so that filling a chunk block by block
 * does not scan it as often as it has blocks. */
static void
lower_collapse (struct lhb_map *map, const struct span *span)
{
  const uint8_t *bytes;

  if (is_uniform (span->chunk->lower))
    return;
  bytes = (const uint8_t *) array_of (span->chunk->lower);
  if (bytes[0] == bytes[span->first] && bytes[0] == bytes[span->size - 1]
      && memcmp (bytes, bytes + 1, span->size - 1) == 0)
    entry_make_uniform (map, &span->chunk->lower, LOWER_BYTES, bytes[0]);
}

/* ---- Life. */

static uint64_t
chunks_of (uint64_t blocks)
{
  return (blocks + CHUNK_BLOCKS - 1) >> LHB_MAP_CHUNK_SHIFT;
}

int
lhb_map_open (uint64_t blocks, struct lhb_map **map_out)
{
  struct lhb_map *map;

  if (blocks == 0 || blocks > BLOCKS_MAX)
    return -EINVAL;
  if (lhb_fault (LHB_FAULT_MAP_ALLOC, 0) != 0)
    return -ENOMEM;
  map = aligned_alloc (_Alignof (struct lhb_map), sizeof *map);
  if (map == NULL)
    return -ENOMEM;
  memset (map, 0, sizeof *map);
  map->blocks = blocks;
  map->chunk_count = chunks_of (blocks);
  /* Pages of the table that are never touched cost nothing. */
  map->chunks = calloc (map->chunk_count, sizeof *map->chunks);
  if (map->chunks == NULL) {
    free (map);
    return -ENOMEM;
  }
  atomic_init (&map->bytes,
               sizeof *map + map->chunk_count * sizeof *map->chunks);
  *map_out = map;
  return 0;
}

void
lhb_map_close (struct lhb_map *map)
{
  if (map == NULL)
    return;
  for (uint64_t i = 0; i < map->chunk_count; i++) {
    entry_make_uniform (map, &map->chunks[i].head, HEAD_BYTES, 0);
    entry_make_uniform (map, &map->chunks[i].lower, LOWER_BYTES, 0);
  }
  free (map->chunks);
  free (map);
}

/* The chunk that was the last one, of 'size' blocks, is about to have more.
 * -ENOMEM: the map means what it meant before. */
static int
prepare_last_chunk (struct lhb_map *map, struct chunk *chunk, uint32_t size)
{
  int error = 0;

  if (chunk->head != HEAD_NONE)
    error = head_make_array (map, chunk, size);
  if (error == 0 && chunk->lower != uniform (0))
    error = lower_make_array (map, chunk);
  if (error == 0 && !is_uniform (chunk->lower))
    memset ((uint8_t *) array_of (chunk->lower) + size, 0, LOWER_BYTES - size);
  return error;
}

int
lhb_map_resize (struct lhb_map *map, uint64_t blocks)
{
  uint64_t chunk_count = chunks_of (blocks);
  uint64_t added = chunk_count - map->chunk_count;
  uint32_t last_size = (uint32_t) (map->blocks & (CHUNK_BLOCKS - 1));
  int error;

  if (blocks < map->blocks || blocks > BLOCKS_MAX)
    return -EINVAL;
  if (last_size != 0 && blocks > map->blocks) {
    error = prepare_last_chunk (map, &map->chunks[map->chunk_count - 1],
                                last_size);
    if (error != 0)
      return error;
  }
  if (added > 0) {
    struct chunk *chunks;

    if (lhb_fault (LHB_FAULT_MAP_ALLOC, 0) != 0)
      return -ENOMEM;
    chunks = realloc (map->chunks, chunk_count * sizeof *chunks);
    if (chunks == NULL)
      return -ENOMEM;
    memset (chunks + map->chunk_count, 0, added * sizeof *chunks);
    map->chunks = chunks;
    map->chunk_count = chunk_count;
    atomic_fetch_add_explicit (&map->bytes, added * sizeof *chunks,
                               memory_order_relaxed);
  }
  map->blocks = blocks;
  return 0;
}

/* ---- Questions. */

static struct lhb_run
chunk_lookup (const struct span *span)
{
  const struct chunk *chunk = span->chunk;
  struct lhb_run run = { .blocks = span->end - span->first };

  if (chunk->head == HEAD_ALL) {
    run.layer = LHB_MAP_HEAD;
    return run;
  }
  if (chunk->head != HEAD_NONE) {
    const uint64_t *bits = array_of (chunk->head);

    run.blocks = bits_run (bits, span->first, span->end);
    if ((bits[span->first / 64] >> span->first % 64 & 1) != 0) {
      run.layer = LHB_MAP_HEAD;
      return run;
    }
  }
  if (is_uniform (chunk->lower))
    run.layer = uniform_value (chunk->lower);
  else {
    const uint64_t *bytes = array_of (chunk->lower);

    run.layer = ((const uint8_t *) bytes)[span->first];
    run.blocks = bytes_run (bytes, span->first, span->first + run.blocks);
  }
  assert (run.layer != LHB_MAP_HEAD);
  return run;
}

struct lhb_run
lhb_map_lookup (struct lhb_map *map, uint64_t block, uint32_t blocks_max)
{
  struct span span = span_at (map, block, blocks_max);
  struct lhb_run run;

  assert (blocks_max > 0);
  lhb_lock_take (span.lock);
  run = chunk_lookup (&span);
  lhb_lock_drop (span.lock);
  return run;
}

bool
lhb_map_any_lower (struct lhb_map *map, uint64_t block, uint64_t blocks)
{
  bool found = false;

  FOR_SPANS (map, span, block, blocks) {
    lhb_lock_take (span.lock);
    if (is_uniform (span.chunk->lower))
      found = span.chunk->lower != uniform (0);
    else {
      const uint64_t *bytes = array_of (span.chunk->lower);

      found = ((const uint8_t *) bytes)[span.first] != 0
              || bytes_run (bytes, span.first, span.end)
                 < span.end - span.first;
    }
    lhb_lock_drop (span.lock);
    if (found)
      break;
  }
  return found;
}

bool
lhb_map_any_head (struct lhb_map *map, uint64_t block, uint64_t blocks)
{
  bool found = false;

  FOR_SPANS (map, span, block, blocks) {
    lhb_lock_take (span.lock);
    if (is_uniform (span.chunk->head))
      found = span.chunk->head == HEAD_ALL;
    else {
      const uint64_t *bits = array_of (span.chunk->head);

      found = (bits[span.first / 64] >> span.first % 64 & 1) != 0
              || bits_run (bits, span.first, span.end)
                 < span.end - span.first;
    }
    lhb_lock_drop (span.lock);
    if (found)
      break;
  }
  return found;
}

uint64_t
lhb_map_blocks (const struct lhb_map *map)
{
  return map->blocks;
}

uint64_t
lhb_map_bytes (const struct lhb_map *map)
{
  return atomic_load_explicit (&map->bytes, memory_order_relaxed);
}

/* ---- Updates of the head. */

int
lhb_map_reserve_head (struct lhb_map *map, uint64_t block, uint64_t blocks)
{
  int error = 0;

  FOR_SPANS (map, span, block, blocks) {
    lhb_lock_take (span.lock);
    if (span.chunk->head == HEAD_NONE)
      error = head_make_array (map, span.chunk, span.size);
    lhb_lock_drop (span.lock);
    if (error != 0)
      break;
  }
  return error;
}

void
lhb_map_set_head (struct lhb_map *map, uint64_t block, uint64_t blocks)
{
  FOR_SPANS (map, span, block, blocks) {
    struct chunk *chunk = span.chunk;

    lhb_lock_take (span.lock);
    assert (chunk->head != HEAD_NONE);  /* reserved */
    if (chunk->head != HEAD_ALL) {
      chunk->head_set += bits_assign (array_of (chunk->head), span.first,
                                      span.end, true);
      head_collapse (map, &span);
    }
    lhb_lock_drop (span.lock);
  }
}

/* A head array is given back only when the whole chunk is discarded.  Then
 * the caller's claim covers the chunk, so nobody else has a reservation in
 * it, which the array would have to honour. */
static int
chunk_discard (struct lhb_map *map, const struct span *span)
{
  struct chunk *chunk = span->chunk;

  if (is_whole (span)) {
    entry_make_uniform (map, &chunk->head, HEAD_BYTES, 0);
    entry_make_uniform (map, &chunk->lower, LOWER_BYTES, 0);
    return 0;
  }
  if (chunk->lower != uniform (0)) {
    if (lower_make_array (map, chunk) != 0)
      return -ENOMEM;
    if (chunk->head == HEAD_ALL
        && head_make_array (map, chunk, span->size) != 0) {
      lower_collapse (map, span);
      return -ENOMEM;
    }
    memset ((uint8_t *) array_of (chunk->lower) + span->first, 0,
            span->end - span->first);
    lower_collapse (map, span);
  }
  else if (chunk->head == HEAD_ALL
           && head_make_array (map, chunk, span->size) != 0)
    return -ENOMEM;
  if (chunk->head != HEAD_NONE)
    chunk->head_set -= bits_assign (array_of (chunk->head), span->first,
                                    span->end, false);
  return 0;
}

int
lhb_map_discard (struct lhb_map *map, uint64_t block, uint64_t blocks)
{
  int error = 0;

  FOR_SPANS (map, span, block, blocks) {
    lhb_lock_take (span.lock);
    error = chunk_discard (map, &span);
    lhb_lock_drop (span.lock);
    if (error != 0)
      break;
  }
  return error;
}

/* ---- Updates of the layers below. */

static int
chunk_fill_lower (struct lhb_map *map, const struct span *span, uint8_t layer)
{
  struct chunk *chunk = span->chunk;

  if (chunk->lower == uniform (layer))
    return 0;
  if (is_whole (span)) {
    entry_make_uniform (map, &chunk->lower, LOWER_BYTES, layer);
    return 0;
  }
  if (lower_make_array (map, chunk) != 0)
    return -ENOMEM;
  memset ((uint8_t *) array_of (chunk->lower) + span->first, layer,
          span->end - span->first);
  lower_collapse (map, span);
  return 0;
}

static int
fill_lower (struct lhb_map *map, uint64_t block, uint64_t blocks,
            uint8_t layer)
{
  int error = 0;

  FOR_SPANS (map, span, block, blocks) {
    lhb_lock_take (span.lock);
    error = chunk_fill_lower (map, &span, layer);
    lhb_lock_drop (span.lock);
    if (error != 0)
      break;
  }
  return error;
}

int
lhb_map_add_layer (struct lhb_map *map, uint8_t layer, uint64_t block,
                   uint64_t blocks)
{
  assert (layer != LHB_MAP_ZERO && layer != LHB_MAP_HEAD);
  return fill_lower (map, block, blocks, layer);
}

int
lhb_map_add_discard (struct lhb_map *map, uint64_t block, uint64_t blocks)
{
  return fill_lower (map, block, blocks, LHB_MAP_ZERO);
}

/* A fold turns this chunk's lower entry from a value into an array. */
static bool
fold_needs_array (const struct chunk *chunk, uint8_t layer)
{
  return !is_uniform (chunk->head) && chunk->head_set > 0
         && is_uniform (chunk->lower) && chunk->lower != uniform (layer);
}

/* Take all arrays that the fold needs, linked through their first words. */
static int
fold_reserve (struct lhb_map *map, uint8_t layer, uint64_t **spare_out)
{
  uint64_t *spare = NULL;

  for (uint64_t i = 0; i < map->chunk_count; i++) {
    uint64_t *array;

    if (!fold_needs_array (&map->chunks[i], layer))
      continue;
    array = array_new (map, LOWER_BYTES);
    if (array == NULL)
      goto fail;
    *array = (uintptr_t) spare;
    spare = array;
  }
  *spare_out = spare;
  return 0;

fail:
  while (spare != NULL) {
    uintptr_t entry = (uintptr_t) spare;

    spare = (uint64_t *) (uintptr_t) *spare;
    entry_make_uniform (map, &entry, LOWER_BYTES, 0);
  }
  return -ENOMEM;
}

int
lhb_map_fold_head (struct lhb_map *map, uint8_t layer)
{
  uint64_t *spare;
  int error;

  assert (layer != LHB_MAP_ZERO && layer != LHB_MAP_HEAD);
  error = fold_reserve (map, layer, &spare);
  if (error != 0)
    return error;
  for (uint64_t i = 0; i < map->chunk_count; i++) {
    struct span span = span_at (map, i << LHB_MAP_CHUNK_SHIFT, 1);
    struct chunk *chunk = span.chunk;

    if (chunk->head == HEAD_NONE)
      continue;
    if (chunk->head == HEAD_ALL)
      entry_make_uniform (map, &chunk->lower, LOWER_BYTES, layer);
    else if (chunk->head_set > 0 && chunk->lower != uniform (layer)) {
      const uint64_t *bits = array_of (chunk->head);

      if (fold_needs_array (chunk, layer)) {
        uint64_t *array = spare;

        spare = (uint64_t *) (uintptr_t) *array;
        memset (array, uniform_value (chunk->lower), LOWER_BYTES);
        chunk->lower = (uintptr_t) array;
      }
      for (uint32_t w = 0; w < CHUNK_BLOCKS / 64; w++)
        if (bits[w] != 0)
          bytes_store (array_of (chunk->lower) + w * 8, bits[w], layer);
      lower_collapse (map, &span);
    }
    entry_make_uniform (map, &chunk->head, HEAD_BYTES, 0);
  }
  assert (spare == NULL);
  return 0;
}

/* Relabel in two arrays; 'bits' is NULL unless the head gets the blocks and
 * does not have all of them already.  Returns the number of new head bits. */
static uint32_t
relabel_arrays (uint64_t *bytes, uint64_t *bits, const struct span *span,
                uint8_t from, uint8_t to)
{
  uint32_t added = 0;

  for (uint32_t w = span->first / 64; w * 64 < span->end; w++) {
    uint64_t match = bytes_match (bytes + w * 8, from)
                     & bits_mask (w, span->first, span->end);

    if (match == 0)
      continue;
    bytes_store (bytes + w * 8, match, to);
    if (bits != NULL) {
      added += (uint32_t) __builtin_popcountll (match & ~bits[w]);
      bits[w] |= match;
    }
  }
  return added;
}

static int
chunk_relabel (struct lhb_map *map, const struct span *span, uint8_t from,
               uint8_t to)
{
  struct chunk *chunk = span->chunk;
  uint64_t *bits = NULL;

  if (is_uniform (chunk->lower) && chunk->lower != uniform (from))
    return 0;
  if (chunk->lower == uniform (from) && is_whole (span)) {
    chunk->lower = uniform (to);
    if (to == LHB_MAP_HEAD)
      entry_make_uniform (map, &chunk->head, HEAD_BYTES, 1);
    return 0;
  }
  if (!is_uniform (chunk->lower)
      && memchr ((uint8_t *) array_of (chunk->lower) + span->first, from,
                 span->end - span->first) == NULL)
    return 0;
  if (lower_make_array (map, chunk) != 0)
    return -ENOMEM;
  if (to == LHB_MAP_HEAD && chunk->head != HEAD_ALL) {
    if (head_make_array (map, chunk, span->size) != 0) {
      lower_collapse (map, span);
      return -ENOMEM;
    }
    bits = array_of (chunk->head);
  }
  chunk->head_set += relabel_arrays (array_of (chunk->lower), bits, span,
                                     from, to);
  lower_collapse (map, span);
  head_collapse (map, span);
  return 0;
}

int
lhb_map_relabel (struct lhb_map *map, uint64_t block, uint64_t blocks,
                 uint8_t from, uint8_t to)
{
  int error = 0;

  assert (from != LHB_MAP_ZERO && from != LHB_MAP_HEAD);
  assert (to != LHB_MAP_ZERO);
  FOR_SPANS (map, span, block, blocks) {
    lhb_lock_take (span.lock);
    error = chunk_relabel (map, &span, from, to);
    lhb_lock_drop (span.lock);
    if (error != 0)
      break;
  }
  return error;
}
