/* The block map: memory, questions and updates of the head.  See lhb_map.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lhb_fault.h"
#include "map_chunk.h"

/* Sizes are signed 64-bit byte counts on disk. */
#define BLOCKS_MAX (UINT64_C (1) << (63 - LHB_BLOCK_SHIFT))

/* ---- Memory.  Chunks are charged to map->bytes. */

void *
lhb_map_array_new (struct lhb_map *map, size_t bytes)
{
  void *array;

  if (lhb_fault (LHB_FAULT_MAP_ALLOC, 0) != 0)
    return NULL;
  array = malloc (bytes);
  if (array != NULL)
    atomic_fetch_add_explicit (&map->bytes, bytes, memory_order_relaxed);
  return array;
}

void
lhb_map_make_uniform (struct lhb_map *map, uintptr_t *entry, size_t bytes,
                      uint8_t value)
{
  if (!is_uniform (*entry)) {
    free (array_of (*entry));
    atomic_fetch_sub_explicit (&map->bytes, bytes, memory_order_relaxed);
  }
  *entry = uniform (value);
}

int
lhb_map_make_lower_array (struct lhb_map *map, struct chunk *chunk)
{
  uint64_t *bytes;

  if (!is_uniform (chunk->lower))
    return 0;
  bytes = lhb_map_array_new (map, LOWER_BYTES);
  if (bytes == NULL)
    return -ENOMEM;
  memset (bytes, uniform_value (chunk->lower), LOWER_BYTES);
  chunk->lower = (uintptr_t) bytes;
  return 0;
}

int
lhb_map_make_head_array (struct lhb_map *map, struct chunk *chunk,
                         uint32_t size)
{
  uint64_t *bits;

  if (!is_uniform (chunk->head))
    return 0;
  bits = lhb_map_array_new (map, HEAD_BYTES);
  if (bits == NULL)
    return -ENOMEM;
  memset (bits, 0, HEAD_BYTES);
  chunk->head_set = chunk->head == HEAD_ALL
                    ? bits_assign (bits, 0, size, true) : 0;
  chunk->head = (uintptr_t) bits;
  return 0;
}

void
lhb_map_collapse_head (struct lhb_map *map, const struct span *span)
{
  struct chunk *chunk = span->chunk;

  if (!is_uniform (chunk->head) && chunk->head_set == span->size)
    lhb_map_make_uniform (map, &chunk->head, HEAD_BYTES, 1);
}

/* The first two comparisons answer nearly always, so that filling a chunk
 * block by block does not scan it as often as it has blocks. */
void
lhb_map_collapse_lower (struct lhb_map *map, const struct span *span)
{
  const uint8_t *bytes;

  if (is_uniform (span->chunk->lower))
    return;
  bytes = (const uint8_t *) array_of (span->chunk->lower);
  if (bytes[0] == bytes[span->first] && bytes[0] == bytes[span->size - 1]
      && memcmp (bytes, bytes + 1, span->size - 1) == 0)
    lhb_map_make_uniform (map, &span->chunk->lower, LOWER_BYTES, bytes[0]);
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
    lhb_map_make_uniform (map, &map->chunks[i].head, HEAD_BYTES, 0);
    lhb_map_make_uniform (map, &map->chunks[i].lower, LOWER_BYTES, 0);
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
    error = lhb_map_make_head_array (map, chunk, size);
  if (error == 0 && chunk->lower != uniform (0))
    error = lhb_map_make_lower_array (map, chunk);
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
      error = lhb_map_make_head_array (map, span.chunk, span.size);
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
      lhb_map_collapse_head (map, &span);
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
    lhb_map_make_uniform (map, &chunk->head, HEAD_BYTES, 0);
    lhb_map_make_uniform (map, &chunk->lower, LOWER_BYTES, 0);
    return 0;
  }
  if (chunk->lower != uniform (0)) {
    if (lhb_map_make_lower_array (map, chunk) != 0)
      return -ENOMEM;
    if (chunk->head == HEAD_ALL
        && lhb_map_make_head_array (map, chunk, span->size) != 0) {
      lhb_map_collapse_lower (map, span);
      return -ENOMEM;
    }
    memset ((uint8_t *) array_of (chunk->lower) + span->first, 0,
            span->end - span->first);
    lhb_map_collapse_lower (map, span);
  }
  else if (chunk->head == HEAD_ALL
           && lhb_map_make_head_array (map, chunk, span->size) != 0)
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
