/* The block map: updates of the layers below the head.  See lhb_map.h. */
#include <errno.h>
#include <string.h>

#include "map_chunk.h"

static int
chunk_fill_lower (struct lhb_map *map, const struct span *span, uint8_t layer)
{
  struct chunk *chunk = span->chunk;

  if (chunk->lower == uniform (layer))
    return 0;
  if (is_whole (span)) {
    lhb_map_make_uniform (map, &chunk->lower, LOWER_BYTES, layer);
    return 0;
  }
  if (lhb_map_make_lower_array (map, chunk) != 0)
    return -ENOMEM;
  memset ((uint8_t *) array_of (chunk->lower) + span->first, layer,
          span->end - span->first);
  lhb_map_collapse_lower (map, span);
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
    array = lhb_map_array_new (map, LOWER_BYTES);
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
    lhb_map_make_uniform (map, &entry, LOWER_BYTES, 0);
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
      lhb_map_make_uniform (map, &chunk->lower, LOWER_BYTES, layer);
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
      lhb_map_collapse_lower (map, &span);
    }
    lhb_map_make_uniform (map, &chunk->head, HEAD_BYTES, 0);
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
      lhb_map_make_uniform (map, &chunk->head, HEAD_BYTES, 1);
    return 0;
  }
  if (!is_uniform (chunk->lower)
      && memchr ((uint8_t *) array_of (chunk->lower) + span->first, from,
                 span->end - span->first) == NULL)
    return 0;
  if (lhb_map_make_lower_array (map, chunk) != 0)
    return -ENOMEM;
  if (to == LHB_MAP_HEAD && chunk->head != HEAD_ALL) {
    if (lhb_map_make_head_array (map, chunk, span->size) != 0) {
      lhb_map_collapse_lower (map, span);
      return -ENOMEM;
    }
    bits = array_of (chunk->head);
  }
  chunk->head_set += relabel_arrays (array_of (chunk->lower), bits, span,
                                     from, to);
  lhb_map_collapse_lower (map, span);
  lhb_map_collapse_head (map, span);
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
