/* The activity log: its file, who waits for it, and what turns cold. */

#include <poll.h>

#include "lhb_activity.h"
#include "lhb_bytes.h"
#include "lhb_mesh.h"

#define EXTENT ((uint64_t) LHB_ACTIVITY_EXTENT_BYTES)

static const uint8_t id[LHB_ACTIVITY_ID_BYTES] = "the log of today";
static const uint8_t other[LHB_ACTIVITY_ID_BYTES] = "that of tomorrow";

/* ---- The file. */

struct decoded {
  uint64_t bits[LHB_ACTIVITY_WORDS];
  struct lhb_activity_state state;
  struct lhb_extent ranges[64];
  uint32_t count;
};

static struct decoded
decode (const char *file, uint64_t length, uint64_t size)
{
  struct decoded d = { .count = 0 };

  lhb_activity_decode (file, length, id, size, d.bits, &d.state);
  d.count = lhb_activity_ranges (d.bits, size, 0, d.ranges, 64);
  return d;
}

static char *
empty_log (uint64_t size)
{
  char *file = malloc (lhb_activity_file_bytes (size));

  CHECK (file != NULL);
  lhb_activity_encode (id, size, file);
  return file;
}

static void
set_page (char *file, uint32_t index, uint32_t slot, uint64_t sequence,
          uint64_t coolings, uint64_t extent)
{
  uint64_t bits[LHB_ACTIVITY_PAGE_WORDS] = { 0 };
  struct lhb_activity_page page = { .id = id,
                                    .sequence = sequence,
                                    .coolings = coolings,
                                    .index = index,
                                    .slot = slot };

  bits[extent / 64] = UINT64_C (1) << extent % 64;
  lhb_activity_encode_page (
      &page, bits, file + ((size_t) index * 2 + slot) * LHB_ACTIVITY_PAGE_BYTES);
}

static void
new_log_is_cold (void)
{
  const uint64_t size = 3 * LHB_ACTIVITY_PAGE_EXTENTS * EXTENT - 4096;
  char *file = empty_log (size);
  uint64_t length = lhb_activity_file_bytes (size);
  struct decoded d = decode (file, length, size);

  CHECK_EQUAL (length, 6 * LHB_ACTIVITY_PAGE_BYTES);
  CHECK_EQUAL (d.count, 0);
  CHECK_EQUAL (d.state.pages, 3);
  CHECK_EQUAL (d.state.pages_lost, 0);
  CHECK_EQUAL (d.state.sequence, 1);
  /* To anybody who looks for another one it is none. */
  memcpy (file + 16, other, sizeof other);
  d = decode (file, length, size);
  CHECK_EQUAL (d.state.pages_lost, 1);
  free (file);
}

/* The newer of two slots counts while it is whole; then the older one; then
 * the whole page is hot. */
static void
torn_page_leaves_the_one_before (void)
{
  const uint64_t size = 2 * LHB_ACTIVITY_PAGE_EXTENTS * EXTENT;
  char *file = empty_log (size);
  uint64_t length = lhb_activity_file_bytes (size);
  struct decoded d;

  set_page (file, 0, 1, 8, 3, 5);
  set_page (file, 0, 0, 9, 3, 7);
  d = decode (file, length, size);
  CHECK_EQUAL (d.count, 1);
  CHECK_EQUAL (d.ranges[0].offset_bytes, 7 * EXTENT);
  CHECK_EQUAL (d.ranges[0].length_bytes, EXTENT);
  CHECK_EQUAL (d.state.sequence, 9);
  CHECK_EQUAL (d.state.coolings, 3);
  for (size_t at = 0; at < LHB_ACTIVITY_PAGE_BYTES; at += 509)
    {
      file[at] ^= 4;
      d = decode (file, length, size);
      CHECK_EQUAL (d.count, 1);
      CHECK_EQUAL (d.ranges[0].offset_bytes, 5 * EXTENT);
      CHECK_EQUAL (d.state.pages_lost, 0);
      file[LHB_ACTIVITY_PAGE_BYTES + at] ^= 4;
      d = decode (file, length, size);
      CHECK_EQUAL (d.state.pages_lost, 1);
      CHECK_EQUAL (d.count, 1);
      CHECK_EQUAL (d.ranges[0].offset_bytes, 0);
      CHECK_EQUAL (d.ranges[0].length_bytes,
                   LHB_ACTIVITY_PAGE_EXTENTS * EXTENT);
      file[LHB_ACTIVITY_PAGE_BYTES + at] ^= 4;
      file[at] ^= 4;
    }
  /* One that stands in another's place. */
  memcpy (file + 2 * LHB_ACTIVITY_PAGE_BYTES, file, LHB_ACTIVITY_PAGE_BYTES);
  d = decode (file, length, size);
  CHECK_EQUAL (d.state.pages_lost, 1);
  d = decode (file, 0, size);
  CHECK_EQUAL (d.state.pages_lost, 2);
  CHECK_EQUAL (d.ranges[0].length_bytes, size);
  d = decode (file, LHB_ACTIVITY_PAGE_BYTES - 1, size);
  CHECK_EQUAL (d.state.pages_lost, 2);
  free (file);
}

static void
ranges_are_joined_and_cut (void)
{
  static uint64_t bits[LHB_ACTIVITY_WORDS];
  const uint64_t size = 200 * EXTENT + 8192;
  struct lhb_extent ranges[4];

  bits[0] = UINT64_C (0x8000000000000001);
  bits[1] = 3;
  bits[200 / 64] = UINT64_MAX << (198 % 64);
  CHECK_EQUAL (lhb_activity_ranges (bits, size, 0, ranges, 4), 3);
  CHECK_EQUAL (ranges[1].offset_bytes, 63 * EXTENT);
  CHECK_EQUAL (ranges[1].length_bytes, 3 * EXTENT);
  CHECK_EQUAL (ranges[2].offset_bytes, 198 * EXTENT);
  CHECK_EQUAL (ranges[2].length_bytes, 2 * EXTENT + 8192);
  CHECK_EQUAL (lhb_activity_ranges (bits, size, EXTENT, ranges, 1), 1);
  CHECK_EQUAL (ranges[0].offset_bytes, 63 * EXTENT);
  CHECK_EQUAL (lhb_activity_ranges (bits, size, size, ranges, 4), 0);
  /* Beyond 15.5 TiB one bit is all the rest. */
  memset (bits, 0, sizeof bits);
  bits[LHB_ACTIVITY_WORDS - 1] = UINT64_C (1) << 63;
  CHECK_EQUAL (lhb_activity_ranges (bits, UINT64_C (1) << 50, 0, ranges, 4),
               1);
  CHECK_EQUAL (ranges[0].offset_bytes,
               (LHB_ACTIVITY_EXTENTS_MAX - 1) * EXTENT);
  CHECK_EQUAL (ranges[0].offset_bytes + ranges[0].length_bytes,
               UINT64_C (1) << 50);
}

/* ---- A volume of several replicas, some of them elsewhere. */

#define EXTENTS 40u
#define BLOCKS (EXTENTS * (EXTENT / BLOCK))
#define SIZE (BLOCKS * BLOCK)

static void
make_log (struct mesh *mesh, uint32_t index)
{
  char *file = empty_log (SIZE);
  int fd = openat (mesh->rig.replicas[index].fd, LHB_ACTIVITY_NAME,
                   O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

  CHECK (fd >= 0);
  CHECK_EQUAL (write (fd, file, lhb_activity_file_bytes (SIZE)),
               lhb_activity_file_bytes (SIZE));
  close (fd);
  free (file);
}

static struct decoded
read_log (const struct mesh *mesh, uint32_t index)
{
  char file[4 * LHB_ACTIVITY_PAGE_BYTES];
  int fd = openat (mesh->rig.replicas[index].fd, LHB_ACTIVITY_NAME,
                   O_RDONLY | O_CLOEXEC);
  ssize_t length = read (fd, file, sizeof file);

  CHECK (fd >= 0 && length >= 0);
  close (fd);
  return decode (file, (uint64_t) length, SIZE);
}

static bool
log_has (const struct mesh *mesh, uint32_t index, uint64_t extent)
{
  struct decoded d = read_log (mesh, index);

  CHECK_EQUAL (d.state.pages_lost, 0);
  return d.bits[extent / 64] >> extent % 64 & 1;
}

static void
open_logged (struct mesh *mesh, uint32_t locals, uint32_t count)
{
  mesh_open (mesh, LHB_PEER_OURS, locals, count, BLOCKS);
  for (uint32_t i = 0; i < count; i++)
    make_log (mesh, i);
  CHECK_EQUAL (lhb_volume_activity_start (mesh->rig.volume, id), 0);
  /* How many more are heated depends on the time. */
  mesh->rig.volume->activity->width_max = 1;
}

static int
write_extent (struct mesh *mesh, uint64_t extent)
{
  return rig_io (&mesh->rig, LHB_OP_WRITE, 0, extent * EXTENT, 4096, 'x');
}

static uint64_t
hot (struct mesh *mesh)
{
  return lhb_volume_activity_hot (mesh->rig.volume);
}

static void
log_is_on_every_replica_before_a_change (void)
{
  static const uint32_t ops[] = { LHB_OP_WRITE, LHB_OP_TRIM, LHB_OP_ZERO };

  for (uint32_t locals = 0; locals <= 3; locals++)
    {
      struct mesh mesh;

      open_logged (&mesh, locals, 3);
      for (uint32_t i = 0; i < 3; i++)
        {
          /* Across a border. */
          CHECK_EQUAL (rig_io (&mesh.rig, ops[i], 0,
                               (11 + 3 * i) * EXTENT - 4096, 8192, 'x'),
                       0);
          for (uint32_t replica = 0; replica < 3; replica++)
            {
              CHECK (!log_has (&mesh, replica, 9 + 3 * i));
              CHECK (log_has (&mesh, replica, 10 + 3 * i));
              CHECK (log_has (&mesh, replica, 11 + 3 * i));
              CHECK (!log_has (&mesh, replica, 12 + 3 * i));
            }
        }
      CHECK_EQUAL (hot (&mesh), 6);
      CHECK_EQUAL (read_log (&mesh, 0).state.sequence, 4);
      CHECK_EQUAL (write_extent (&mesh, 10), 0);
      CHECK_EQUAL (read_log (&mesh, 0).state.sequence, 4);
      mesh_close (&mesh);
    }
}

/* The write does not reach any replica while the log of one is not done. */
static void
change_waits_for_the_last_log (void)
{
  struct mesh mesh;
  struct rig_call call;

  open_logged (&mesh, 3, 3);
  pthread_mutex_lock (&mesh.rig.stores[2]->activity_lock);
  rig_start (&mesh.rig, &call, LHB_OP_WRITE, 0, 20 * EXTENT, 4096, 'x');
  AWAIT (log_has (&mesh, 0, 20) && log_has (&mesh, 1, 20));
  CHECK_EQUAL (rig_io (&mesh.rig, LHB_OP_READ, 0, 0, 4096, 0), 0);
  for (uint32_t i = 0; i < 3; i++)
    {
      char block[BLOCK];

      CHECK_EQUAL (lhb_store_read (mesh.rig.stores[i], 20 * EXTENT / BLOCK, 1,
                                   block),
                   0);
      CHECK (block[0] != 'x');
    }
  CHECK (!atomic_load (&call.done));
  CHECK_EQUAL (hot (&mesh), 0);
  pthread_mutex_unlock (&mesh.rig.stores[2]->activity_lock);
  CHECK_EQUAL (rig_finish (&call), 0);
  CHECK (log_has (&mesh, 2, 20));
  mesh_close (&mesh);
}

static void
those_that_wait_share_a_transaction (void)
{
  enum { CALLS = 20 };
  struct mesh mesh;
  struct rig_call first, calls[CALLS];

  open_logged (&mesh, 2, 2);
  pthread_mutex_lock (&mesh.rig.stores[1]->activity_lock);
  rig_start (&mesh.rig, &first, LHB_OP_WRITE, 0, 0, 4096, 'x');
  AWAIT (log_has (&mesh, 0, 0));
  for (int i = 0; i < CALLS; i++)
    rig_start (&mesh.rig, &calls[i], LHB_OP_WRITE, 0,
               (uint64_t) (2 + i) * EXTENT, 4096, 'x');
  for (uint32_t waiting = 0; waiting < CALLS; sched_yield ())
    {
      struct lhb_activity *log = mesh.rig.volume->activity;

      waiting = 0;
      pthread_mutex_lock (&log->lock);
      for (struct lhb_request *r = log->waiting; r != NULL; r = r->next)
        waiting++;
      pthread_mutex_unlock (&log->lock);
    }
  pthread_mutex_unlock (&mesh.rig.stores[1]->activity_lock);
  CHECK_EQUAL (rig_finish (&first), 0);
  for (int i = 0; i < CALLS; i++)
    CHECK_EQUAL (rig_finish (&calls[i]), 0);
  CHECK_EQUAL (read_log (&mesh, 1).state.sequence, 3);
  mesh_close (&mesh);
}

/* A miss is said to come right after the one before, or long after it. */
static uint64_t
hot_after_miss (struct mesh *mesh, bool soon, uint64_t extent)
{
  mesh->rig.volume->activity->missed_ns = soon ? UINT64_MAX : 0;
  CHECK_EQUAL (write_extent (mesh, extent), 0);
  return hot (mesh);
}

static void
misses_in_a_row_heat_more_and_more (void)
{
  struct mesh mesh;

  open_logged (&mesh, 2, 2);
  mesh.rig.volume->activity->width_max = 8;
  CHECK_EQUAL (hot_after_miss (&mesh, false, 2), 1);
  CHECK_EQUAL (hot_after_miss (&mesh, true, 5), 1 + 2);
  CHECK (log_has (&mesh, 0, 4) && log_has (&mesh, 0, 5));
  CHECK_EQUAL (hot_after_miss (&mesh, true, 8), 3 + 4);
  CHECK_EQUAL (hot_after_miss (&mesh, true, 20), 7 + 8);
  CHECK (log_has (&mesh, 1, 16) && log_has (&mesh, 1, 23));
  CHECK_EQUAL (hot_after_miss (&mesh, true, 24), 15 + 8);
  CHECK_EQUAL (hot_after_miss (&mesh, false, 39), 24);
  mesh_close (&mesh);
}

static void
one_replica_has_no_log (void)
{
  struct mesh mesh;

  open_logged (&mesh, 1, 1);
  CHECK_EQUAL (write_extent (&mesh, 3), 0);
  CHECK_EQUAL (hot (&mesh), 0);
  CHECK_EQUAL (read_log (&mesh, 0).state.sequence, 1);
  CHECK_EQUAL (lhb_volume_activity_cool (mesh.rig.volume), 0);
  mesh_close (&mesh);
}

/* ---- Failures. */

static bool
is_dropped (struct mesh *mesh, uint32_t index)
{
  uint8_t state = atomic_load (&mesh->rig.volume->states[index]);

  return state == LHB_STATE_FAILED || state == LHB_STATE_GONE;
}

static void
arm_log (struct mesh *mesh, uint32_t index, const char *point, int error)
{
  CHECK_EQUAL (lhb_fault_arm (point, error,
                              lhb_store_id (mesh->rig.stores[index]), 0, 1),
               0);
}

/* Like one whose write fails: the others go on, behind the fence. */
static void
replica_whose_log_fails_is_dropped (void)
{
  static const char *const points[] = { "activity.write", "activity.sync" };

  for (uint32_t locals = 1; locals <= 3; locals += 2)
    for (int i = 0; i < 2; i++)
      {
        struct mesh mesh;
        struct rig_call call;

        open_logged (&mesh, locals, 3);
        arm_log (&mesh, 2, points[i], i ? EIO : ENOSPC);
        rig_start (&mesh.rig, &call, LHB_OP_WRITE, 0, 5 * EXTENT, 4096, 'x');
        AWAIT (rig_held (&mesh.rig) == 1);
        CHECK (is_dropped (&mesh, 2));
        CHECK (!is_dropped (&mesh, 0) && !is_dropped (&mesh, 1));
        CHECK (log_has (&mesh, 0, 5) && log_has (&mesh, 1, 5));
        CHECK_EQUAL (lhb_volume_fenced (mesh.rig.volume,
                                        lhb_store_id (mesh.stores[2])),
                     0);
        CHECK_EQUAL (rig_finish (&call), 0);
        mesh_close (&mesh);
      }
}

/* Nothing was issued, nobody is dropped, what is hot goes on, and the next
 * one tries again. */
static void
change_fails_where_no_log_can_be_written (void)
{
  struct mesh mesh;
  struct decoded d;

  open_logged (&mesh, 2, 2);
  CHECK_EQUAL (write_extent (&mesh, 1), 0);
  for (uint32_t attempt = 0; attempt < 3; attempt++)
    {
      arm_log (&mesh, 0, "activity.sync", EIO);
      arm_log (&mesh, 1, "activity.write", EIO);
      CHECK_EQUAL (write_extent (&mesh, 7 + attempt), -EIO);
      CHECK_EQUAL (hot (&mesh), 1);
      CHECK_EQUAL (write_extent (&mesh, 1), 0);
    }
  CHECK (!is_dropped (&mesh, 0) && !is_dropped (&mesh, 1));
  rig_check_equal (&mesh.rig);
  CHECK_EQUAL (write_extent (&mesh, 20), 0);
  /* Those that failed are said to be hot, too: a bit too many. */
  CHECK_EQUAL (hot (&mesh), 5);
  d = read_log (&mesh, 0);
  CHECK_EQUAL (d.count, 3);
  CHECK_EQUAL (d.ranges[2].offset_bytes, 20 * EXTENT);
  CHECK_EQUAL (read_log (&mesh, 1).count, 3);
  mesh_close (&mesh);
}

/* A file that is cut short or gone is not made anew under a log that it does
 * not have. */
static void
missing_file_is_an_error (void)
{
  struct mesh mesh;
  struct rig_call call;

  open_logged (&mesh, 2, 2);
  CHECK_EQUAL (unlinkat (mesh.rig.replicas[1].fd, LHB_ACTIVITY_NAME, 0), 0);
  rig_start (&mesh.rig, &call, LHB_OP_WRITE, 0, 0, 4096, 'x');
  AWAIT (rig_held (&mesh.rig) == 1);
  CHECK (is_dropped (&mesh, 1));
  CHECK_EQUAL (
      lhb_volume_fenced (mesh.rig.volume, lhb_store_id (mesh.stores[1])), 0);
  CHECK_EQUAL (rig_finish (&call), 0);
  mesh_close (&mesh);
}

/* ---- Rounds. */

static int64_t
cool (struct mesh *mesh)
{
  return lhb_volume_activity_cool (mesh->rig.volume);
}

static void
what_was_not_changed_for_a_round_turns_cold (void)
{
  for (uint32_t locals = 0; locals <= 3; locals += 3)
    {
      struct mesh mesh;

      open_logged (&mesh, locals, 3);
      CHECK_EQUAL (write_extent (&mesh, 3), 0);
      CHECK_EQUAL (write_extent (&mesh, 30), 0);
      CHECK_EQUAL (cool (&mesh), 0);    /* changed since the last one */
      CHECK_EQUAL (write_extent (&mesh, 30), 0);
      CHECK_EQUAL (cool (&mesh), 1);
      CHECK (!log_has (&mesh, 0, 3) && !log_has (&mesh, 2, 3));
      CHECK (log_has (&mesh, 0, 30) && log_has (&mesh, 2, 30));
      CHECK_EQUAL (read_log (&mesh, 1).state.coolings, 1);
      CHECK_EQUAL (hot (&mesh), 1);
      CHECK_EQUAL (write_extent (&mesh, 3), 0);
      CHECK (log_has (&mesh, 1, 3));
      CHECK_EQUAL (cool (&mesh), 1);
      CHECK_EQUAL (cool (&mesh), 1);
      CHECK_EQUAL (cool (&mesh), 0);
      CHECK_EQUAL (hot (&mesh), 0);
      CHECK_EQUAL (read_log (&mesh, 2).count, 0);
      mesh_close (&mesh);
    }
}

static void
nothing_turns_cold_when_a_flush_fails (void)
{
  struct mesh mesh;

  open_logged (&mesh, 2, 2);
  CHECK_EQUAL (write_extent (&mesh, 3), 0);
  CHECK_EQUAL (cool (&mesh), 0);
  for (uint32_t i = 0; i < 2; i++)
    CHECK_EQUAL (lhb_fault_arm ("store.sync", EIO,
                                lhb_store_id (mesh.rig.stores[i]), 0, 1),
                 0);
  CHECK_EQUAL (cool (&mesh), -EIO);
  CHECK_EQUAL (hot (&mesh), 1);
  CHECK (log_has (&mesh, 0, 3));
  mesh_close (&mesh);
}

struct cooling {
  pthread_t thread;
  struct mesh *mesh;
  int64_t result;
  _Atomic bool done;
};

static void *
run_cooling (void *argument)
{
  struct cooling *cooling = argument;

  cooling->result = cool (cooling->mesh);
  atomic_store (&cooling->done, true);
  return NULL;
}

static void
cooling_start (struct cooling *cooling, struct mesh *mesh)
{
  *cooling = (struct cooling){ .mesh = mesh };
  CHECK_EQUAL (
      pthread_create (&cooling->thread, NULL, run_cooling, cooling), 0);
}

static int64_t
cooling_finish (struct cooling *cooling)
{
  CHECK_EQUAL (pthread_join (cooling->thread, NULL), 0);
  return cooling->result;
}

static bool
is_draining (struct mesh *mesh)
{
  return atomic_load (&mesh->rig.volume->activity->draining);
}

/* A change that is in flight when the round begins is waited for, and flushed
 * after it has ended. */
static void
round_waits_for_changes_that_began_before (void)
{
  struct mesh mesh;
  struct rig_call call;
  struct cooling cooling;

  open_logged (&mesh, 2, 2);
  CHECK_EQUAL (write_extent (&mesh, 3), 0);
  CHECK_EQUAL (cool (&mesh), 0);
  /* Held: a replica was dropped and is not fenced. */
  CHECK_EQUAL (lhb_fault_arm ("store.write", EIO,
                              lhb_store_id (mesh.rig.stores[1]), 0, 1),
               0);
  rig_start (&mesh.rig, &call, LHB_OP_WRITE, 0, 20 * EXTENT, 4096, 'y');
  AWAIT (rig_held (&mesh.rig) == 1);
  cooling_start (&cooling, &mesh);
  AWAIT (is_draining (&mesh));
  CHECK_EQUAL (atomic_load (&mesh.rig.volume->counters.in_flight), 1);
  CHECK_EQUAL (
      lhb_volume_fenced (mesh.rig.volume, lhb_store_id (mesh.stores[1])), 0);
  CHECK_EQUAL (rig_finish (&call), 0);
  CHECK_EQUAL (cooling_finish (&cooling), 1);
  CHECK_EQUAL (hot (&mesh), 1);
  mesh_close (&mesh);
}

/* A FLUSH of a time when a snapshot is not durable yet waits; so does the
 * round, and what is written meanwhile stays hot. */
static void
nothing_turns_cold_while_the_gate_is_shut (void)
{
  struct mesh mesh;
  struct cooling cooling;

  open_logged (&mesh, 2, 2);
  CHECK_EQUAL (write_extent (&mesh, 3), 0);
  CHECK_EQUAL (write_extent (&mesh, 30), 0);
  CHECK_EQUAL (cool (&mesh), 0);
  lhb_volume_gate_flushes (mesh.rig.volume, 1);
  cooling_start (&cooling, &mesh);
  AWAIT (rig_gated (&mesh.rig) == 1);
  CHECK_EQUAL (write_extent (&mesh, 30), 0);
  CHECK_EQUAL (hot (&mesh), 2);
  lhb_volume_gate_flushes (mesh.rig.volume, 0);
  CHECK_EQUAL (cooling_finish (&cooling), 1);
  CHECK (!log_has (&mesh, 0, 3));
  CHECK (log_has (&mesh, 0, 30));
  mesh_close (&mesh);
}

/* ---- Replicas that come. */

static void
replica_that_comes_gets_the_whole_log (void)
{
  static const uint32_t with_wo[] = { LHB_MODE_RW, LHB_MODE_RW, LHB_MODE_WO };

  for (uint32_t locals = 1; locals <= 3; locals += 2)
    {
      struct mesh mesh;

      open_logged (&mesh, locals, 3);
      CHECK_EQUAL (lhb_volume_publish (mesh.rig.volume, mesh.stores, NULL, 2),
                   0);
      CHECK_EQUAL (write_extent (&mesh, 3), 0);
      CHECK (!log_has (&mesh, 2, 3));
      CHECK_EQUAL (lhb_volume_freeze (mesh.rig.volume), 0);
      mesh_publish (&mesh, with_wo);
      lhb_volume_thaw (mesh.rig.volume);
      CHECK_EQUAL (write_extent (&mesh, 3), 0);
      CHECK_EQUAL (lhb_volume_activity_write (mesh.rig.volume), 0);
      CHECK (log_has (&mesh, 2, 3));
      CHECK_EQUAL (read_log (&mesh, 2).state.sequence,
                   read_log (&mesh, 0).state.sequence);
      CHECK_EQUAL (write_extent (&mesh, 9), 0);
      CHECK (log_has (&mesh, 2, 9));
      mesh_close (&mesh);
    }
}

/* What was written with one replica was not recorded. */
static void
everything_is_hot_when_a_second_one_comes (void)
{
  static const uint32_t with_wo[] = { LHB_MODE_RW, LHB_MODE_WO };
  struct mesh mesh;

  open_logged (&mesh, 1, 2);
  CHECK_EQUAL (lhb_volume_publish (mesh.rig.volume, mesh.stores, NULL, 1), 0);
  CHECK_EQUAL (write_extent (&mesh, 3), 0);
  CHECK_EQUAL (hot (&mesh), 0);
  CHECK_EQUAL (lhb_volume_freeze (mesh.rig.volume), 0);
  mesh_publish (&mesh, with_wo);
  lhb_volume_thaw (mesh.rig.volume);
  CHECK_EQUAL (hot (&mesh), 0);
  /* Nor is it forgotten when it cannot be written at once. */
  arm_log (&mesh, 0, "activity.sync", EIO);
  CHECK_EQUAL (lhb_volume_activity_write (mesh.rig.volume), -EIO);
  CHECK_EQUAL (lhb_volume_activity_write (mesh.rig.volume), 0);
  CHECK_EQUAL (hot (&mesh), EXTENTS);
  for (uint32_t i = 0; i < 2; i++)
    {
      struct decoded d = read_log (&mesh, i);

      CHECK_EQUAL (d.count, 1);
      CHECK_EQUAL (d.ranges[0].length_bytes, SIZE);
    }
  CHECK_EQUAL (write_extent (&mesh, 5), 0);
  CHECK_EQUAL (cool (&mesh), EXTENTS - 1);
  CHECK_EQUAL (cool (&mesh), 1);
  mesh_close (&mesh);
}

/* ---- Many at once. */

struct coolers {
  struct mesh *mesh;
  pthread_t thread;
  _Atomic bool stop;
};

static void *
run_coolers (void *argument)
{
  struct coolers *coolers = argument;

  while (!atomic_load (&coolers->stop))
    CHECK (cool (coolers->mesh) >= 0);
  return NULL;
}

/* A cold extent is the same on all replicas, durable: what a change did to a
 * replica while its log said cold would be found here, for a change marks its
 * extent in the model before it begins and unmarks it after a flush. */
static void
rounds_and_changes_at_once_leave_equal_replicas (void)
{
  struct mesh mesh;
  struct coolers coolers = { .mesh = &mesh };
  struct rig_load load;

  open_logged (&mesh, 2, 3);
  CHECK_EQUAL (pthread_create (&coolers.thread, NULL, run_coolers, &coolers),
               0);
  rig_load_start (&mesh.rig, &load, BLOCKS);
  rig_load_await (&load, 1500);
  rig_load_stop (&load);
  atomic_store (&coolers.stop, true);
  CHECK_EQUAL (pthread_join (coolers.thread, NULL), 0);
  CHECK_EQUAL (cool (&mesh) >= 0, true);
  CHECK_EQUAL (cool (&mesh) >= 0, true);
  CHECK_EQUAL (hot (&mesh), 0);
  CHECK (read_log (&mesh, 0).state.coolings > 0);
  rig_check_equal (&mesh.rig);
  mesh_close (&mesh);
}

static const struct lhb_test tests[] = {
  LHB_TEST (new_log_is_cold),
  LHB_TEST (torn_page_leaves_the_one_before),
  LHB_TEST (ranges_are_joined_and_cut),
  LHB_TEST (log_is_on_every_replica_before_a_change),
  LHB_TEST (change_waits_for_the_last_log),
  LHB_TEST (those_that_wait_share_a_transaction),
  LHB_TEST (misses_in_a_row_heat_more_and_more),
  LHB_TEST (one_replica_has_no_log),
  LHB_TEST (replica_whose_log_fails_is_dropped),
  LHB_TEST (change_fails_where_no_log_can_be_written),
  LHB_TEST (missing_file_is_an_error),
  LHB_TEST (what_was_not_changed_for_a_round_turns_cold),
  LHB_TEST (nothing_turns_cold_when_a_flush_fails),
  LHB_TEST (round_waits_for_changes_that_began_before),
  LHB_TEST (nothing_turns_cold_while_the_gate_is_shut),
  LHB_TEST (replica_that_comes_gets_the_whole_log),
  LHB_TEST (everything_is_hot_when_a_second_one_comes),
  LHB_TEST (rounds_and_changes_at_once_leave_equal_replicas),
};

LHB_TEST_MAIN (tests)
