/* The order of what a power loss must not tear apart, and what may be answered
 * when.  The system calls that make things durable are replaced by ones that
 * tell the test.
 */

#include <sched.h>
#include <sys/syscall.h>

#include "lhb_replica.h"

#define BLOCKS 48
#define SIZE ((uint64_t) BLOCKS * BLOCK)

static const char *const only_head[] = { "head", NULL };
static const char *const three[] = { "base", "middle", "head", NULL };

/* ---- Watched system calls.  The linker prefers these to the library's. */

enum { SYNCS_MAX = 64 };

static struct {
  lhb_store *sync_in_fallocate; /* a flush by somebody else, just before */
  ino_t synced[SYNCS_MAX];      /* files, in the order of fdatasync */
  _Atomic int sync_count;
} watch;

int
fdatasync (int fd)
{
  int at = atomic_fetch_add (&watch.sync_count, 1);
  struct stat st;

  if (at < SYNCS_MAX && fstat (fd, &st) == 0)
    watch.synced[at] = st.st_ino;
  return (int) syscall (SYS_fdatasync, fd);
}

int
fallocate (int fd, int mode, off_t offset, off_t length)
{
  lhb_store *store = watch.sync_in_fallocate;

  watch.sync_in_fallocate = NULL;
  if (store != NULL)
    CHECK_EQUAL (lhb_store_sync (store), 0);
  return (int) syscall (SYS_fallocate, fd, mode, offset, length);
}

static int
first_sync_of (const struct replica *replica, const char *name)
{
  struct stat st;

  CHECK_EQUAL (fstatat (replica->fd, name, &st, 0), 0);
  for (int i = 0; i < watch.sync_count && i < SYNCS_MAX; i++)
    if (watch.synced[i] == st.st_ino)
      return i;
  return -1;
}

/* ---- Requests that may have to wait. */

struct caller {
  lhb_volume *volume;
  uint32_t op, flags;
  uint64_t block, blocks;
  pthread_t thread;
  int result;
  char data[2 * BLOCK];
};

static void *
call (void *argument)
{
  struct caller *caller = argument;

  caller->result = lhb_volume_io (
      caller->volume, caller->op, caller->flags, caller->block * BLOCK,
      caller->blocks * BLOCK, caller->data);
  return NULL;
}

static void
caller_start (struct caller *caller)
{
  CHECK_EQUAL (pthread_create (&caller->thread, NULL, call, caller), 0);
}

static int
caller_end (struct caller *caller)
{
  CHECK_EQUAL (pthread_join (caller->thread, NULL), 0);
  return caller->result;
}

static struct lhb_statistics
statistics (const lhb_volume *volume)
{
  struct lhb_statistics s;

  lhb_volume_statistics (volume, &s);
  return s;
}

static void
until_waits (const lhb_volume *volume, uint64_t waits)
{
  while (statistics (volume).waits < waits)
    sched_yield ();
}

/* ---- Tests. */

/* A flush that runs while a hole is made does not cover the hole; the flush
 * after it has to. */
static void
flush_after_trim_syncs_the_hole (void)
{
  struct replica replica;
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  lhb_store *store;
  int before;

  replica_make (&replica);
  replica_image (&replica, "head", SIZE);
  replica_fill (&replica, "head", 0, 8, 'h');
  store = store_open (engine, &replica, SIZE, 0, only_head);
  watch.sync_in_fallocate = store;
  CHECK_EQUAL (lhb_store_zero (store, 0, 4 * BLOCK, true, 0), 0);
  CHECK (watch.sync_in_fallocate == NULL);
  before = watch.sync_count;
  CHECK_EQUAL (lhb_store_sync (store), 0);
  CHECK_EQUAL (watch.sync_count, before + 1);
  lhb_store_close (store);
  lhb_engine_close (engine);
  replica_remove (&replica);
}

/* 'middle' wrote a block that it had discarded before.  If its bit were durable
 * in the head before its data, a power loss between would show zeros. */
static void
merged_data_is_durable_before_merged_discards (void)
{
  const unsigned char bits[] = { 1 << 5 };
  struct replica replica;
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  lhb_store *store;
  int fd, data_at, bits_at;

  replica_make (&replica);
  for (int i = 0; i < 3; i++)
    replica_image (&replica, three[i], SIZE);
  replica_fill (&replica, "base", 0, 8, 'b');
  replica_fill (&replica, "middle", 5, 1, 'm');
  fd = openat (replica.fd, "discard.middle", O_WRONLY | O_CREAT, 0600);
  CHECK (fd >= 0 && write (fd, bits, sizeof bits) == sizeof bits);
  close (fd);
  store = store_open (engine, &replica, SIZE, 0, three);
  watch.sync_count = 0;
  CHECK_EQUAL (lhb_merge_up (NULL, store, 2, 3, 0, SIZE), BLOCK);
  data_at = first_sync_of (&replica, "head");
  bits_at = first_sync_of (&replica, "discard.head");
  CHECK (data_at >= 0 && bits_at >= 0);
  CHECK (data_at < bits_at);
  lhb_store_close (store);
  lhb_engine_close (engine);
  replica_remove (&replica);
}

/* The gate is shut in a freeze for what comes after it: also for a FUA write
 * that had come before the gate was shut and waited for the freeze to end. */
static void
fua_that_waited_for_a_freeze_waits_for_the_gate (void)
{
  struct replica replica;
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  struct caller fua = { .op = LHB_OP_WRITE, .flags = LHB_IO_FUA, .blocks = 1 };
  struct caller plain = { .op = LHB_OP_WRITE, .blocks = 1 };
  lhb_volume *volume;
  lhb_store *store;

  replica_make (&replica);
  replica_image (&replica, "head", SIZE);
  store = store_open (engine, &replica, SIZE, 0, only_head);
  CHECK_EQUAL (lhb_volume_open (engine, SIZE, 0, &volume), 0);
  CHECK_EQUAL (lhb_volume_publish (volume, &store, NULL, 1), 0);
  fua.volume = plain.volume = volume;
  CHECK_EQUAL (lhb_volume_freeze (volume), 0);
  caller_start (&fua);
  until_waits (volume, 1);
  caller_start (&plain);
  until_waits (volume, 2);
  lhb_volume_gate_flushes (volume, 1);
  lhb_volume_thaw (volume);
  CHECK_EQUAL (caller_end (&plain), 0);
  CHECK_EQUAL (statistics (volume).writes, 1);
  /* Nor does the next freeze wait for it. */
  CHECK_EQUAL (lhb_volume_freeze (volume), 0);
  lhb_volume_thaw (volume);
  lhb_volume_gate_flushes (volume, 0);
  CHECK_EQUAL (caller_end (&fua), 0);
  CHECK_EQUAL (statistics (volume).writes, 2);
  lhb_volume_close (volume);
  lhb_store_close (store);
  lhb_engine_close (engine);
  replica_remove (&replica);
}

/* A write that failed on all replicas, but not in the same way on each, drops
 * one.  What the other one has of it must not be read before the fence: after
 * a crash the dropped one could still be taken for the right one. */
static void
failed_write_that_drops_a_replica_waits_for_the_fence (void)
{
  struct replica replicas[2];
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  struct caller writer = { .op = LHB_OP_WRITE, .blocks = 2 };
  struct lhb_event event;
  lhb_store *stores[2];
  lhb_volume *volume;
  char data[BLOCK];

  for (int i = 0; i < 2; i++)
    {
      replica_make (&replicas[i]);
      replica_image (&replicas[i], "head", SIZE);
      stores[i] = store_open (engine, &replicas[i], SIZE, 0, only_head);
    }
  CHECK_EQUAL (lhb_volume_open (engine, SIZE, 0, &volume), 0);
  CHECK_EQUAL (lhb_volume_publish (volume, stores, NULL, 2), 0);
  writer.volume = volume;
  CHECK_EQUAL (lhb_fault_arm ("store.short_write", ENOSPC,
                              lhb_store_id (stores[0]), 0, 1),
               0);
  CHECK_EQUAL (
      lhb_fault_arm ("store.write", EIO, lhb_store_id (stores[1]), 0, 1), 0);
  caller_start (&writer);
  do
    event = engine_wait_event (engine);
  while (event.type != LHB_EVENT_STORE_FAILED);
  CHECK_EQUAL (event.subject_id, lhb_store_id (stores[1]));
  /* The queue handles this after all that it does for the write. */
  CHECK_EQUAL (lhb_volume_io (volume, LHB_OP_READ, 0, 10 * BLOCK, BLOCK, data),
               0);
  CHECK_EQUAL (statistics (volume).writes, 0);
  CHECK_EQUAL (lhb_volume_fenced (volume, event.subject_id), 0);
  CHECK_EQUAL (caller_end (&writer), -ENOSPC);
  lhb_fault_clear ();
  lhb_volume_close (volume);
  for (int i = 0; i < 2; i++)
    {
      lhb_store_close (stores[i]);
      replica_remove (&replicas[i]);
    }
  lhb_engine_close (engine);
}

/* ---- The pool's end. */

static _Atomic int pool_stage;

static void
run_until_closing (struct lhb_job *job)
{
  (void) job;
  while (pool_stage == 0)
    sched_yield ();
  for (int i = 0; i < 10000; i++)
    sched_yield ();             /* for the closer to get into the pool */
}

static void
run_late (struct lhb_job *job)
{
  (void) job;
  pool_stage = 2;
}

static void
ignore (struct lhb_message *message)
{
  (void) message;
}

/* A helper of a write batch may come so late that all requests are over. */
static void
closing_the_pool_runs_what_is_left (void)
{
  struct lhb_job first = { .run = run_until_closing, .done.handle = ignore };
  struct lhb_job late = { .run = run_late, .done.handle = ignore };
  struct lhb_pool *pool;

  CHECK_EQUAL (lhb_pool_open (1, &pool), 0);
  lhb_pool_submit (pool, &first);
  lhb_pool_submit (pool, &late);
  pool_stage = 1;
  lhb_pool_close (pool);
  CHECK_EQUAL (pool_stage, 2);
}

static const struct lhb_test tests[] = {
  LHB_TEST (flush_after_trim_syncs_the_hole),
  LHB_TEST (merged_data_is_durable_before_merged_discards),
  LHB_TEST (fua_that_waited_for_a_freeze_waits_for_the_gate),
  LHB_TEST (failed_write_that_drops_a_replica_waits_for_the_fence),
  LHB_TEST (closing_the_pool_runs_what_is_left),
};

LHB_TEST_MAIN (tests)
