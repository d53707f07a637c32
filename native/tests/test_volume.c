/* Volume: replicas that stay equal, fail, freeze, wait and close. */

#include "lhb_rig.h"

#define BLOCKS 66
#define SIZE ((uint64_t) BLOCKS * BLOCK)

/* ---- What is written is read. */

static void
check_history (struct rig *rig, uint64_t steps)
{
  char *model = rig_model (rig), *data = blocks_alloc (BLOCKS);
  uint64_t state = lhb_test_seed;

  for (uint64_t step = 0; step < steps; step++)
    {
      uint32_t op = (uint32_t) lhb_test_below (&state, LHB_OP_ZERO + 1);
      uint32_t flags = (uint32_t) lhb_test_below (&state, 4);
      uint64_t offset = lhb_test_below (&state, SIZE);
      uint64_t length = 1 + lhb_test_below (&state, SIZE - offset);

      if (op != LHB_OP_READ && length > SIZE / 8)
        length = SIZE / 8;
      if (step % 3 == 0)
        {
          offset &= ~(uint64_t) (BLOCK - 1);
          length = (length + BLOCK - 1) & ~(uint64_t) (BLOCK - 1);
        }
      memset (data, (int) step, SIZE);
      CHECK_EQUAL (lhb_volume_io (rig->volume, op, flags, offset, length,
                                  data),
                   0);
      if (op == LHB_OP_READ)
        CHECK (memcmp (data, model + offset, length) == 0);
      else if (op == LHB_OP_WRITE)
        memcpy (model + offset, data, length);
      else if (op != LHB_OP_FLUSH)
        memset (model + offset, 0, length);
    }
  rig_check (rig, model);
  CHECK (!rig_has_event (rig));
  free (model);
  free (data);
}

static void
every_driver_and_cache_mode_reads_what_was_written (void)
{
  uint32_t drivers[2];
  int count = engine_drivers (drivers);

  for (int i = 0; i < count; i++)
    for (uint32_t flags = 0; flags <= LHB_STORE_DIRECT; flags++)
      for (uint32_t stores = 1; stores <= 3; stores += 2)
        {
          struct rig rig;

          rig_open (&rig, drivers[i], flags, stores, BLOCKS);
          check_history (&rig, 150);
          rig_close (&rig);
        }
}

static void
overlapping_writers_leave_equal_replicas (void)
{
  uint32_t drivers[2];
  int count = engine_drivers (drivers);

  for (int i = 0; i < count; i++)
    for (uint32_t flags = 0; flags <= LHB_STORE_DIRECT; flags++)
      {
        struct rig rig;
        struct rig_load load;

        rig_open (&rig, drivers[i], flags, 3, BLOCKS);
        rig_load_start (&rig, &load, 12);
        rig_load_await (&load, 1000);
        rig_load_stop (&load);
        rig_check_equal (&rig);
        CHECK (!rig_has_event (&rig));
        rig_close (&rig);
      }
}

/* Larger than what is done inline, than one piece, and than one slab. */
static void
large_requests_are_moved_in_pieces (void)
{
  const uint64_t blocks = 3000, size = blocks * BLOCK;
  struct rig rig;
  char *data = malloc (size), *model;

  CHECK (data != NULL);
  rig_open (&rig, LHB_DRIVER_AUTO, 0, 2, blocks);
  model = rig_model (&rig);
  for (uint64_t i = 0; i < size; i++)
    data[i] = (char) (i / 7);
  CHECK_EQUAL (lhb_volume_io (rig.volume, LHB_OP_WRITE, 0, 5, size - 9, data),
               0);
  memcpy (model + 5, data, size - 9);
  rig_check (&rig, model);
  memset (data, 0, size);
  CHECK_EQUAL (lhb_volume_io (rig.volume, LHB_OP_READ, 0, 1, size - 1, data),
               0);
  CHECK (memcmp (data, model + 1, size - 1) == 0);
  free (model);
  free (data);
  rig_close (&rig);
}

static void
wrong_requests_are_refused (void)
{
  lhb_volume *read_only, *other;
  struct rig rig;
  char byte;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 1, BLOCKS);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_READ, 0, SIZE, 1, 0), -EINVAL);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, SIZE - 1, 2, 0), -EINVAL);
  CHECK_EQUAL (lhb_volume_io (rig.volume, LHB_OP_TRIM, 0, 1, UINT64_MAX,
                              NULL),
               -EINVAL);
  CHECK_EQUAL (lhb_volume_io (rig.volume, LHB_OP_TRIM, 0, UINT64_MAX, 1,
                              NULL),
               -EINVAL);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_ZERO + 1, 0, 0, 1, 0), -EINVAL);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, SIZE, 0, 0), 0);
  CHECK_EQUAL (lhb_volume_open (rig.engine, 0, 0, &other), -EINVAL);
  CHECK_EQUAL (lhb_volume_open (rig.engine, BLOCK + 1, 0, &other), -EINVAL);
  CHECK_EQUAL (lhb_volume_open (rig.engine, SIZE + BLOCK, 0, &other), 0);
  CHECK_EQUAL (lhb_volume_publish (other, rig.stores, NULL, 1), -EINVAL);
  CHECK_EQUAL (lhb_volume_publish (other, rig.stores, NULL, 0), -EINVAL);
  CHECK_EQUAL (lhb_volume_publish (other, rig.stores, NULL, LHB_STORES_MAX + 1),
               -EINVAL);
  CHECK_EQUAL (lhb_volume_resize (other, SIZE), -EINVAL);
  CHECK_EQUAL (lhb_volume_resize (other, SIZE + BLOCK + 1), -EINVAL);
  lhb_volume_close (other);
  rig_close_volume (&rig);
  CHECK_EQUAL (lhb_volume_open (rig.engine, SIZE, LHB_VOLUME_READ_ONLY,
                                &read_only),
               0);
  CHECK_EQUAL (lhb_volume_publish (read_only, rig.stores, NULL, 1), 0);
  CHECK_EQUAL (lhb_volume_io (read_only, LHB_OP_READ, 0, 0, 1, &byte), 0);
  CHECK_EQUAL (byte, 'b');
  CHECK_EQUAL (lhb_volume_io (read_only, LHB_OP_WRITE, 0, 0, 1, &byte),
               -EROFS);
  CHECK_EQUAL (lhb_volume_io (read_only, LHB_OP_TRIM, 0, 0, 1, NULL), -EROFS);
  CHECK_EQUAL (lhb_volume_io (read_only, LHB_OP_FLUSH, 0, 0, 0, NULL), 0);
  lhb_volume_close (read_only);
  rig_close (&rig);
}

static void
statistics_count_what_was_done (void)
{
  struct lhb_statistics s;
  struct rig rig;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 1, BLOCKS);
  for (int i = 0; i < 3; i++)
    CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 0, 100, 'w'), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_READ, 0, 0, 10, 0), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_FLUSH, 0, 0, 0, 0), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_TRIM, 0, 0, 1000, 0), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_ZERO, 0, 0, 2000, 0), 0);
  CHECK_EQUAL (lhb_fault_arm ("store.write", EIO, 0, 0, 1), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 0, 100, 'w'), -EIO);
  lhb_volume_statistics (rig.volume, &s);
  CHECK_EQUAL (s.reads, 1);
  CHECK_EQUAL (s.writes, 4);
  CHECK_EQUAL (s.flushes, 1);
  CHECK_EQUAL (s.trims, 1);
  CHECK_EQUAL (s.zeroes, 1);
  CHECK_EQUAL (s.read_bytes, 10);
  CHECK_EQUAL (s.write_bytes, 400);
  CHECK_EQUAL (s.trim_bytes, 1000);
  CHECK_EQUAL (s.zero_bytes, 2000);
  CHECK_EQUAL (s.errors, 1);
  CHECK_EQUAL (s.in_flight, 0);
  CHECK_EQUAL (s.connections, 0);
  CHECK_EQUAL (s.inline_writes + s.driver_writes, 4);
  rig_close (&rig);
}

/* ---- Replicas that fail. */

static void
failed_write_drops_the_replica_and_waits_for_the_fence (void)
{
  struct rig rig;
  struct rig_call first, second;
  struct lhb_event event;
  uint64_t bad;
  char *model;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 3, BLOCKS);
  model = rig_model (&rig);
  bad = lhb_store_id (rig.stores[1]);
  CHECK_EQUAL (lhb_fault_arm ("store.write", EIO, bad, 0, 1), 0);
  rig_start (&rig, &first, LHB_OP_WRITE, 0, 40 * BLOCK, 2 * BLOCK, 'w');
  event = engine_wait_event (rig.engine);
  CHECK_EQUAL (event.type, LHB_EVENT_STORE_FAILED);
  CHECK_EQUAL (event.error, EIO);
  CHECK_EQUAL (event.volume_id, lhb_volume_id (rig.volume));
  CHECK_EQUAL (event.subject_id, bad);
  CHECK_EQUAL (event.offset_bytes, 40 * BLOCK);
  CHECK_EQUAL (event.length_bytes, 2 * BLOCK);
  AWAIT (rig_held (&rig) == 1);
  /* Reads go on; whatever changes something waits, too. */
  CHECK_EQUAL (rig_io (&rig, LHB_OP_READ, 0, 0, 9 * BLOCK, 0), 0);
  rig_start (&rig, &second, LHB_OP_FLUSH, 0, 0, 0, 0);
  AWAIT (rig_held (&rig) == 2);
  CHECK (!atomic_load (&first.done) && !atomic_load (&second.done));
  CHECK_EQUAL (lhb_volume_fenced (rig.volume, bad + 1000), -ENOENT);
  CHECK_EQUAL (
      lhb_volume_fenced (rig.volume, lhb_store_id (rig.stores[0])), -ENOENT);
  CHECK_EQUAL (rig_held (&rig), 2);
  CHECK_EQUAL (lhb_volume_fenced (rig.volume, bad), 0);
  CHECK_EQUAL (rig_finish (&first), 0);
  CHECK_EQUAL (rig_finish (&second), 0);
  CHECK_EQUAL (lhb_volume_fenced (rig.volume, bad), -ENOENT);
  CHECK (!rig_has_event (&rig));
  /* From now on without it. */
  store_check (rig.stores[1], model, BLOCKS);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, LHB_IO_FUA, 0, 100, 'x'), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_TRIM, 0, 9000, 100, 0), 0);
  store_check (rig.stores[1], model, BLOCKS);
  memset (model + 40 * BLOCK, 'w', 2 * BLOCK);
  memset (model, 'x', 100);
  memset (model + 9000, 0, 100);
  store_check (rig.stores[0], model, BLOCKS);
  store_check (rig.stores[2], model, BLOCKS);
  free (model);
  rig_close (&rig);
}

/* Two replicas fail: both must be fenced before anything is acknowledged. */
static void
every_failed_replica_must_be_fenced (void)
{
  struct rig rig;
  struct rig_call call;
  struct lhb_event events[2];

  rig_open (&rig, LHB_DRIVER_AUTO, LHB_STORE_DIRECT, 3, BLOCKS);
  for (int i = 0; i < 2; i++)
    CHECK_EQUAL (lhb_fault_arm ("store.write", EIO,
                                lhb_store_id (rig.stores[i]), 0, 1),
                 0);
  rig_start (&rig, &call, LHB_OP_WRITE, 0, 0, BLOCK, 'w');
  for (int i = 0; i < 2; i++)
    events[i] = engine_wait_event (rig.engine);
  AWAIT (rig_held (&rig) == 1);
  CHECK_EQUAL (lhb_volume_fenced (rig.volume, events[0].subject_id), 0);
  CHECK_EQUAL (rig_held (&rig), 1);
  CHECK_EQUAL (lhb_volume_fenced (rig.volume, events[1].subject_id), 0);
  CHECK_EQUAL (rig_finish (&call), 0);
  rig_close (&rig);
}

static void
check_failing_op (const char *point, uint32_t op, uint32_t flags,
                  uint32_t store_flags)
{
  struct rig rig;
  struct rig_call call;
  struct lhb_event event;
  uint64_t bad;

  rig_open (&rig, LHB_DRIVER_AUTO, store_flags, 2, BLOCKS);
  bad = lhb_store_id (rig.stores[0]);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 0, SIZE / 2, 'a'), 0);
  CHECK_EQUAL (lhb_fault_arm (point, EIO, bad, 0, 1), 0);
  rig_start (&rig, &call, op, flags, 0, op == LHB_OP_FLUSH ? 0 : 4 * BLOCK,
             'w');
  event = engine_wait_event (rig.engine);
  CHECK_EQUAL (event.type, LHB_EVENT_STORE_FAILED);
  CHECK_EQUAL (event.subject_id, bad);
  CHECK_EQUAL (lhb_volume_fenced (rig.volume, bad), 0);
  CHECK_EQUAL (rig_finish (&call), 0);
  CHECK (!rig_has_event (&rig));
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 0, SIZE, 'z'), 0);
  rig_close (&rig);
}

static void
replica_is_dropped_for_whatever_it_fails_to_do (void)
{
  for (uint32_t flags = 0; flags <= LHB_STORE_DIRECT; flags++)
    {
      check_failing_op ("store.sync", LHB_OP_FLUSH, 0, flags);
      check_failing_op ("store.write", LHB_OP_WRITE, LHB_IO_FUA, flags);
      check_failing_op ("store.punch", LHB_OP_TRIM, 0, flags);
      check_failing_op ("store.discard_write", LHB_OP_TRIM, 0, flags);
      check_failing_op ("store.punch", LHB_OP_ZERO, 0, flags);
      check_failing_op ("store.sync", LHB_OP_ZERO, LHB_IO_FUA, flags);
    }
  check_failing_op ("store.short_write", LHB_OP_WRITE, 0, 0);
}

/* Two requests in flight, and each of two replicas fails one of them: the one
 * that is judged second is the last, and its error is the client's. */
static void
replicas_that_fail_at_once_are_not_both_dropped (void)
{
  for (int round = 0; round < 20; round++)
    {
      struct rig rig;
      struct rig_call calls[2];
      struct lhb_event event;
      int events = 0;

      rig_open (&rig, LHB_DRIVER_AUTO, LHB_STORE_DIRECT, 2, BLOCKS);
      CHECK_EQUAL (lhb_volume_freeze (rig.volume), 0);
      for (uint32_t i = 0; i < 2; i++)
        {
          CHECK_EQUAL (lhb_fault_arm ("store.write", EIO,
                                      lhb_store_id (rig.stores[i]), i, 1),
                       0);
          rig_start (&rig, &calls[i], LHB_OP_WRITE, 0, 8 * i * BLOCK, BLOCK,
                     'w');
        }
      AWAIT (atomic_load (&rig.volume->counters.waits) == 2);
      lhb_volume_thaw (rig.volume);
      while (!atomic_load (&calls[0].done) || !atomic_load (&calls[1].done))
        if (lhb_engine_next_event (rig.engine, &event))
          {
            events++;
            CHECK_EQUAL (lhb_volume_fenced (rig.volume, event.subject_id), 0);
          }
      (void) rig_finish (&calls[0]);
      (void) rig_finish (&calls[1]);
      CHECK (events <= 1 && !rig_has_event (&rig));
      CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 0, SIZE, 'z'), 0);
      rig_close (&rig);
    }
}

static void
failed_read_is_answered_by_another_replica (void)
{
  struct rig rig;
  struct lhb_event event;
  char *got = blocks_alloc (1), *want = blocks_alloc (1);

  memset (want, 'b', BLOCK);
  rig_open (&rig, LHB_DRIVER_AUTO, 0, 3, BLOCKS);
  CHECK_EQUAL (lhb_fault_arm ("store.read", EIO, 0, 0, 2), 0);
  CHECK_EQUAL (
      lhb_volume_io (rig.volume, LHB_OP_READ, 0, 0, BLOCK, got), 0);
  CHECK (memcmp (got, want, BLOCK) == 0);
  for (int i = 0; i < 2; i++)
    {
      event = engine_wait_event (rig.engine);
      CHECK_EQUAL (event.type, LHB_EVENT_STORE_FAILED);
      CHECK_EQUAL (lhb_volume_fenced (rig.volume, event.subject_id), 0);
    }
  /* The last one is never dropped. */
  CHECK_EQUAL (lhb_fault_arm ("store.read", EIO, 0, 0, 1), 0);
  CHECK_EQUAL (
      lhb_volume_io (rig.volume, LHB_OP_READ, 0, 0, BLOCK, got), -EIO);
  CHECK (!rig_has_event (&rig));
  CHECK_EQUAL (
      lhb_volume_io (rig.volume, LHB_OP_READ, 0, 0, BLOCK, got), 0);
  free (got);
  free (want);
  rig_close (&rig);
}

static void
read_that_no_replica_can_do_drops_none (void)
{
  struct rig rig;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 3, BLOCKS);
  CHECK_EQUAL (lhb_fault_arm ("store.read", EIO, 0, 0, 3), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_READ, 0, 0, BLOCK, 0), -EIO);
  CHECK (!rig_has_event (&rig));
  CHECK_EQUAL (rig_io (&rig, LHB_OP_READ, 0, 0, BLOCK, 0), 0);
  rig_close (&rig);
}

static void
last_replica_returns_its_error_and_stays (void)
{
  struct rig rig;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 1, BLOCKS);
  for (int i = 0; i < 2; i++)
    {
      CHECK_EQUAL (lhb_fault_arm ("store.write", EIO, 0, 0, 1), 0);
      CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 0, BLOCK, 'w'), -EIO);
      CHECK_EQUAL (lhb_fault_arm ("store.punch", EIO, 0, 0, 1), 0);
      CHECK_EQUAL (rig_io (&rig, LHB_OP_TRIM, 0, 0, BLOCK, 'w'), -EIO);
      CHECK (!rig_has_event (&rig));
      CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 0, BLOCK, 'w'), 0);
    }
  rig_close (&rig);
}

static void
failed_flush_of_the_last_replica_ends_its_writes (void)
{
  for (uint32_t fua = 0; fua <= LHB_IO_FUA; fua++)
    {
      struct rig rig;

      rig_open (&rig, LHB_DRIVER_AUTO, 0, 1, BLOCKS);
      CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 0, BLOCK, 'w'), 0);
      CHECK_EQUAL (lhb_fault_arm (fua ? "store.write" : "store.sync", EIO, 0,
                                  0, 1),
                   0);
      CHECK_EQUAL (rig_io (&rig, fua ? LHB_OP_WRITE : LHB_OP_FLUSH, fua, 0,
                           fua * BLOCK, 'w'),
                   -EIO);
      CHECK_EQUAL (rig_io (&rig, LHB_OP_FLUSH, 0, 0, 0, 0), -EIO);
      CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 0, BLOCK, 'w'), -EIO);
      CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, LHB_IO_FUA, 0, 1, 'w'), -EIO);
      CHECK_EQUAL (rig_io (&rig, LHB_OP_ZERO, 0, 0, BLOCK, 'w'), -EIO);
      CHECK_EQUAL (rig_io (&rig, LHB_OP_READ, 0, 0, BLOCK, 'w'), 0);
      CHECK (!rig_has_event (&rig));
      rig_close (&rig);
    }
}

static void
disk_full_everywhere_drops_none_and_is_reported (void)
{
  struct rig rig;
  struct lhb_event event;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 3, BLOCKS);
  CHECK_EQUAL (lhb_fault_arm ("store.write", ENOSPC, 0, 0, 3), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 5 * BLOCK, BLOCK, 'w'),
               -ENOSPC);
  event = engine_wait_event (rig.engine);
  CHECK_EQUAL (event.type, LHB_EVENT_OUT_OF_SPACE);
  CHECK_EQUAL (event.offset_bytes, 5 * BLOCK);
  CHECK_EQUAL (lhb_fault_arm ("store.short_write", ENOSPC, 0, 0, 3), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 5 * BLOCK, 4 * BLOCK, 'w'),
               -ENOSPC);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 5 * BLOCK, BLOCK, 'w'), 0);
  rig_check_equal (&rig);
  rig_close (&rig);
}

static void
trim_without_room_for_its_bits_drops_none (void)
{
  static const uint32_t ops[] = { LHB_OP_TRIM, LHB_OP_ZERO };

  for (int i = 0; i < 2; i++)
    {
      struct rig rig;

      rig_open (&rig, LHB_DRIVER_AUTO, 0, 3, BLOCKS);
      for (int r = 0; r < 3; r++)
        replica_fill (&rig.replicas[r], "base", 0, BLOCKS, 'b');
      for (int r = 0; r < 3; r++)
        CHECK_EQUAL (lhb_map_add_layer (rig.stores[r]->map, 1, 0, BLOCKS), 0);
      CHECK_EQUAL (lhb_fault_arm ("store.discard_write", ENOSPC, 0, 0, 3), 0);
      CHECK_EQUAL (rig_io (&rig, ops[i], 0, 0, SIZE, 0), -ENOSPC);
      CHECK_EQUAL (engine_wait_event (rig.engine).type,
                   LHB_EVENT_OUT_OF_SPACE);
      CHECK (!rig_has_event (&rig));
      rig_check_equal (&rig);
      rig_close (&rig);
    }
}

/* The file has a part of the failed write, which the map does not know. */
static void
failed_write_leaves_nothing_that_a_restart_would_show (void)
{
  struct rig rig;
  struct lhb_extent extent;
  int fd;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 1, BLOCKS);
  replica_fill (&rig.replicas[0], "head", 4, 3, 'x');
  CHECK_EQUAL (lhb_fault_arm ("store.write", ENOSPC, 0, 0, 1), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 4 * BLOCK, 3 * BLOCK, 'w'),
               -ENOSPC);
  fd = replica_open_image (&rig.replicas[0], "head");
  CHECK_EQUAL (lhb_file_extents (fd, 0, &extent, 1), 0);
  close (fd);
  rig_close (&rig);
}

/* What reached the disks nobody knows: two may differ. */
static void
direct_writes_that_fail_everywhere_leave_one_replica (void)
{
  struct rig rig;
  struct rig_call call;
  struct lhb_event event;

  rig_open (&rig, LHB_DRIVER_AUTO, LHB_STORE_DIRECT, 2, BLOCKS);
  CHECK_EQUAL (lhb_fault_arm ("store.write", EIO, 0, 0, 2), 0);
  rig_start (&rig, &call, LHB_OP_WRITE, 0, 0, 4 * BLOCK, 'w');
  event = engine_wait_event (rig.engine);
  CHECK_EQUAL (event.type, LHB_EVENT_STORE_FAILED);
  CHECK_EQUAL (event.subject_id, lhb_store_id (rig.stores[1]));
  CHECK_EQUAL (lhb_volume_fenced (rig.volume, event.subject_id), 0);
  CHECK_EQUAL (rig_finish (&call), -EIO);
  rig_close (&rig);
}

/* All fail, but one wrote more than the others: these are not equal to it. */
static void
replica_that_got_furthest_stays (void)
{
  struct rig rig;
  struct rig_call call;
  struct lhb_event event;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 2, BLOCKS);
  CHECK_EQUAL (lhb_fault_arm ("store.write", ENOSPC,
                              lhb_store_id (rig.stores[0]), 0, 1),
               0);
  CHECK_EQUAL (lhb_fault_arm ("store.short_write", ENOSPC,
                              lhb_store_id (rig.stores[1]), 0, 1),
               0);
  rig_start (&rig, &call, LHB_OP_WRITE, 0, 0, 4 * BLOCK, 'w');
  do
    event = engine_wait_event (rig.engine);
  while (event.type != LHB_EVENT_STORE_FAILED);
  CHECK_EQUAL (event.subject_id, lhb_store_id (rig.stores[0]));
  CHECK_EQUAL (lhb_volume_fenced (rig.volume, event.subject_id), 0);
  CHECK_EQUAL (rig_finish (&call), -ENOSPC);
  rig_close (&rig);
}

static void
fast_zero_drops_no_replica_that_is_slow (void)
{
  struct rig rig;
  char *model;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 3, BLOCKS);
  model = rig_model (&rig);
  CHECK_EQUAL (
      lhb_fault_arm ("store.punch", EOPNOTSUPP, 0, 0, UINT64_MAX), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_ZERO, LHB_IO_FAST_ZERO, 0, 3 * BLOCK, 0),
               -EOPNOTSUPP);
  rig_check (&rig, model);
  lhb_fault_clear ();
  CHECK_EQUAL (lhb_fault_arm ("store.punch", EOPNOTSUPP,
                              lhb_store_id (rig.stores[1]), 0, UINT64_MAX),
               0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_ZERO, LHB_IO_FAST_ZERO, 0, 3 * BLOCK, 0),
               0);
  memset (model, 0, 3 * BLOCK);
  rig_check (&rig, model);
  CHECK (!rig_has_event (&rig));
  free (model);
  rig_close (&rig);
}

static void
replicas_that_fail_under_load_leave_the_others_equal (void)
{
  uint32_t drivers[2];
  int count = engine_drivers (drivers);

  for (int i = 0; i < count; i++)
    {
      struct rig rig;
      struct rig_load load;
      char *first = blocks_alloc (BLOCKS);
      static const char *const points[] = { "store.write", "store.sync" };

      rig_open (&rig, drivers[i], 0, 4, BLOCKS);
      rig_load_start (&rig, &load, 12);
      for (int bad = 0; bad < 2; bad++)
        {
          uint64_t id = lhb_store_id (rig.stores[bad]);

          rig_load_await (&load, 50);
          CHECK_EQUAL (lhb_fault_arm (points[bad], EIO, id, 0, 1), 0);
          CHECK_EQUAL (engine_wait_event (rig.engine).subject_id, id);
          CHECK_EQUAL (lhb_volume_fenced (rig.volume, id), 0);
        }
      rig_load_await (&load, 50);
      rig_load_stop (&load);
      CHECK (!rig_has_event (&rig));
      CHECK_EQUAL (lhb_store_read (rig.stores[2], 0, BLOCKS, first), 0);
      store_check (rig.stores[3], first, BLOCKS);
      free (first);
      rig_close (&rig);
    }
}

/* ---- Freeze. */

static void
frozen_volume_does_not_change (void)
{
  struct rig rig;
  struct rig_load load;
  char *before = blocks_alloc (BLOCKS);

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 3, BLOCKS);
  rig_load_start (&rig, &load, 12);
  for (int round = 0; round < 30; round++)
    {
      rig_load_await (&load, 10);
      CHECK_EQUAL (lhb_volume_freeze (rig.volume), 0);
      CHECK_EQUAL (lhb_store_read (rig.stores[0], 0, BLOCKS, before), 0);
      for (uint32_t i = 0; i < 3; i++)
        store_check (rig.stores[i], before, BLOCKS);
      lhb_volume_thaw (rig.volume);
    }
  rig_load_stop (&load);
  rig_check_equal (&rig);
  free (before);
  rig_close (&rig);
}

/* What a snapshot does: the files below show what was there at the switch. */
static void
heads_are_switched_under_load (void)
{
  static const char *const chain[]
      = { "base", "head", "h1", "h2", "h3", "h4", "h5", NULL };
  const char *until[8] = { "base", "head" };
  char *before[5];
  struct rig rig;
  struct rig_load load;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 2, BLOCKS);
  rig_load_start (&rig, &load, 12);
  for (int round = 0; round < 5; round++)
    {
      char discard[LHB_NAME_BYTES_MAX];
      const char *next = chain[round + 2];

      rig_load_await (&load, 30);
      replica_discard_name (next, discard);
      for (uint32_t i = 0; i < 2; i++)
        {
          replica_image (&rig.replicas[i], next, SIZE);
          CHECK_EQUAL (
              lhb_store_prepare_head (rig.stores[i], next, discard), 0);
        }
      before[round] = blocks_alloc (BLOCKS);
      CHECK_EQUAL (lhb_volume_freeze (rig.volume), 0);
      CHECK_EQUAL (
          lhb_store_read (rig.stores[0], 0, BLOCKS, before[round]), 0);
      for (uint32_t i = 0; i < 2; i++)
        CHECK (lhb_store_commit_head (rig.stores[i], SIZE) > 0);
      lhb_volume_thaw (rig.volume);
    }
  rig_load_await (&load, 30);
  rig_load_stop (&load);
  for (int round = 0; round < 5; round++)
    {
      for (uint32_t i = 0; i < 2; i++)
        replica_check (rig.engine, &rig.replicas[i], until, before[round],
                       BLOCKS);
      until[round + 2] = chain[round + 2];
      free (before[round]);
    }
  rig.images = chain;
  rig_check_equal (&rig);
  rig_close (&rig);
}

static void
volume_grows_under_load (void)
{
  struct rig rig;
  struct rig_load load;
  char last = 0;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 2, BLOCKS);
  rig_load_start (&rig, &load, 12);
  rig_load_await (&load, 30);
  for (uint32_t i = 0; i < 2; i++)
    {
      replica_image (&rig.replicas[i], "next", 2 * SIZE);
      CHECK_EQUAL (
          lhb_store_prepare_head (rig.stores[i], "next", "discard.next"), 0);
    }
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 2 * SIZE - 1, 1, 'e'), -EINVAL);
  CHECK_EQUAL (lhb_volume_freeze (rig.volume), 0);
  for (uint32_t i = 0; i < 2; i++)
    CHECK (lhb_store_commit_head (rig.stores[i], 2 * SIZE) > 0);
  CHECK_EQUAL (lhb_volume_resize (rig.volume, 2 * SIZE), 0);
  lhb_volume_thaw (rig.volume);
  CHECK_EQUAL (lhb_volume_size_bytes (rig.volume), 2 * SIZE);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 2 * SIZE - 1, 1, 'e'), 0);
  CHECK_EQUAL (lhb_volume_io (rig.volume, LHB_OP_READ, 0, 2 * SIZE - 1, 1,
                              &last),
               0);
  CHECK_EQUAL (last, 'e');
  rig_load_await (&load, 30);
  rig_load_stop (&load);
  rig.blocks = 2 * BLOCKS;
  rig.images = (const char *const[]){ "base", "head", "next", NULL };
  rig_check_equal (&rig);
  rig_close (&rig);
}

/* ---- The gate. */

static void
shut_gate_holds_flushes_and_fua_only (void)
{
  struct rig rig;
  struct rig_call flush, fua, zero;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 2, BLOCKS);
  lhb_volume_gate_flushes (rig.volume, 1);
  rig_start (&rig, &flush, LHB_OP_FLUSH, 0, 0, 0, 0);
  rig_start (&rig, &fua, LHB_OP_WRITE, LHB_IO_FUA, 0, 100, 'f');
  rig_start (&rig, &zero, LHB_OP_ZERO, LHB_IO_FUA, 8000, 100, 0);
  AWAIT (rig_gated (&rig) == 3);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 0, BLOCK, 'w'), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_READ, 0, 0, BLOCK, 'w'), 0);
  CHECK_EQUAL (rig_io (&rig, LHB_OP_TRIM, 0, 0, BLOCK, 'w'), 0);
  /* They hold no range, so they do not hold up a freeze. */
  CHECK_EQUAL (lhb_volume_freeze (rig.volume), 0);
  lhb_volume_thaw (rig.volume);
  CHECK (!atomic_load (&flush.done) && !atomic_load (&fua.done)
         && !atomic_load (&zero.done));
  lhb_volume_gate_flushes (rig.volume, 0);
  CHECK_EQUAL (rig_finish (&flush), 0);
  CHECK_EQUAL (rig_finish (&fua), 0);
  CHECK_EQUAL (rig_finish (&zero), 0);
  rig_close (&rig);
}

/* A snapshot freezes, shuts the gate and thaws: a flush that waited for the
 * freeze then waits for the gate, and a second freeze does not wait for it. */
static void
gate_shut_in_a_freeze_holds_a_flush_that_waited (void)
{
  struct rig rig;
  struct rig_call flush, fua;
  struct lhb_statistics s;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 2, BLOCKS);
  CHECK_EQUAL (lhb_volume_freeze (rig.volume), 0);
  rig_start (&rig, &flush, LHB_OP_FLUSH, 0, 0, 0, 0);
  rig_start (&rig, &fua, LHB_OP_WRITE, LHB_IO_FUA, 0, 100, 'f');
  do
    lhb_volume_statistics (rig.volume, &s);
  while (s.waits < 2);
  lhb_volume_gate_flushes (rig.volume, 1);
  lhb_volume_thaw (rig.volume);
  AWAIT (rig_gated (&rig) == 2);
  CHECK_EQUAL (lhb_volume_freeze (rig.volume), 0);
  lhb_volume_thaw (rig.volume);
  CHECK (!atomic_load (&flush.done) && !atomic_load (&fua.done));
  lhb_volume_gate_flushes (rig.volume, 0);
  CHECK_EQUAL (rig_finish (&flush), 0);
  CHECK_EQUAL (rig_finish (&fua), 0);
  rig_close (&rig);
}

/* ---- Close. */

static void
close_ends_held_and_gated_requests (void)
{
  struct rig rig;
  struct rig_call held, gated;

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 2, BLOCKS);
  lhb_volume_gate_flushes (rig.volume, 1);
  rig_start (&rig, &gated, LHB_OP_FLUSH, 0, 0, 0, 0);
  AWAIT (rig_gated (&rig) == 1);
  CHECK_EQUAL (lhb_fault_arm ("store.write", EIO,
                              lhb_store_id (rig.stores[0]), 0, 1),
               0);
  rig_start (&rig, &held, LHB_OP_WRITE, 0, 0, BLOCK, 'w');
  AWAIT (rig_held (&rig) == 1);
  rig_close_volume (&rig);
  CHECK_EQUAL (rig_finish (&held), -EIO);
  CHECK_EQUAL (rig_finish (&gated), -EIO);
  rig_close (&rig);
}

static void
close_waits_for_requests_in_flight (void)
{
  for (int round = 0; round < 30; round++)
    {
      struct rig rig;
      struct rig_call calls[3];

      rig_open (&rig, LHB_DRIVER_AUTO, 0, 1, BLOCKS);
      CHECK_EQUAL (lhb_volume_freeze (rig.volume), 0);
      for (uint32_t i = 0; i < 3; i++)
        rig_start (&rig, &calls[i], LHB_OP_WRITE, 0, 0, BLOCK, (int) i);
      AWAIT (atomic_load (&rig.volume->counters.waits) == 3);
      lhb_volume_thaw (rig.volume);
      rig_close_volume (&rig);
      for (int i = 0; i < 3; i++)
        CHECK_EQUAL (rig_finish (&calls[i]), 0);
      rig_close (&rig);
    }
}

/* ---- Block status. */

static void
check_status (struct rig *rig, const bool *zero, uint64_t offset,
              uint64_t length)
{
  uint32_t pairs[2 * BLOCKS];
  uint64_t at = offset;
  int count = lhb_volume_block_status (rig->volume, offset, length, pairs,
                                       BLOCKS);

  CHECK (count > 0);
  for (int i = 0; i < count; i++)
    {
      uint64_t end = at + pairs[2 * i];

      CHECK (end > at && end <= offset + length);
      for (uint64_t block = at / BLOCK; block <= (end - 1) / BLOCK; block++)
        CHECK_EQUAL (pairs[2 * i + 1], zero[block] ? 3 : 0);
      if (i > 0)
        CHECK (pairs[2 * i + 1] != pairs[2 * i - 1]);
      at = end;
    }
  CHECK_EQUAL (at, offset + length);
}

static void
block_status_covers_what_was_asked (void)
{
  bool zero[BLOCKS];
  struct rig rig;
  uint32_t one[2];

  rig_open (&rig, LHB_DRIVER_AUTO, 0, 1, BLOCKS);
  for (uint64_t block = 0; block < BLOCKS; block++)
    zero[block] = block >= BLOCKS / 3;
  for (uint64_t block = BLOCKS / 2; block < BLOCKS; block += 5)
    {
      CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, block * BLOCK, 2 * BLOCK,
                           'w'),
                   0);
      zero[block] = zero[block + 1] = false;
    }
  CHECK_EQUAL (rig_io (&rig, LHB_OP_TRIM, 0, 3 * BLOCK, 2 * BLOCK, 0), 0);
  zero[3] = zero[4] = true;
  /* Data of two layers is one run. */
  CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, 9 * BLOCK, BLOCK, 'w'), 0);
  for (uint64_t first = 0; first < BLOCKS; first++)
    for (uint64_t last = first; last < BLOCKS; last += 3)
      {
        check_status (&rig, zero, first * BLOCK, (last - first + 1) * BLOCK);
        check_status (&rig, zero, first * BLOCK + 5,
                      (last - first + 1) * BLOCK - 6);
      }
  CHECK_EQUAL (lhb_volume_block_status (rig.volume, 0, SIZE, one, 1), 1);
  CHECK_EQUAL (one[0], 3 * BLOCK);
  rig_close (&rig);
}

static const struct lhb_test tests[] = {
  LHB_TEST (every_driver_and_cache_mode_reads_what_was_written),
  LHB_TEST (overlapping_writers_leave_equal_replicas),
  LHB_TEST (large_requests_are_moved_in_pieces),
  LHB_TEST (wrong_requests_are_refused),
  LHB_TEST (statistics_count_what_was_done),
  LHB_TEST (failed_write_drops_the_replica_and_waits_for_the_fence),
  LHB_TEST (every_failed_replica_must_be_fenced),
  LHB_TEST (replica_is_dropped_for_whatever_it_fails_to_do),
  LHB_TEST (replicas_that_fail_at_once_are_not_both_dropped),
  LHB_TEST (failed_read_is_answered_by_another_replica),
  LHB_TEST (read_that_no_replica_can_do_drops_none),
  LHB_TEST (last_replica_returns_its_error_and_stays),
  LHB_TEST (failed_flush_of_the_last_replica_ends_its_writes),
  LHB_TEST (disk_full_everywhere_drops_none_and_is_reported),
  LHB_TEST (trim_without_room_for_its_bits_drops_none),
  LHB_TEST (failed_write_leaves_nothing_that_a_restart_would_show),
  LHB_TEST (direct_writes_that_fail_everywhere_leave_one_replica),
  LHB_TEST (replica_that_got_furthest_stays),
  LHB_TEST (fast_zero_drops_no_replica_that_is_slow),
  LHB_TEST (replicas_that_fail_under_load_leave_the_others_equal),
  LHB_TEST (frozen_volume_does_not_change),
  LHB_TEST (heads_are_switched_under_load),
  LHB_TEST (volume_grows_under_load),
  LHB_TEST (shut_gate_holds_flushes_and_fua_only),
  LHB_TEST (gate_shut_in_a_freeze_holds_a_flush_that_waited),
  LHB_TEST (close_ends_held_and_gated_requests),
  LHB_TEST (close_waits_for_requests_in_flight),
  LHB_TEST (block_status_covers_what_was_asked),
};

LHB_TEST_MAIN (tests)
