/* Request: the path of one request through the volume.
 *
 * The states and what each of them waits for are in docs/internals/io-path.md.
 */

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include "lhb_batch.h"
#include "lhb_fault.h"
#include "lhb_queue.h"
#include "lhb_request.h"
#include "lhb_util.h"
#include "lhb_volume.h"

static void claim_range (struct lhb_request *request);
static void read_from_next_replica (struct lhb_request *request);
static void write_to_replicas (struct lhb_request *request);

static void
add (_Atomic uint64_t *counter, uint64_t amount)
{
  atomic_fetch_add_explicit (counter, amount, memory_order_relaxed);
}

/* ---- The end. */

static void
finish (struct lhb_request *request)
{
  struct lhb_counters *counters = &request->volume->counters;

  add (&counters->requests[request->op], 1);
  add (&counters->bytes[request->op], request->length_bytes);
  add (&counters->ns[request->op], lhb_now_ns () - request->start_ns);
  if (request->error)
    add (&counters->errors, 1);
  atomic_fetch_sub_explicit (&counters->in_flight, 1, memory_order_relaxed);
  /* Last: a volume that closes waits for the claims, and may be gone then. */
  lhb_range_release (request->volume->ranges, &request->claim);
  request->complete (request);
}

/* A change is done on every replica that is left.  If one was dropped and the
 * others do not say so durably yet, the answer waits, with the range still
 * claimed: nobody may read what a crash could take back.  That holds for a
 * change that failed, too, for a part of it may be there to be read. */
static void
finish_change (struct lhb_request *request)
{
  if (lhb_volume_hold (request->volume, request))
    return;
  finish (request);
}

void
lhb_request_resume_held (struct lhb_message *message)
{
  finish_change (
      lhb_container_of (message, struct lhb_request, message));
}

/* ---- READ. */

static bool
is_rw (const struct lhb_volume *volume, uint32_t index)
{
  return atomic_load_explicit (&volume->states[index], memory_order_acquire)
         == LHB_STATE_RW;
}

/* The replica with the least reads outstanding at its disk; among equals the
 * one that the region belongs to, so that the page cache of each file holds a
 * different part of the volume. */
static int
choose_source (const struct lhb_request *request)
{
  const struct lhb_volume *volume = request->volume;
  uint32_t count = volume->store_count;
  uint32_t preferred
      = (uint32_t) ((request->first_block >> LHB_RANGE_REGION_SHIFT) % count);
  uint64_t least = UINT64_MAX;
  int best = -1;

  for (uint32_t i = 0; i < count; i++)
    {
      uint32_t index = (preferred + i) % count;
      uint64_t outstanding;

      if (request->tried_mask & (1u << index) || !is_rw (volume, index))
        continue;
      outstanding = atomic_load_explicit (
          &volume->stores[index]->outstanding_bytes, memory_order_relaxed);
      if (outstanding < least)
        {
          least = outstanding;
          best = (int) index;
        }
    }
  return best;
}

static void
finish_read_attempt (struct lhb_request *request, int error)
{
  struct lhb_volume *volume = request->volume;

  if (error == 0)
    {
      /* Another replica had the data: those that failed are bad.  If none
       * has, none is dropped, and the client gets the error. */
      for (uint32_t i = 0; i < volume->store_count; i++)
        if (request->tried_mask & (1u << i) && i != request->source)
          lhb_volume_fail_store (volume, i, EIO, request->offset_bytes,
                                 request->length_bytes);
      request->error = 0;
      finish (request);
      return;
    }
  request->error = error;
  read_from_next_replica (request);
}

static void
run_read (struct lhb_job *job)
{
  struct lhb_request *request
      = lhb_container_of (job, struct lhb_request, job);
  struct lhb_store *store = request->volume->stores[request->source];

  request->legs[0].error = lhb_store_read (
      store, request->first_block, request->block_count, request->buffer);
}

static void
handle_read_job (struct lhb_message *message)
{
  struct lhb_request *request
      = lhb_container_of (message, struct lhb_request, job.done);
  struct lhb_store *store = request->volume->stores[request->source];

  atomic_fetch_sub (&store->outstanding_bytes, request->length_bytes);
  finish_read_attempt (request, request->legs[0].error);
}

static void
read_io_done (struct lhb_io *io)
{
  struct lhb_leg *leg = lhb_container_of (io, struct lhb_leg, io);
  struct lhb_request *request = leg->request;
  struct lhb_store *store = request->volume->stores[request->source];
  int error = 0;

  if (io->result < 0)
    leg->error = io->result;
  else if ((uint32_t) io->result != io->length_bytes)
    leg->error = -EIO;          /* the layer was cut behind our back */
  if (--request->pending > 0)
    return;
  atomic_fetch_sub (&store->outstanding_bytes, request->length_bytes);
  for (uint32_t i = 0; i < LHB_REQUEST_IOS_MAX; i++)
    if (request->legs[i].used && request->legs[i].error)
      error = request->legs[i].error;
  finish_read_attempt (request, error);
}

/* One io for each run that has data.  False: too many runs, nothing done. */
static bool
plan_read_ios (struct lhb_request *request, struct lhb_store *store)
{
  uint64_t block = request->first_block;
  uint32_t left = request->block_count;
  char *at = request->buffer;
  uint32_t used = 0;

  for (uint32_t i = 0; i < LHB_REQUEST_IOS_MAX; i++)
    request->legs[i].used = false;
  while (left > 0)
    {
      struct lhb_run run = lhb_map_lookup (store->map, block, left);
      size_t length = (size_t) run.blocks << LHB_BLOCK_SHIFT;

      if (run.layer == LHB_MAP_ZERO)
        memset (at, 0, length);
      else
        {
          struct lhb_leg *leg;

          if (used == LHB_REQUEST_IOS_MAX)
            return false;
          leg = &request->legs[used++];
          leg->request = request;
          leg->used = true;
          leg->error = 0;
          leg->io.queue = request->queue;
          leg->io.done = read_io_done;
          leg->io.buffer = at;
          leg->io.offset_bytes = block << LHB_BLOCK_SHIFT;
          leg->io.length_bytes = (uint32_t) length;
          leg->io.fd = lhb_store_run_fd (store, run.layer);
          leg->io.op = LHB_IO_PREAD;
          leg->io.rw_flags = 0;
        }
      at += length;
      block += run.blocks;
      left -= run.blocks;
    }
  request->pending = used;
  return true;
}

static void
submit_job (struct lhb_request *request, void (*run) (struct lhb_job *),
            void (*done) (struct lhb_message *))
{
  request->job.run = run;
  request->job.done.handle = done;
  request->job.queue = request->queue;
  lhb_pool_submit (lhb_queue_engine (request->queue)->pool, &request->job);
}

/* The page cache did not have it: read without holding up the queue. */
static void
read_at_driver (struct lhb_request *request, struct lhb_store *store)
{
  add (&request->volume->counters.driver_reads, 1);
  atomic_fetch_add (&store->outstanding_bytes, request->length_bytes);
  if (!plan_read_ios (request, store))
    {
      submit_job (request, run_read, handle_read_job);
      return;
    }
  if (request->pending == 0)
    {
      atomic_fetch_sub (&store->outstanding_bytes, request->length_bytes);
      finish_read_attempt (request, 0);
      return;
    }
  for (uint32_t i = 0, count = request->pending; i < count; i++)
    lhb_io_start (&request->legs[i].io);
}

static void
read_from_next_replica (struct lhb_request *request)
{
  int source = choose_source (request);
  struct lhb_store *store;
  int err = -EAGAIN;

  if (source < 0)
    {
      if (request->error == 0)
        request->error = -EIO;
      finish (request);
      return;
    }
  request->source = (uint32_t) source;
  request->tried_mask |= 1u << source;
  store = request->volume->stores[source];
  if (request->length_bytes <= LHB_INLINE_BYTES_MAX)
    err = lhb_store_try_read (store, request->first_block,
                              request->block_count, request->buffer);
  if (err == -EAGAIN)
    {
      read_at_driver (request, store);
      return;
    }
  add (&request->volume->counters.inline_reads, 1);
  finish_read_attempt (request, err);
}

/* ---- WRITE. */

/* No replica could do it.  Dropping all would lose the volume for a full disk,
 * so those that got furthest stay: they did the same and are equal.  What a
 * failed TRIM or ZERO left cannot be compared, so then only the first stays,
 * unless the file system refused the operation and nothing was done. */
static bool
stays_when_all_failed (const struct lhb_request *request, uint32_t index,
                       uint32_t furthest, uint32_t first)
{
  const struct lhb_leg *leg = &request->legs[index];

  if (request->op == LHB_OP_TRIM || request->op == LHB_OP_ZERO)
    return index == first || leg->error == -EOPNOTSUPP;
  return leg->written_bytes == furthest;
}

/* Judge the replicas' results: one that failed where another succeeded is
 * dropped.  The request succeeded if every replica that is still RW did it;
 * the last RW replica is never dropped, so its failure is the client's. */
static void
judge_legs (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;
  uint32_t furthest = 0, first = UINT32_MAX;
  bool any_good = false;
  int error = 0, rw = 0;

  for (uint32_t i = 0; i < volume->store_count; i++)
    {
      struct lhb_leg *leg = &request->legs[i];

      if (!leg->used)
        continue;
      any_good |= leg->error == 0;
      if (first == UINT32_MAX)
        first = i;
      if (leg->written_bytes > furthest)
        furthest = leg->written_bytes;
    }
  for (uint32_t i = 0; i < volume->store_count; i++)
    {
      struct lhb_leg *leg = &request->legs[i];

      if (!leg->used || leg->error == 0)
        continue;
      if (any_good || !stays_when_all_failed (request, i, furthest, first))
        lhb_volume_fail_store (volume, i, -leg->error, request->offset_bytes,
                               request->length_bytes);
    }
  for (uint32_t i = 0; i < volume->store_count; i++)
    if (request->legs[i].used && is_rw (volume, i))
      {
        rw++;
        if (request->legs[i].error)
          error = request->legs[i].error;
      }
  request->error = rw == 0 ? -EIO : error;
  if (request->error == -ENOSPC)
    lhb_volume_report_full (volume, request->offset_bytes);
}

static void
end_leg (struct lhb_request *request)
{
  if (--request->pending > 0)
    return;
  judge_legs (request);
  finish_change (request);
}

static void
write_io_done (struct lhb_io *io)
{
  struct lhb_leg *leg = lhb_container_of (io, struct lhb_leg, io);
  struct lhb_request *request = leg->request;
  uint32_t index = (uint32_t) (leg - request->legs);
  struct lhb_store *store = request->volume->stores[index];
  int fault = lhb_fault (LHB_FAULT_STORE_WRITE, store->id);

  leg->written_bytes = io->result > 0 ? (uint32_t) io->result : 0;
  if (io->result < 0)
    leg->error = io->result;
  else if (leg->written_bytes != io->length_bytes)
    leg->error = -ENOSPC;       /* what cuts a write short is a full disk */
  if (fault)
    leg->error = fault;
  /* The sync of a FUA write takes any error of the file with it, also that of
   * an older write: no fdatasync will report it again. */
  if (leg->error == -EIO && request->flags & LHB_IO_FUA)
    atomic_store (&store->sync_failed, true);
  lhb_store_wrote (store, request->first_block, leg->written_bytes);
  end_leg (request);
}

/* A copy into the page cache, in the queue's thread or in a worker's. */
void
lhb_leg_write (struct lhb_leg *leg)
{
  struct lhb_request *request = leg->request;
  uint32_t index = (uint32_t) (leg - request->legs);
  struct lhb_store *store = request->volume->stores[index];
  uint64_t before = lhb_now_ns (), after;

  leg->written_bytes
      = lhb_store_write (store, request->first_block, request->block_count,
                         request->buffer, 0, &leg->error);
  lhb_store_wrote (store, request->first_block, leg->written_bytes);
  after = lhb_now_ns ();
  if (after - before > LHB_SLOW_WRITE_NS)
    atomic_store_explicit (&store->slow_until_ns, after + LHB_SLOW_PENALTY_NS,
                           memory_order_relaxed);
}

void
lhb_leg_done (struct lhb_leg *leg)
{
  end_leg (leg->request);
}

static void
run_leg_write (struct lhb_job *job)
{
  lhb_leg_write (lhb_container_of (job, struct lhb_leg, job));
}

static void
handle_leg_written (struct lhb_message *message)
{
  lhb_leg_done (lhb_container_of (message, struct lhb_leg, job.done));
}

/* The page cache blocks whoever copies into it, io_uring's threads as well as
 * ours: a worker does it. */
static void
write_in_worker (struct lhb_request *request, struct lhb_leg *leg)
{
  leg->job.run = run_leg_write;
  leg->job.done.handle = handle_leg_written;
  leg->job.queue = request->queue;
  lhb_pool_submit (request->volume->engine->pool, &leg->job);
}

static void
write_at_driver (struct lhb_request *request, struct lhb_store *store,
                 struct lhb_leg *leg)
{
  struct lhb_io *io = &leg->io;

  io->queue = request->queue;
  io->done = write_io_done;
  io->buffer = request->buffer;
  io->offset_bytes = request->first_block << LHB_BLOCK_SHIFT;
  io->length_bytes = request->block_count << LHB_BLOCK_SHIFT;
  io->fd = lhb_store_run_fd (store, LHB_MAP_HEAD);
  io->op = LHB_IO_PWRITE;
  io->rw_flags = request->flags & LHB_IO_FUA ? RWF_DSYNC : 0;
  lhb_io_start (io);
}

static bool
may_write_inline (const struct lhb_request *request,
                  const struct lhb_store *store)
{
  return (request->flags & LHB_IO_FUA) == 0
         && request->length_bytes <= LHB_INLINE_BYTES_MAX
         && !lhb_store_is_direct (store)
         && atomic_load_explicit (&store->slow_until_ns, memory_order_relaxed)
                <= request->start_ns;
}

/* Start the legs: one for every replica that is RW now.  Returns how many. */
static uint32_t
enlist_replicas (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;
  uint32_t count = 0;

  for (uint32_t i = 0; i < volume->store_count; i++)
    {
      struct lhb_leg *leg = &request->legs[i];

      leg->request = request;
      leg->used = is_rw (volume, i);
      leg->error = 0;
      leg->written_bytes = 0;
      count += leg->used;
    }
  /* One more than the legs, so that legs that end at once do not finish the
   * request while others are still being started. */
  request->pending = count + 1;
  return count;
}

static void
write_to_replicas (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;
  bool inline_all = true;

  enlist_replicas (request);
  for (uint32_t i = 0; i < volume->store_count; i++)
    {
      struct lhb_leg *leg = &request->legs[i];
      struct lhb_store *store = volume->stores[i];

      if (!leg->used)
        continue;
      leg->error = atomic_load_explicit (&store->sync_failed,
                                         memory_order_relaxed)
                       ? -EIO
                       : lhb_map_reserve_head (store->map,
                                               request->first_block,
                                               request->block_count);
      if (leg->error)
        {
          request->pending--;
          continue;
        }
      if (may_write_inline (request, store))
        {
          if (volume->store_count > 1
              && lhb_batches_add (lhb_queue_batches (request->queue), leg))
            continue;
          lhb_leg_write (leg);
          request->pending--;
          continue;
        }
      inline_all = false;
      if (lhb_store_is_direct (store) || request->flags & LHB_IO_FUA)
        write_at_driver (request, store, leg);
      else
        write_in_worker (request, leg);
    }
  add (inline_all ? &volume->counters.inline_writes
                  : &volume->counters.driver_writes,
       1);
  end_leg (request);
}

/* A write that begins or ends inside a block is widened to whole blocks: the
 * rest of the edge blocks is filled in from the volume. */
static void
merge_edges (struct lhb_request *request)
{
  uint64_t head_bytes = request->offset_bytes % LHB_BLOCK_BYTES;
  uint64_t end = head_bytes + request->length_bytes;
  uint64_t tail_bytes = end % LHB_BLOCK_BYTES;

  if (head_bytes > 0)
    memcpy (request->buffer, request->edges, head_bytes);
  if (tail_bytes > 0)
    memcpy (request->buffer + end,
            request->edges + LHB_BLOCK_BYTES + tail_bytes,
            LHB_BLOCK_BYTES - tail_bytes);
}

static int
read_edges (struct lhb_request *request, struct lhb_store *store,
            int (*read) (struct lhb_store *, uint64_t, uint32_t, void *))
{
  uint64_t last = request->first_block + request->block_count - 1;
  int err = read (store, request->first_block, 1, request->edges);

  if (err == 0)
    err = read (store, last, 1, request->edges + LHB_BLOCK_BYTES);
  return err;
}

/* In a worker.  A replica that cannot be read is not dropped for this: if it
 * is bad, its write or a client's read will tell. */
static void
run_edges (struct lhb_job *job)
{
  struct lhb_request *request
      = lhb_container_of (job, struct lhb_request, job);
  struct lhb_volume *volume = request->volume;

  request->error = -EIO;
  for (uint32_t i = 0; i < volume->store_count && request->error; i++)
    if (is_rw (volume, i))
      request->error
          = read_edges (request, volume->stores[i], lhb_store_read);
}

static void
handle_edges_job (struct lhb_message *message)
{
  struct lhb_request *request
      = lhb_container_of (message, struct lhb_request, job.done);

  if (request->error)
    {
      finish (request);
      return;
    }
  merge_edges (request);
  write_to_replicas (request);
}

static void
execute_write (struct lhb_request *request)
{
  int source;

  if (request->edges == NULL)
    {
      write_to_replicas (request);
      return;
    }
  source = choose_source (request);
  if (source >= 0
      && read_edges (request, request->volume->stores[source],
                     lhb_store_try_read)
             == 0)
    {
      merge_edges (request);
      write_to_replicas (request);
      return;
    }
  submit_job (request, run_edges, handle_edges_job);
}

/* ---- TRIM and ZERO: blocking, so always in the pool. */

static void
run_zero (struct lhb_job *job)
{
  struct lhb_leg *leg = lhb_container_of (job, struct lhb_leg, job);
  struct lhb_request *request = leg->request;
  uint32_t index = (uint32_t) (leg - request->legs);
  struct lhb_store *store = request->volume->stores[index];

  leg->error = atomic_load (&store->sync_failed) ? -EIO : 0;
  if (leg->error == 0)
    leg->error = lhb_store_zero (store, request->offset_bytes,
                                 request->length_bytes,
                                 request->op == LHB_OP_TRIM, request->flags);
  if (leg->error == 0 && request->flags & LHB_IO_FUA)
    leg->error = lhb_store_sync (store);
}

static void handle_zero_done (struct lhb_message *message);

static void
submit_zero (struct lhb_leg *leg)
{
  leg->job.run = run_zero;
  leg->job.done.handle = handle_zero_done;
  leg->job.queue = leg->request->queue;
  lhb_pool_submit (leg->request->volume->engine->pool, &leg->job);
}

/* Some replicas were fast and others can not be: the slow way for those, for
 * they are not bad.  True: they are under way. */
static bool
retry_slow_legs (struct lhb_request *request)
{
  const uint32_t count = request->volume->store_count;
  uint32_t slow = 0, good = 0;

  if (!(request->flags & LHB_IO_FAST_ZERO))
    return false;
  for (uint32_t i = 0; i < count; i++)
    if (request->legs[i].used)
      {
        slow += request->legs[i].error == -EOPNOTSUPP;
        good += request->legs[i].error == 0;
      }
  if (slow == 0 || good == 0)
    return false;
  request->flags &= ~(uint32_t) LHB_IO_FAST_ZERO;
  request->pending = slow;
  for (uint32_t i = 0; i < count; i++)
    if (request->legs[i].used && request->legs[i].error == -EOPNOTSUPP)
      submit_zero (&request->legs[i]);
  return true;
}

static void
handle_zero_done (struct lhb_message *message)
{
  struct lhb_request *request
      = lhb_container_of (message, struct lhb_leg, job.done)->request;

  if (request->pending > 1 || !retry_slow_legs (request))
    end_leg (request);
}

static void
execute_zero (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;

  enlist_replicas (request);
  for (uint32_t i = 0; i < volume->store_count; i++)
    if (request->legs[i].used)
      submit_zero (&request->legs[i]);
  end_leg (request);
}

/* ---- FLUSH. */

static void
handle_synced (struct lhb_message *message)
{
  end_leg (lhb_container_of (message, struct lhb_leg, synced)->request);
}

/* In the worker that ran the group commit. */
static void
sync_done (struct lhb_sync_wait *wait, int error)
{
  struct lhb_leg *leg = lhb_container_of (wait, struct lhb_leg, sync);

  leg->error = error;
  leg->synced.handle = handle_synced;
  lhb_queue_post (leg->request->queue, &leg->synced);
}

static void
execute_flush (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;

  enlist_replicas (request);
  for (uint32_t i = 0; i < volume->store_count; i++)
    {
      struct lhb_leg *leg = &request->legs[i];

      if (!leg->used)
        continue;
      leg->sync.done = sync_done;
      lhb_store_sync_async (volume->stores[i], &leg->sync);
    }
  end_leg (request);
}

/* ---- PROBE. */

static void
run_probe (struct lhb_job *job)
{
  struct lhb_request *request
      = lhb_container_of (job, struct lhb_request, job);

  request->probe (request);
}

static void
handle_probe_done (struct lhb_message *message)
{
  finish (lhb_container_of (message, struct lhb_request, job.done));
}

/* ---- The beginning. */

static bool
depends_on_gate (const struct lhb_request *request)
{
  return request->op == LHB_OP_FLUSH || request->flags & LHB_IO_FUA;
}

static void
execute (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;

  /* The gate is shut in a freeze, and this request may have waited for it to
   * end.  Later freezes must not wait for the gate, so the claim goes. */
  if (depends_on_gate (request) && atomic_load (&volume->gate_shut))
    {
      lhb_range_release (volume->ranges, &request->claim);
      if (!lhb_volume_wait_gate (volume, request))
        claim_range (request);
      return;
    }
  switch (request->op)
    {
    case LHB_OP_READ:
      read_from_next_replica (request);
      return;
    case LHB_OP_WRITE:
      execute_write (request);
      return;
    case LHB_OP_FLUSH:
      execute_flush (request);
      return;
    case LHB_OP_PROBE:
      submit_job (request, run_probe, handle_probe_done);
      return;
    default:
      execute_zero (request);
      return;
    }
}

static void
handle_granted (struct lhb_message *message)
{
  execute (lhb_container_of (message, struct lhb_request, message));
}

/* In the thread of whoever released the last conflicting claim. */
static void
claim_granted (struct lhb_range_claim *claim)
{
  struct lhb_request *request
      = lhb_container_of (claim, struct lhb_request, claim);

  request->message.handle = handle_granted;
  lhb_queue_post (request->queue, &request->message);
}

static void
claim_range (struct lhb_request *request)
{
  static const enum lhb_range_kind kinds[] = {
    [LHB_OP_READ] = LHB_RANGE_READ,   [LHB_OP_WRITE] = LHB_RANGE_WRITE,
    [LHB_OP_FLUSH] = LHB_RANGE_FLUSH, [LHB_OP_TRIM] = LHB_RANGE_WRITE,
    [LHB_OP_ZERO] = LHB_RANGE_WRITE,  [LHB_OP_PROBE] = LHB_RANGE_READ,
  };
  struct lhb_volume *volume = request->volume;
  uint64_t last = request->offset_bytes + request->length_bytes;

  last = last > request->offset_bytes ? last - 1 : last;
  request->first_block = request->offset_bytes >> LHB_BLOCK_SHIFT;
  request->claim.first_block = request->first_block;
  request->claim.last_block = last >> LHB_BLOCK_SHIFT;
  request->claim.kind = kinds[request->op];
  request->claim.granted = claim_granted;
  if (request->op == LHB_OP_READ || request->op == LHB_OP_WRITE)
    request->block_count = (uint32_t) (request->claim.last_block
                                       - request->first_block + 1);
  if (lhb_range_acquire (volume->ranges, &request->claim))
    execute (request);
  else
    add (&volume->counters.waits, 1);
}

void
lhb_request_resume_gated (struct lhb_message *message)
{
  claim_range (lhb_container_of (message, struct lhb_request, message));
}

void
lhb_request_start (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;

  assert (request->op < LHB_OP_COUNT);
  assert (request->op == LHB_OP_FLUSH || request->length_bytes > 0);
  request->error = 0;
  request->tried_mask = 0;
  request->start_ns = lhb_now_ns ();
  add (&volume->counters.in_flight, 1);
  if (depends_on_gate (request) && lhb_volume_wait_gate (volume, request))
    return;
  claim_range (request);
}
