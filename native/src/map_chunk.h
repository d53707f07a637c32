/* The block map's chunks, for map.c and map_layers.c.  Whoever looks into a
 * chunk holds its lock, or the map is frozen.
 */
#ifndef LHB_MAP_CHUNK_H
#define LHB_MAP_CHUNK_H

#include <assert.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "lhb_limits.h"
#include "lhb_lock.h"
#include "lhb_map.h"
#include "map_bits.h"

#define CHUNK_BLOCKS (1u << LHB_MAP_CHUNK_SHIFT)
#define HEAD_BYTES (CHUNK_BLOCKS / 8)
#define LOWER_BYTES CHUNK_BLOCKS

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

/* A new array, charged to the map, or NULL. */
void *lhb_map_array_new (struct lhb_map *map, size_t bytes);
/* Replace an entry, which may point to an array of 'bytes', by a value. */
void lhb_map_make_uniform (struct lhb_map *map, uintptr_t *entry,
                           size_t bytes, uint8_t value);
/* Replace a value by an array that says the same.  -ENOMEM. */
int lhb_map_make_lower_array (struct lhb_map *map, struct chunk *chunk);
/* 'size': blocks of the chunk; bits beyond it stay clear. */
int lhb_map_make_head_array (struct lhb_map *map, struct chunk *chunk,
                             uint32_t size);
/* After updates of 'span' that could have made all blocks alike: if they are,
 * give the array back. */
void lhb_map_collapse_head (struct lhb_map *map, const struct span *span);
void lhb_map_collapse_lower (struct lhb_map *map, const struct span *span);

#endif
