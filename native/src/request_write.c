/* WRITE: widened to whole blocks, then to every replica. */

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include "lhb_batch.h"
#include "lhb_fault.h"
#include "lhb_queue.h"
#include "lhb_request_steps.h"
#include "lhb_util.h"

static void
write_io_done (struct lhb_io *io)
{
  struct lhb_leg *leg = lhb_container_of (io, struct lhb_leg, io);
  struct lhb_request *request = leg->request;
  uint32_t index = (uint32_t) (leg - request->legs);
  struct lhb_store *store = request->volume->stores[index];
  int fault = lhb_fault (LHB_FAULT_STORE_WRITE, store->id);

  leg->done_bytes = io->result > 0 ? (uint32_t) io->result : 0;
  if (io->result < 0)
    leg->error = io->result;
  else if (leg->done_bytes != io->length_bytes)
    leg->error = -ENOSPC;       /* what cuts a write short is a full disk */
  if (fault)
    leg->error = fault;
  /* The sync of a FUA write takes any error of the file with it, also that of
   * an older write: no fdatasync will report it again. */
  if (leg->error == -EIO && request->flags & LHB_IO_FUA)
    atomic_store (&store->sync_failed, true);
  /* What reached the disk is unknown, unless there was no room for it. */
  leg->unsure = lhb_store_is_direct (store) && leg->error != 0
                && leg->error != -ENOSPC && leg->error != -EDQUOT
                && leg->error != -EFBIG && leg->error != -ENOMEM;
  lhb_store_wrote (store, request->first_block, leg->done_bytes);
  lhb_request_end_leg (request);
}

/* A copy into the page cache, in the queue's thread or in a worker's. */
void
lhb_leg_write (struct lhb_leg *leg)
{
  struct lhb_request *request = leg->request;
  uint32_t index = (uint32_t) (leg - request->legs);
  struct lhb_store *store = request->volume->stores[index];
  uint64_t before = lhb_now_ns (), after;

  leg->done_bytes
      = lhb_store_write (store, request->first_block, request->block_count,
                         request->buffer, 0, &leg->error);
  lhb_store_wrote (store, request->first_block, leg->done_bytes);
  after = lhb_now_ns ();
  if (after - before > LHB_SLOW_WRITE_NS)
    atomic_store_explicit (&store->slow_until_ns, after + LHB_SLOW_PENALTY_NS,
                           memory_order_relaxed);
}

void
lhb_leg_done (struct lhb_leg *leg)
{
  lhb_request_end_leg (leg->request);
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

static void
write_call_done (struct lhb_peer_call *call)
{
  lhb_request_end_leg (lhb_leg_of_call (call)->request);
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

void
lhb_request_write_blocks (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;
  bool inline_all = true;

  lhb_request_enlist (request);
  for (uint32_t i = 0; i < volume->store_count; i++)
    {
      struct lhb_leg *leg = &request->legs[i];
      struct lhb_store *store = volume->stores[i];

      if (!leg->used)
        continue;
      if (store->peer != NULL)
        {
          inline_all = false;
          lhb_leg_start_call (leg, i, LHB_OP_WRITE, write_call_done);
          continue;
        }
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
  lhb_count (inline_all ? &volume->counters.inline_writes
                  : &volume->counters.driver_writes,
       1);
  lhb_request_end_leg (request);
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
  int err = read (store, request->first_block, 1, request->edges);

  if (err == 0)
    err = read (store, request->claim.last_block, 1,
                request->edges + LHB_BLOCK_BYTES);
  return err;
}

/* In a worker.  A replica that cannot be read is not dropped for this: if it
 * is bad, its write or a client's read will tell.  Peers come after. */
static void
run_edges (struct lhb_job *job)
{
  struct lhb_request *request
      = lhb_container_of (job, struct lhb_request, job);
  struct lhb_volume *volume = request->volume;

  request->error = -EIO;
  for (uint32_t i = 0; i < volume->store_count && request->error; i++)
    if (lhb_request_is_rw (volume, i) && volume->stores[i]->peer == NULL)
      {
        request->tried_mask |= 1u << i;
        request->error
            = read_edges (request, volume->stores[i], lhb_store_read);
      }
}

static void
handle_edges_job (struct lhb_message *message)
{
  struct lhb_request *request
      = lhb_container_of (message, struct lhb_request, job.done);

  if (request->error)
    lhb_request_read_peer_edges (request);
  else
    lhb_request_edges_read (request);
}

void
lhb_request_edges_read (struct lhb_request *request)
{
  if (request->op != LHB_OP_WRITE)
    {
      lhb_request_zero_widened (request);
      return;
    }
  merge_edges (request);
  lhb_request_write_blocks (request);
}

void
lhb_request_read_edges (struct lhb_request *request)
{
  int source = lhb_request_choose_source (request);
  struct lhb_store *store
      = source < 0 ? NULL : request->volume->stores[source];

  if (store == NULL || store->peer != NULL)
    lhb_request_read_peer_edges (request);
  else if (read_edges (request, store, lhb_store_try_read) == 0)
    lhb_request_edges_read (request);
  else
    lhb_request_submit_job (request, run_edges, handle_edges_job);
}

void
lhb_request_write (struct lhb_request *request)
{
  if (request->edges == NULL)
    lhb_request_write_blocks (request);
  else
    lhb_request_read_edges (request);
}
