/* The block map. */
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>

#include "lhb_contract.h"
#include "lhb_limits.h"
#include "lhb_map.h"
#include "lhb_test.h"

#define CHUNK (1u << LHB_MAP_CHUNK_SHIFT)
#define TIB_BLOCKS (UINT64_C (1) << (40 - LHB_BLOCK_SHIFT))
#define MIB (UINT64_C (1) << 20)

static struct lhb_map *
open_map (uint64_t blocks)
{
  struct lhb_map *map;

  CHECK_EQUAL (lhb_map_open (blocks, &map), 0);
  return map;
}

static void
set_head (struct lhb_map *map, uint64_t block, uint64_t blocks)
{
  CHECK_EQUAL (lhb_map_reserve_head (map, block, blocks), 0);
  lhb_map_set_head (map, block, blocks);
}

static uint8_t
layer_at (struct lhb_map *map, uint64_t block)
{
  struct lhb_run run = lhb_map_lookup (map, block, 1);

  CHECK_EQUAL (run.blocks, 1);
  return run.layer;
}

/* ---- Meaning. */

static void
new_map_has_no_data (void)
{
  struct lhb_map *map = open_map (3 * CHUNK + 5);
  struct lhb_run run = lhb_map_lookup (map, 7, 1000);

  CHECK_EQUAL (lhb_map_blocks (map), 3 * CHUNK + 5);
  CHECK_EQUAL (run.layer, LHB_MAP_ZERO);
  CHECK_EQUAL (run.blocks, 1000);
  CHECK (!lhb_map_any_lower (map, 0, 3 * CHUNK + 5));
  CHECK (!lhb_map_any_head (map, 0, 3 * CHUNK + 5));
  lhb_map_close (map);
}

static void
impossible_sizes_are_refused (void)
{
  struct lhb_map *map = open_map (10);
  struct lhb_map *other;

  CHECK_EQUAL (lhb_map_open (0, &other), -EINVAL);
  CHECK_EQUAL (lhb_map_open (UINT64_MAX, &other), -EINVAL);
  CHECK_EQUAL (lhb_map_resize (map, 9), -EINVAL);
  CHECK_EQUAL (lhb_map_resize (map, UINT64_MAX), -EINVAL);
  CHECK_EQUAL (lhb_map_blocks (map), 10);
  lhb_map_close (map);
}

static void
newer_layer_wins_and_its_discard_hides_what_is_below (void)
{
  struct lhb_map *map = open_map (100);

  CHECK_EQUAL (lhb_map_add_layer (map, 1, 0, 50), 0);
  CHECK_EQUAL (lhb_map_add_discard (map, 10, 20), 0);
  CHECK_EQUAL (lhb_map_add_layer (map, 2, 25, 10), 0);
  CHECK_EQUAL (layer_at (map, 9), 1);
  CHECK_EQUAL (layer_at (map, 10), LHB_MAP_ZERO);
  CHECK_EQUAL (layer_at (map, 24), LHB_MAP_ZERO);
  CHECK_EQUAL (layer_at (map, 25), 2);      /* data wins over the discard */
  CHECK_EQUAL (layer_at (map, 34), 2);
  CHECK_EQUAL (layer_at (map, 35), 1);
  CHECK_EQUAL (layer_at (map, 50), LHB_MAP_ZERO);
  lhb_map_close (map);
}

static void
head_hides_the_layers_below_but_they_are_remembered (void)
{
  struct lhb_map *map = open_map (100);

  CHECK_EQUAL (lhb_map_add_layer (map, 7, 40, 20), 0);
  set_head (map, 30, 20);
  CHECK_EQUAL (lhb_map_lookup (map, 30, 70).blocks, 20);
  CHECK_EQUAL (layer_at (map, 49), LHB_MAP_HEAD);
  CHECK_EQUAL (layer_at (map, 50), 7);
  CHECK (lhb_map_any_lower (map, 40, 10));
  CHECK (!lhb_map_any_lower (map, 0, 40));
  CHECK (lhb_map_any_head (map, 0, 31));
  CHECK (!lhb_map_any_head (map, 0, 30));
  lhb_map_close (map);
}

static void
discard_hides_head_and_layers (void)
{
  struct lhb_map *map = open_map (2 * CHUNK);

  CHECK_EQUAL (lhb_map_add_layer (map, 7, 0, 2 * CHUNK), 0);
  set_head (map, 0, 2 * CHUNK);
  CHECK_EQUAL (lhb_map_discard (map, 5, CHUNK), 0);
  CHECK_EQUAL (layer_at (map, 4), LHB_MAP_HEAD);
  CHECK_EQUAL (layer_at (map, 5), LHB_MAP_ZERO);
  CHECK_EQUAL (layer_at (map, CHUNK + 4), LHB_MAP_ZERO);
  CHECK_EQUAL (layer_at (map, CHUNK + 5), LHB_MAP_HEAD);
  CHECK (!lhb_map_any_lower (map, 5, CHUNK));
  CHECK (!lhb_map_any_head (map, 5, CHUNK));
  lhb_map_close (map);
}

/* What a merge into the head leaves must survive a discard of the block: the
 * older layer may have it, so the store has to be told to record the trim. */
static void
merge_into_the_head_keeps_any_lower_but_not_the_id (void)
{
  struct lhb_map *map = open_map (100);

  CHECK_EQUAL (lhb_map_add_layer (map, 3, 0, 10), 0);
  CHECK_EQUAL (lhb_map_relabel (map, 0, 5, 3, LHB_MAP_HEAD), 0);
  CHECK_EQUAL (layer_at (map, 0), LHB_MAP_HEAD);
  CHECK_EQUAL (layer_at (map, 4), LHB_MAP_HEAD);
  CHECK_EQUAL (layer_at (map, 5), 3);
  CHECK (lhb_map_any_lower (map, 0, 1));
  CHECK_EQUAL (lhb_map_relabel (map, 0, 100, 3, 4), 0);
  CHECK_EQUAL (layer_at (map, 0), LHB_MAP_HEAD);
  CHECK_EQUAL (lhb_map_discard (map, 0, 1), 0);
  CHECK_EQUAL (layer_at (map, 0), LHB_MAP_ZERO);
  CHECK_EQUAL (lhb_map_fold_head (map, 9), 0);
  CHECK_EQUAL (layer_at (map, 1), 9);
  CHECK_EQUAL (layer_at (map, 5), 4);
  lhb_map_close (map);
}

/* A merge step is half a chunk; here they end inside chunks, too. */
static void
merge_into_the_head_in_steps_collapses_and_folds (void)
{
  const uint64_t step = CHUNK / 2 + 3;
  struct lhb_map *map = open_map (2 * CHUNK);
  uint64_t empty_bytes = lhb_map_bytes (map);

  CHECK_EQUAL (lhb_map_add_layer (map, 3, 0, 2 * CHUNK), 0);
  CHECK_EQUAL (lhb_map_relabel (map, 0, step, 3, LHB_MAP_HEAD), 0);
  CHECK_EQUAL (lhb_map_fold_head (map, 4), 0);
  CHECK_EQUAL (layer_at (map, step - 1), 4);
  CHECK_EQUAL (layer_at (map, step), 3);
  CHECK_EQUAL (lhb_map_relabel (map, 0, step, 4, 3), 0);
  CHECK_EQUAL (lhb_map_bytes (map), empty_bytes);
  for (uint64_t b = 0; b < 2 * CHUNK; b += step)
    CHECK_EQUAL (lhb_map_relabel (map, b, b + step < 2 * CHUNK
                                          ? step : 2 * CHUNK - b,
                                  3, LHB_MAP_HEAD), 0);
  CHECK_EQUAL (lhb_map_bytes (map), empty_bytes);
  CHECK_EQUAL (layer_at (map, 2 * CHUNK - 1), LHB_MAP_HEAD);
  lhb_map_close (map);
}

static void
resize_leaves_new_blocks_empty (void)
{
  struct lhb_map *map = open_map (CHUNK + 77);

  CHECK_EQUAL (lhb_map_add_layer (map, 2, 0, CHUNK + 77), 0);
  set_head (map, CHUNK, 77);
  CHECK_EQUAL (lhb_map_resize (map, 5 * CHUNK + 1), 0);
  CHECK_EQUAL (lhb_map_blocks (map), 5 * CHUNK + 1);
  CHECK_EQUAL (layer_at (map, CHUNK - 1), 2);
  CHECK_EQUAL (layer_at (map, CHUNK + 76), LHB_MAP_HEAD);
  CHECK (!lhb_map_any_head (map, CHUNK + 77, 4 * CHUNK - 76));
  CHECK (!lhb_map_any_lower (map, CHUNK + 77, 4 * CHUNK - 76));
  CHECK_EQUAL (layer_at (map, 5 * CHUNK), LHB_MAP_ZERO);
  lhb_map_close (map);
}

/* ---- Memory. */

static void
untouched_or_sequential_tib_takes_less_than_a_mib (void)
{
  /* A last chunk of one block, and pieces that end inside chunks. */
  const uint64_t blocks = TIB_BLOCKS + 1;
  const uint64_t piece = 3 * CHUNK / 2 + 11;
  struct lhb_map *map = open_map (blocks);

  CHECK (lhb_map_bytes (map) < MIB);
  for (uint64_t at = 0; at < blocks; at += piece) {
    uint64_t n = at + piece < blocks ? piece : blocks - at;

    CHECK_EQUAL (lhb_map_add_layer (map, 1, at, n), 0);
  }
  CHECK (lhb_map_bytes (map) < MIB);
  for (uint64_t at = 0; at < blocks; at += piece)
    set_head (map, at, at + piece < blocks ? piece : blocks - at);
  CHECK (lhb_map_bytes (map) < MIB);
  CHECK_EQUAL (lhb_map_fold_head (map, 2), 0);
  CHECK (lhb_map_bytes (map) < MIB);
  CHECK_EQUAL (lhb_map_relabel (map, 0, blocks, 2, LHB_MAP_HEAD), 0);
  CHECK (lhb_map_bytes (map) < MIB);
  CHECK_EQUAL (layer_at (map, TIB_BLOCKS), LHB_MAP_HEAD);
  CHECK_EQUAL (lhb_map_discard (map, 0, blocks), 0);
  CHECK (lhb_map_bytes (map) < MIB);
  lhb_map_close (map);
}

/* 1/16 TiB: what it takes is proportional, beyond the table. */
static void
fragmented_tib_takes_less_than_320_mib (void)
{
  const uint64_t blocks = TIB_BLOCKS / 16;
  struct lhb_map *map = open_map (blocks);

  for (uint64_t b = 0; b < blocks; b += 64)
    CHECK_EQUAL (lhb_map_add_layer (map, 1, b, 1), 0);
  for (uint64_t b = 1; b < blocks; b += 64)
    set_head (map, b, 1);
  CHECK (lhb_map_bytes (map) > 0);
  CHECK (lhb_map_bytes (map) < 320 * MIB / 16);
  CHECK_EQUAL (lhb_map_fold_head (map, 2), 0);
  CHECK (lhb_map_bytes (map) < 288 * MIB / 16);
  lhb_map_close (map);
}

static void
chunk_filled_by_single_blocks_collapses (void)
{
  struct lhb_map *map = open_map (2 * CHUNK);
  uint64_t empty_bytes = lhb_map_bytes (map);

  /* 7 and CHUNK have no common factor: every block once, out of order. */
  for (uint64_t i = 0; i < CHUNK; i++)
    set_head (map, CHUNK + i * 7 % CHUNK, 1);
  CHECK_EQUAL (lhb_map_bytes (map), empty_bytes);
  for (uint64_t i = 0; i < CHUNK; i++)
    CHECK_EQUAL (lhb_map_add_layer (map, 4, i * 7 % CHUNK, 1), 0);
  CHECK_EQUAL (lhb_map_bytes (map), empty_bytes);
  for (uint64_t i = 0; i < CHUNK; i++)
    CHECK_EQUAL (lhb_map_discard (map, i * 7 % CHUNK, 1), 0);
  CHECK_EQUAL (lhb_map_bytes (map), empty_bytes);
  CHECK (!lhb_map_any_lower (map, 0, 2 * CHUNK));
  lhb_map_close (map);
}

/* ---- Against a naive array. */

/* 3 whole chunks and a short one; a resize makes it 4 and a half. */
#define MODEL_BLOCKS (3 * CHUNK + 1234)
#define MODEL_BLOCKS_MAX (4 * CHUNK + CHUNK / 2)

struct model {
  uint64_t blocks;
  bool head[MODEL_BLOCKS_MAX];
  uint8_t lower[MODEL_BLOCKS_MAX];
};

static uint8_t
model_layer (const struct model *model, uint64_t block)
{
  return model->head[block] ? LHB_MAP_HEAD : model->lower[block];
}

static void
compare_all (struct lhb_map *map, const struct model *model)
{
  uint64_t block = 0;

  CHECK_EQUAL (lhb_map_blocks (map), model->blocks);
  while (block < model->blocks) {
    struct lhb_run run = lhb_map_lookup (map, block,
                                         (uint32_t) (model->blocks - block));

    CHECK (run.blocks > 0 && run.blocks <= model->blocks - block);
    for (uint32_t i = 0; i < run.blocks; i++)
      CHECK_EQUAL (run.layer, model_layer (model, block + i));
    block += run.blocks;
    /* The longest run, unless a chunk ends. */
    if (block < model->blocks && block % CHUNK != 0)
      CHECK (model_layer (model, block) != run.layer);
  }
}

static void
compare_some (struct lhb_map *map, const struct model *model, uint64_t block,
              uint64_t blocks)
{
  struct lhb_run run = lhb_map_lookup (map, block, (uint32_t) blocks);
  bool any_lower = false, any_head = false;
  uint64_t like = 0;

  while (like < blocks
         && model_layer (model, block + like) == model_layer (model, block))
    like++;
  for (uint64_t i = 0; i < blocks; i++) {
    any_lower |= model->lower[block + i] != 0;
    any_head |= model->head[block + i];
  }
  CHECK_EQUAL (run.layer, model_layer (model, block));
  CHECK (run.blocks == like
         || (run.blocks < like && (block + run.blocks) % CHUNK == 0));
  CHECK_EQUAL (lhb_map_any_lower (map, block, blocks), any_lower);
  CHECK_EQUAL (lhb_map_any_head (map, block, blocks), any_head);
}

/* Mostly a few blocks, sometimes whole chunks, aligned or nearly so. */
static void
random_range (uint64_t *random, uint64_t limit, uint64_t *block,
              uint64_t *blocks)
{
  uint64_t kind = lhb_test_below (random, 16);

  if (kind == 0) {
    *block = lhb_test_below (random, limit / CHUNK + 1) * CHUNK;
    *blocks = (1 + lhb_test_below (random, 2)) * CHUNK;
    if (*block > 0 && lhb_test_below (random, 2) == 0)
      *block -= 1;
  }
  else if (kind < 4) {
    *block = lhb_test_below (random, limit);
    *blocks = 1 + lhb_test_below (random, CHUNK);
  }
  else {
    *block = lhb_test_below (random, limit);
    *blocks = 1 + lhb_test_below (random, 200);
  }
  if (*block >= limit)
    *block = limit - 1;
  if (*blocks > limit - *block)
    *blocks = limit - *block;
}

static void
model_relabel (struct model *model, uint64_t block, uint64_t blocks,
               uint8_t from, uint8_t to)
{
  for (uint64_t b = block; b < block + blocks; b++) {
    if (model->lower[b] != from)
      continue;
    model->lower[b] = to;
    model->head[b] |= to == LHB_MAP_HEAD;
  }
}

/* One step on both; few layer ids, so that relabels find something. */
static void
model_step (struct lhb_map *map, struct model *model, uint64_t *random)
{
  uint64_t block, blocks;
  uint8_t layer = (uint8_t) (1 + lhb_test_below (random, 4));
  uint8_t other = (uint8_t) (1 + lhb_test_below (random, 4));

  random_range (random, model->blocks, &block, &blocks);
  switch (lhb_test_below (random, 24)) {
  case 0: case 1: case 2: case 3: case 4: case 5: case 6: case 7:
    set_head (map, block, blocks);
    memset (model->head + block, true, blocks);
    break;
  case 8: case 9: case 10: case 11:
    CHECK_EQUAL (lhb_map_discard (map, block, blocks), 0);
    memset (model->head + block, false, blocks);
    memset (model->lower + block, 0, blocks);
    break;
  case 12: case 13: case 14:
    CHECK_EQUAL (lhb_map_add_layer (map, layer, block, blocks), 0);
    memset (model->lower + block, layer, blocks);
    break;
  case 15: case 16: case 17: case 18:
    CHECK_EQUAL (lhb_map_relabel (map, block, blocks, layer, other), 0);
    model_relabel (model, block, blocks, layer, other);
    break;
  case 19: case 20:
    CHECK_EQUAL (lhb_map_relabel (map, block, blocks, layer, LHB_MAP_HEAD), 0);
    model_relabel (model, block, blocks, layer, LHB_MAP_HEAD);
    break;
  case 21:
    CHECK_EQUAL (lhb_map_add_discard (map, block, blocks), 0);
    memset (model->lower + block, 0, blocks);
    break;
  case 22:
    if (lhb_test_below (random, 8) != 0)
      break;
    CHECK_EQUAL (lhb_map_fold_head (map, layer), 0);
    for (uint64_t b = 0; b < model->blocks; b++)
      if (model->head[b])
        model->lower[b] = layer;
    memset (model->head, false, sizeof model->head);
    break;
  default:
    if (lhb_test_below (random, 64) != 0)
      break;
    model->blocks += lhb_test_below (random,
                                     MODEL_BLOCKS_MAX - model->blocks + 1);
    CHECK_EQUAL (lhb_map_resize (map, model->blocks), 0);
    break;
  }
}

static void
random_steps_agree_with_an_array (void)
{
  uint64_t random = lhb_test_seed;
  struct model *model = malloc (sizeof *model);

  CHECK (model != NULL);
  for (int round = 0; round < 6; round++) {
    struct lhb_map *map = open_map (MODEL_BLOCKS);

    memset (model, 0, sizeof *model);
    model->blocks = MODEL_BLOCKS;
    for (int step = 0; step < 1500; step++) {
      uint64_t block, blocks;

      model_step (map, model, &random);
      random_range (&random, model->blocks, &block, &blocks);
      compare_some (map, model, block, blocks);
      if (step % 50 == 0)
        compare_all (map, model);
    }
    compare_all (map, model);
    lhb_map_close (map);
  }
  free (model);
}

/* ---- No memory. */

static void
open_without_memory_fails (void)
{
  struct lhb_map *map;

  CHECK_EQUAL (lhb_fault_arm ("map.alloc", ENOMEM, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_map_open (100, &map), -ENOMEM);
  lhb_fault_clear ();
}

/* 4 chunks that need an array each; every one of the allocations fails once. */
static void
fold_without_memory_changes_nothing (void)
{
  struct lhb_map *map = open_map (4 * CHUNK);
  uint64_t bytes;

  CHECK_EQUAL (lhb_map_add_layer (map, 1, CHUNK, CHUNK), 0);
  for (uint64_t chunk = 0; chunk < 4; chunk++)
    set_head (map, chunk * CHUNK + 9, 100);
  bytes = lhb_map_bytes (map);
  for (uint64_t skip = 0; skip < 4; skip++) {
    CHECK_EQUAL (lhb_fault_arm ("map.alloc", ENOMEM, 0, skip, 1), 0);
    CHECK_EQUAL (lhb_map_fold_head (map, 2), -ENOMEM);
    lhb_fault_clear ();
    CHECK_EQUAL (lhb_map_bytes (map), bytes);
    for (uint64_t chunk = 0; chunk < 4; chunk++) {
      CHECK_EQUAL (layer_at (map, chunk * CHUNK + 9), LHB_MAP_HEAD);
      CHECK_EQUAL (layer_at (map, chunk * CHUNK), chunk == 1);
    }
  }
  CHECK_EQUAL (lhb_map_fold_head (map, 2), 0);
  CHECK_EQUAL (layer_at (map, 9), 2);
  CHECK_EQUAL (layer_at (map, CHUNK), 1);
  lhb_map_close (map);
}

static void
resize_without_memory_changes_nothing (void)
{
  struct lhb_map *map = open_map (10);

  CHECK_EQUAL (lhb_map_add_layer (map, 1, 0, 10), 0);
  set_head (map, 0, 10);
  /* The head's array, the lower's, the table. */
  for (uint64_t skip = 0; skip < 3; skip++) {
    CHECK_EQUAL (lhb_fault_arm ("map.alloc", ENOMEM, 0, 0, 1), 0);
    CHECK_EQUAL (lhb_map_resize (map, 2 * CHUNK), -ENOMEM);
    lhb_fault_clear ();
    CHECK_EQUAL (lhb_map_blocks (map), 10);
    CHECK_EQUAL (lhb_map_lookup (map, 0, 10).blocks, 10);
    CHECK_EQUAL (layer_at (map, 0), LHB_MAP_HEAD);
    CHECK_EQUAL (lhb_fault_arm ("map.alloc", ENOMEM, 0, skip, 1), 0);
    CHECK_EQUAL (lhb_map_resize (map, 2 * CHUNK), -ENOMEM);
    lhb_fault_clear ();
    set_head (map, 3, 1);               /* gives a head array back */
  }
  CHECK_EQUAL (lhb_map_resize (map, 2 * CHUNK), 0);
  CHECK_EQUAL (layer_at (map, 9), LHB_MAP_HEAD);
  CHECK_EQUAL (layer_at (map, 10), LHB_MAP_ZERO);
  lhb_map_close (map);
}

static void
updates_without_memory_leave_the_chunk_as_it_was (void)
{
  struct lhb_map *map = open_map (2 * CHUNK);

  CHECK_EQUAL (lhb_fault_arm ("map.alloc", ENOMEM, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_map_reserve_head (map, 0, 1), -ENOMEM);
  CHECK_EQUAL (lhb_map_add_layer (map, 1, 0, 2 * CHUNK), 0);
  set_head (map, 0, 2 * CHUNK);
  for (uint64_t skip = 0; skip < 2; skip++) {
    CHECK_EQUAL (lhb_fault_arm ("map.alloc", ENOMEM, 0, skip, 1), 0);
    CHECK_EQUAL (lhb_map_discard (map, 5, 1), -ENOMEM);
    CHECK_EQUAL (layer_at (map, 5), LHB_MAP_HEAD);
  }
  lhb_fault_clear ();
  CHECK_EQUAL (lhb_map_discard (map, 5, 1), 0);
  CHECK_EQUAL (lhb_map_fold_head (map, 1), 0);
  for (uint64_t skip = 0; skip < 2; skip++) {
    CHECK_EQUAL (lhb_fault_arm ("map.alloc", ENOMEM, 0, skip, 1), 0);
    CHECK_EQUAL (lhb_map_relabel (map, CHUNK, 7, 1, LHB_MAP_HEAD), -ENOMEM);
    CHECK_EQUAL (layer_at (map, CHUNK), 1);
  }
  lhb_fault_clear ();
  CHECK_EQUAL (lhb_map_relabel (map, CHUNK, 7, 1, LHB_MAP_HEAD), 0);
  CHECK_EQUAL (lhb_map_lookup (map, CHUNK, 10).blocks, 7);
  lhb_map_close (map);
}

/* A whole-chunk fill between reservation and set must not cost it. */
static void
reservation_outlives_collapse_and_discard (void)
{
  struct lhb_map *map = open_map (CHUNK);

  CHECK_EQUAL (lhb_map_reserve_head (map, 0, 1), 0);
  set_head (map, 1, CHUNK - 1);
  CHECK_EQUAL (lhb_map_discard (map, 1, CHUNK - 1), 0);
  CHECK_EQUAL (lhb_fault_arm ("map.alloc", ENOMEM, 0, 0, 1), 0);
  lhb_map_set_head (map, 0, 1);
  lhb_fault_clear ();
  CHECK_EQUAL (layer_at (map, 0), LHB_MAP_HEAD);
  CHECK_EQUAL (layer_at (map, 1), LHB_MAP_ZERO);
  lhb_map_close (map);
}

/* ---- Threads. */

#define THREADS 4
#define THREAD_STEPS 4000

struct worker {
  struct lhb_map *map;
  uint64_t index;
};

/* Each thread owns the blocks b with b / 64 % THREADS == index, of the same
 * three chunks, and sees only its own changes there. */
static void *
work_on_own_blocks (void *argument)
{
  struct worker *worker = argument;
  struct lhb_map *map = worker->map;
  uint64_t random = lhb_test_seed + worker->index;

  for (int step = 0; step < THREAD_STEPS; step++) {
    uint64_t group = lhb_test_below (&random, 3 * CHUNK / 64 / THREADS);
    uint64_t block = (group * THREADS + worker->index) * 64;
    uint64_t n = 1 + lhb_test_below (&random, 64);

    set_head (map, block, n);
    CHECK_EQUAL (lhb_map_lookup (map, block, (uint32_t) n).layer,
                 LHB_MAP_HEAD);
    CHECK_EQUAL (lhb_map_lookup (map, block, (uint32_t) n).blocks, n);
    if (lhb_test_below (&random, 3) > 0)
      continue;
    CHECK_EQUAL (lhb_map_discard (map, block, n), 0);
    CHECK (!lhb_map_any_head (map, block, n));
    CHECK (!lhb_map_any_lower (map, block, n));
    CHECK_EQUAL (lhb_map_add_layer (map, (uint8_t) (1 + worker->index),
                                    block, n), 0);
    CHECK_EQUAL (lhb_map_relabel (map, block, n,
                                  (uint8_t) (1 + worker->index),
                                  (uint8_t) (11 + worker->index)), 0);
    CHECK_EQUAL (layer_at (map, block), 11 + worker->index);
    /* Anybody's blocks: only the absence of tearing is checked. */
    lhb_map_lookup (map, lhb_test_below (&random, 2 * CHUNK), CHUNK);
  }
  return NULL;
}

static void
threads_share_chunks (void)
{
  struct lhb_map *map = open_map (3 * CHUNK);
  struct worker workers[THREADS];
  pthread_t threads[THREADS];

  for (unsigned i = 0; i < THREADS; i++) {
    workers[i] = (struct worker) { map, i };
    CHECK_EQUAL (pthread_create (&threads[i], NULL, work_on_own_blocks,
                                 &workers[i]), 0);
  }
  for (unsigned i = 0; i < THREADS; i++)
    CHECK_EQUAL (pthread_join (threads[i], NULL), 0);
  lhb_map_close (map);
}

/* Chunks that are given back and taken again under a reader's eyes. */
static void *
fill_and_empty (void *argument)
{
  struct lhb_map *map = argument;

  for (int i = 0; i < 2000; i++) {
    set_head (map, 0, CHUNK / 2);
    set_head (map, CHUNK / 2, CHUNK / 2);
    CHECK_EQUAL (lhb_map_discard (map, 0, CHUNK), 0);
    CHECK_EQUAL (lhb_map_add_layer (map, 1, 0, CHUNK / 2), 0);
    CHECK_EQUAL (lhb_map_add_layer (map, 1, CHUNK / 2, CHUNK / 2), 0);
    CHECK_EQUAL (lhb_map_discard (map, 0, CHUNK), 0);
  }
  return NULL;
}

static void
lookup_beside_collapsing_chunk_sees_a_valid_state (void)
{
  struct lhb_map *map = open_map (CHUNK);
  uint64_t random = lhb_test_seed;
  pthread_t thread;

  CHECK_EQUAL (pthread_create (&thread, NULL, fill_and_empty, map), 0);
  for (int i = 0; i < 20000; i++) {
    uint64_t block = lhb_test_below (&random, CHUNK);
    struct lhb_run run = lhb_map_lookup (map, block,
                                         (uint32_t) (CHUNK - block));

    CHECK (run.layer <= 1 || run.layer == LHB_MAP_HEAD);
    /* Halves change as a whole, so a run ends at the middle or the end. */
    CHECK (block + run.blocks == CHUNK / 2 || block + run.blocks == CHUNK);
  }
  CHECK_EQUAL (pthread_join (thread, NULL), 0);
  lhb_map_close (map);
}

static const struct lhb_test tests[] = {
  LHB_TEST (new_map_has_no_data),
  LHB_TEST (impossible_sizes_are_refused),
  LHB_TEST (newer_layer_wins_and_its_discard_hides_what_is_below),
  LHB_TEST (head_hides_the_layers_below_but_they_are_remembered),
  LHB_TEST (discard_hides_head_and_layers),
  LHB_TEST (merge_into_the_head_keeps_any_lower_but_not_the_id),
  LHB_TEST (merge_into_the_head_in_steps_collapses_and_folds),
  LHB_TEST (resize_leaves_new_blocks_empty),
  LHB_TEST (untouched_or_sequential_tib_takes_less_than_a_mib),
  LHB_TEST (fragmented_tib_takes_less_than_320_mib),
  LHB_TEST (chunk_filled_by_single_blocks_collapses),
  LHB_TEST (random_steps_agree_with_an_array),
  LHB_TEST (open_without_memory_fails),
  LHB_TEST (fold_without_memory_changes_nothing),
  LHB_TEST (resize_without_memory_changes_nothing),
  LHB_TEST (updates_without_memory_leave_the_chunk_as_it_was),
  LHB_TEST (reservation_outlives_collapse_and_discard),
  LHB_TEST (threads_share_chunks),
  LHB_TEST (lookup_beside_collapsing_chunk_sees_a_valid_state),
};

LHB_TEST_MAIN (tests)
