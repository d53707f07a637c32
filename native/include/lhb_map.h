/* Block map of one store: where the newest data of each block is.
 *
 * Two tables, both in lazily allocated chunks (1 << LHB_MAP_CHUNK_SHIFT
 * blocks).  'head' has one bit a block: the head file has it.  'lower' has one
 * byte a block: the id of the newest layer below the head that has it, 0 if
 * none, and LHB_MAP_HEAD if a merge took it from below into the head (then the
 * head bit is set, and an older layer may have the block still).  A chunk
 * whose blocks are all alike costs no memory beyond its table entry.  A block
 * discarded in the head is a block without head bit and with lower 0.
 *
 * Thread safety: every function may be called from any thread, unless it says
 * "frozen" (no other call may run then).  The caller's range claims keep two
 * updates of one block from racing; the map itself only protects its chunks.
 */
#ifndef LHB_MAP_H
#define LHB_MAP_H

#include <stdbool.h>
#include <stdint.h>

#define LHB_MAP_ZERO 0                  /* no layer has the block */
#define LHB_MAP_HEAD 255                /* the head has the block */

struct lhb_map;

struct lhb_run {
  uint32_t blocks;
  uint8_t layer;                        /* id, LHB_MAP_ZERO or LHB_MAP_HEAD */
};

int lhb_map_open (uint64_t blocks, struct lhb_map **map_out);
void lhb_map_close (struct lhb_map *map);
/* Frozen.  Grow only; new blocks are LHB_MAP_ZERO.  -ENOMEM: nothing
 * changed. */
int lhb_map_resize (struct lhb_map *map, uint64_t blocks);

/* The longest run of one layer starting at 'block', at most 'blocks_max' long.
 * It may be cut short at a chunk boundary. */
struct lhb_run lhb_map_lookup (struct lhb_map *map, uint64_t block,
                               uint32_t blocks_max);
/* Some block of the range has a lower layer (even if the head hides it). */
bool lhb_map_any_lower (struct lhb_map *map, uint64_t block, uint64_t blocks);
/* Some block of the range is in the head. */
bool lhb_map_any_head (struct lhb_map *map, uint64_t block, uint64_t blocks);

/* Make sure lhb_map_set_head on the range can not fail.  The caller holds its
 * claim on the range from here to lhb_map_set_head.  -ENOMEM. */
int lhb_map_reserve_head (struct lhb_map *map, uint64_t block, uint64_t blocks);
/* The head now has these blocks.  The range was reserved. */
void lhb_map_set_head (struct lhb_map *map, uint64_t block, uint64_t blocks);
/* The head no longer has these blocks and hides what is below.  -ENOMEM: maybe
 * for a first part of the range only. */
int lhb_map_discard (struct lhb_map *map, uint64_t block, uint64_t blocks);

/* Building, oldest layer first: this layer has data / has discards here.  Its
 * discards come before its data, which wins.  The head's data is added with
 * lhb_map_set_head.  -ENOMEM: close the map. */
int lhb_map_add_layer (struct lhb_map *map, uint8_t layer, uint64_t block,
                       uint64_t blocks);
int lhb_map_add_discard (struct lhb_map *map, uint64_t block, uint64_t blocks);

/* Frozen.  The head becomes layer 'layer'; the new head is empty.  -ENOMEM:
 * nothing changed. */
int lhb_map_fold_head (struct lhb_map *map, uint8_t layer);
/* Blocks of the range whose lower layer is 'from' get 'to'.  'to' may be
 * LHB_MAP_HEAD: then the head has them, 'from' is forgotten, and
 * lhb_map_any_lower still says that something is below.  -ENOMEM: maybe done
 * for a first part of the range; it may be called again. */
int lhb_map_relabel (struct lhb_map *map, uint64_t block, uint64_t blocks,
                     uint8_t from, uint8_t to);
uint64_t lhb_map_blocks (const struct lhb_map *map);
uint64_t lhb_map_bytes (const struct lhb_map *map);

#endif
