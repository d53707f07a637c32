/* Dirty maps: what a replica that left has missed. */

#include "lhb_rig.h"

#define GRANULE ((uint64_t) LHB_DIRTY_GRANULE_BYTES)

/* ---- The map against an array of flags. */

/* Two whole chunks of 2 GiB and some of a third, whose last granule is short:
 * 5 blocks. */
#define GRANULES (2u * (1u << LHB_DIRTY_CHUNK_SHIFT) + 37)
#define SIZE (GRANULES * GRANULE - 11 * BLOCK)

struct map {
  lhb_engine *engine;
  lhb_volume *volume;
  uint64_t tracker;
};

static struct map
map_open (uint64_t size_bytes)
{
  struct map map = { .engine = engine_make (LHB_DRIVER_POOL, 1) };

  CHECK_EQUAL (lhb_volume_open (map.engine, size_bytes, 0, &map.volume), 0);
  CHECK_EQUAL (lhb_volume_track (map.volume, 0, &map.tracker), 0);
  return map;
}

static void
map_close (struct map *map)
{
  lhb_volume_close (map->volume);
  lhb_engine_close (map->engine);
}

/* The map has exactly these granules, as extents that are joined, also when
 * they are fetched a few at a time. */
static void
map_check (const struct map *map, const bool *want, uint64_t granules,
           uint64_t size_bytes, uint32_t max)
{
  struct lhb_extent extents[64];
  uint64_t at = 0, from = 0;
  int count;

  CHECK (max <= 64);
  do
    {
      count = lhb_dirty_extents (map->volume, map->tracker, from, extents, max);
      CHECK (count >= 0 && (uint32_t) count <= max);
      for (int i = 0; i < count; i++)
        {
          uint64_t first = extents[i].offset_bytes / GRANULE;
          uint64_t end = extents[i].offset_bytes + extents[i].length_bytes;

          CHECK_EQUAL (extents[i].offset_bytes % GRANULE, 0);
          CHECK (end == size_bytes || end % GRANULE == 0);
          for (; at < first; at++)
            CHECK (!want[at]);
          for (; at * GRANULE < end; at++)
            CHECK (want[at]);
          CHECK (at == granules || !want[at]);
          from = end;
        }
    }
  while ((uint32_t) count == max);
  for (; at < granules; at++)
    CHECK (!want[at]);
}

static void
map_agrees_with_a_model (void)
{
  struct map map = map_open (SIZE);
  bool *want = calloc (GRANULES, 1);
  uint64_t state = lhb_test_seed;

  CHECK (want != NULL);
  for (int step = 0; step < 600; step++)
    {
      uint64_t offset = lhb_test_below (&state, SIZE);
      uint64_t length = 1 + lhb_test_below (&state, SIZE - offset);
      uint64_t first, end;

      switch (lhb_test_below (&state, 4))
        {
        case 0:                 /* a few granules */
          length = 1 + lhb_test_below (&state, 5 * GRANULE);
          break;
        case 1:                 /* one whole chunk */
          offset = offset / GRANULE >> LHB_DIRTY_CHUNK_SHIFT;
          offset = offset * GRANULE << LHB_DIRTY_CHUNK_SHIFT;
          length = GRANULE << LHB_DIRTY_CHUNK_SHIFT;
          break;
        case 2:                 /* to the end, and beyond */
          length = UINT64_MAX;
          break;
        default:
          break;
        }
      if (length > SIZE - offset)
        length = SIZE - offset;
      end = offset + length;
      if (lhb_test_below (&state, 2))
        {
          CHECK_EQUAL (
              lhb_dirty_mark (map.volume, map.tracker, offset, length), 0);
          for (uint64_t g = offset / GRANULE; g * GRANULE < end; g++)
            want[g] = true;
        }
      else
        {
          CHECK_EQUAL (
              lhb_dirty_clear (map.volume, map.tracker, offset, length), 0);
          first = (offset + GRANULE - 1) / GRANULE;
          for (uint64_t g = first;
               g < GRANULES && ((g + 1) * GRANULE <= end || end == SIZE); g++)
            want[g] = false;
        }
      if (step % 20 == 0)
        map_check (&map, want, GRANULES, SIZE,
                   1 + (uint32_t) lhb_test_below (&state, 64));
    }
  free (want);
  map_close (&map);
}

static void
map_grows_with_the_volume (void)
{
  struct map map = map_open (5 * BLOCK);
  bool *want = calloc (GRANULES, 1);

  CHECK (want != NULL);
  CHECK_EQUAL (lhb_dirty_mark (map.volume, map.tracker, BLOCK, 1), 0);
  want[0] = true;
  map_check (&map, want, 1, 5 * BLOCK, 64);
  CHECK_EQUAL (lhb_volume_resize (map.volume, SIZE), 0);
  map_check (&map, want, GRANULES, SIZE, 64);
  CHECK_EQUAL (lhb_dirty_mark (map.volume, map.tracker, SIZE - 1, 1), 0);
  want[GRANULES - 1] = true;
  map_check (&map, want, GRANULES, SIZE, 1);
  free (want);
  map_close (&map);
}

static void
trackers_are_bounded_and_told_apart (void)
{
  struct map map = map_open (SIZE);
  struct lhb_extent extent;
  uint64_t ids[LHB_TRACKERS_MAX + 1];

  ids[0] = map.tracker;
  for (int i = 1; i < LHB_TRACKERS_MAX; i++)
    CHECK_EQUAL (lhb_volume_track (map.volume, 0, &ids[i]), 0);
  CHECK_EQUAL (
      lhb_volume_track (map.volume, 0, &ids[LHB_TRACKERS_MAX]), -ENOSPC);
  CHECK_EQUAL (lhb_dirty_mark (map.volume, ids[3], GRANULE, 1), 0);
  for (int i = 0; i < LHB_TRACKERS_MAX; i++)
    CHECK_EQUAL (lhb_dirty_extents (map.volume, ids[i], 0, &extent, 1),
                 i == 3);
  CHECK_EQUAL (lhb_volume_untrack (map.volume, ids[3]), 0);
  CHECK_EQUAL (lhb_volume_untrack (map.volume, ids[3]), -ENOENT);
  CHECK_EQUAL (lhb_volume_untrack (map.volume, 0), -ENOENT);
  CHECK_EQUAL (lhb_dirty_extents (map.volume, ids[3], 0, &extent, 1), -ENOENT);
  CHECK_EQUAL (lhb_dirty_extents (map.volume, 0, 0, &extent, 1), -ENOENT);
  CHECK_EQUAL (lhb_dirty_mark (map.volume, ids[3], 0, 1), -ENOENT);
  CHECK_EQUAL (lhb_dirty_mark (map.volume, 0, 0, 1), -ENOENT);
  CHECK_EQUAL (lhb_dirty_clear (map.volume, ids[3], 0, 1), -ENOENT);
  CHECK_EQUAL (lhb_dirty_clear (map.volume, 0, 0, 1), -ENOENT);
  CHECK_EQUAL (lhb_volume_track (map.volume, 0, &ids[3]), 0);
  CHECK_EQUAL (lhb_dirty_extents (map.volume, ids[3], 0, &extent, 1), 0);
  map_close (&map);
}

/* ---- What requests leave in it. */

#define BLOCKS 128              /* 8 granules */

/* The map of the store is empty from here on. */
static uint64_t
forget_changes (struct rig *rig, uint32_t index)
{
  uint64_t id = lhb_store_id (rig->stores[index]);

  CHECK_EQUAL (lhb_dirty_clear (rig->volume, id, 0, BLOCKS * BLOCK), 0);
  return id;
}

static void
check_granules (struct rig *rig, uint64_t id, const char *want)
{
  struct lhb_extent extents[8];
  char got[] = "........";
  int count = lhb_dirty_extents (rig->volume, id, 0, extents, 8);

  CHECK (count >= 0);
  for (int i = 0; i < count; i++)
    memset (got + extents[i].offset_bytes / GRANULE, 'x',
            extents[i].length_bytes / GRANULE);
  if (strcmp (got, want) != 0)
    fprintf (stderr, "granules %s, not %s\n", got, want);
  CHECK (strcmp (got, want) == 0);
}

static void
dropped_store_is_tracked_with_the_write_that_failed (void)
{
  struct rig rig;
  struct rig_call call;
  struct lhb_event event;
  uint64_t id;

  rig_open (&rig, LHB_DRIVER_POOL, 0, 2, BLOCKS);
  id = lhb_store_id (rig.stores[1]);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 0, BLOCK, 'a'), 0);
  CHECK_EQUAL (lhb_dirty_extents (rig.volume, id, 0, NULL, 0), -ENOENT);
  CHECK_EQUAL (lhb_fault_arm ("store.write", EIO, id, 0, 1), 0);
  rig_start (&rig, &call, LHB_OP_WRITE, 0, 3 * GRANULE, BLOCK, 'w');
  AWAIT (rig_held (&rig) == 1);
  check_granules (&rig, id, "...x....");
  forget_changes (&rig, 1);
  CHECK_EQUAL (lhb_engine_next_event (rig.engine, &event), 1);
  CHECK_EQUAL (lhb_volume_fenced (rig.volume, event.subject_id), 0);
  CHECK_EQUAL (rig_finish (&call), 0);
  /* It was held, and was noted again when it was let go. */
  check_granules (&rig, id, "...x....");
  CHECK_EQUAL (rig_io (&rig, LHB_OP_TRIM, 0, 5 * GRANULE - 1, GRANULE, 0), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_READ, 0, 0, BLOCK, 0), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_FLUSH, 0, 0, 0, 0), 0);
  check_granules (&rig, id, "...xxx..");
  CHECK_EQUAL (rig_io (&rig, LHB_OP_ZERO, 0, 7 * GRANULE, 1, 0), 0);
  check_granules (&rig, id, "...xxx.x");
  CHECK_EQUAL (lhb_volume_untrack (rig.volume, id), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 0, BLOCK, 'a'), 0);
  CHECK_EQUAL (lhb_dirty_extents (rig.volume, id, 0, NULL, 0), -ENOENT);
  rig_close (&rig);
}

static void
write_in_flight_when_its_store_is_dropped_is_tracked (void)
{
  struct rig rig;
  struct rig_call call;
  struct lhb_range_claim claim;
  uint64_t id;

  rig_open (&rig, LHB_DRIVER_POOL, 0, 2, BLOCKS);
  id = lhb_store_id (rig.stores[1]);
  /* It is under way, behind another claim, when the store goes. */
  lhb_volume_claim (rig.volume, LHB_RANGE_WRITE, 0, 1, &claim);
  rig_start (&rig, &call, LHB_OP_WRITE, 0, 0, BLOCK, 'w');
  AWAIT (lhb_range_count (rig.volume->ranges) == 2);
  lhb_volume_fail_store (rig.volume, 1, EIO, 0, 0);
  lhb_range_release (rig.volume->ranges, &claim);
  AWAIT (rig_held (&rig) == 1);
  check_granules (&rig, id, "x.......");
  CHECK_EQUAL (lhb_volume_fenced (rig.volume, id), 0);
  CHECK_EQUAL (rig_finish (&call), 0);
  rig_close (&rig);
}

static void
last_store_is_not_tracked (void)
{
  struct rig rig;

  rig_open (&rig, LHB_DRIVER_POOL, 0, 1, BLOCKS);
  lhb_volume_fail_store (rig.volume, 0, EIO, 0, 0);
  CHECK_EQUAL (lhb_dirty_extents (rig.volume, lhb_store_id (rig.stores[0]), 0,
                                  NULL, 0),
               -ENOENT);
  rig_close (&rig);
}

static void
store_taken_out_by_hand_is_tracked_once (void)
{
  struct rig rig;
  uint64_t id, tracker;

  rig_open (&rig, LHB_DRIVER_POOL, 0, 2, BLOCKS);
  id = lhb_store_id (rig.stores[0]);
  CHECK_EQUAL (lhb_volume_track (rig.volume, id, &tracker), 0);
  CHECK (tracker == id);
  check_granules (&rig, id, "........");
  CHECK_EQUAL (lhb_dirty_mark (rig.volume, id, GRANULE, 1), 0);
  CHECK_EQUAL (lhb_volume_track (rig.volume, id, &tracker), 0);
  check_granules (&rig, id, ".x......");
  rig_close (&rig);
}

static void
store_that_was_dropped_without_a_map_gets_none_later (void)
{
  struct rig rig;
  uint64_t id, tracker;

  rig_open (&rig, LHB_DRIVER_POOL, 0, 2, BLOCKS);
  id = lhb_store_id (rig.stores[1]);
  lhb_volume_fail_store (rig.volume, 1, EIO, 0, 0);
  CHECK_EQUAL (lhb_volume_track (rig.volume, id, &tracker), 0);
  CHECK_EQUAL (lhb_volume_untrack (rig.volume, id), 0);
  CHECK_EQUAL (lhb_volume_track (rig.volume, id, &tracker), -ENOENT);
  rig_close (&rig);
}

static const struct lhb_test tests[] = {
  LHB_TEST (map_agrees_with_a_model),
  LHB_TEST (map_grows_with_the_volume),
  LHB_TEST (trackers_are_bounded_and_told_apart),
  LHB_TEST (dropped_store_is_tracked_with_the_write_that_failed),
  LHB_TEST (write_in_flight_when_its_store_is_dropped_is_tracked),
  LHB_TEST (last_store_is_not_tracked),
  LHB_TEST (store_taken_out_by_hand_is_tracked_once),
  LHB_TEST (store_that_was_dropped_without_a_map_gets_none_later),
};

LHB_TEST_MAIN (tests)
