/* TRIM and ZERO: they block, so workers do them. */

#include <errno.h>
#include <string.h>

#include "lhb_queue.h"
#include "lhb_request_steps.h"
#include "lhb_util.h"

static void
run_zero (struct lhb_job *job)
{
  struct lhb_leg *leg = lhb_container_of (job, struct lhb_leg, job);
  struct lhb_request *request = leg->request;
  uint32_t index = (uint32_t) (leg - request->legs);
  struct lhb_store *store = request->volume->stores[index];
  struct lhb_progress progress;

  leg->error = atomic_load (&store->sync_failed) ? -EIO : 0;
  if (leg->error)
    return;
  leg->error = lhb_store_zero_noting (
      store, request->zero_offset_bytes, request->zero_length_bytes,
      request->op == LHB_OP_TRIM, request->flags, &progress);
  leg->done_bytes = progress.done_bytes;
  leg->unsure = progress.changed;
  if (leg->error == 0 && request->flags & LHB_IO_FUA)
    {
      leg->error = lhb_store_sync (store);
      leg->unsure = true;
    }
}

static void handle_zero_done (struct lhb_message *message);
static void zero_call_done (struct lhb_peer_call *call);

static void
submit_zero (struct lhb_leg *leg)
{
  struct lhb_request *request = leg->request;
  uint32_t index = (uint32_t) (leg - request->legs);

  if (request->volume->stores[index]->peer != NULL)
    {
      lhb_leg_start_call (leg, index, request->op, zero_call_done);
      return;
    }
  leg->job.run = run_zero;
  leg->job.done.handle = handle_zero_done;
  leg->job.queue = request->queue;
  lhb_pool_submit (request->volume->engine->pool, &leg->job);
}

/* Some replicas were fast, or came further, and others can not be: the slow way
 * for those, for they are not bad.  True: they are under way. */
static bool
retry_slow_legs (struct lhb_request *request)
{
  const uint32_t count = request->volume->store_count;
  uint64_t least = UINT64_MAX, most = 0;
  uint32_t slow = 0, good = 0;

  if (!(request->flags & LHB_IO_FAST_ZERO))
    return false;
  for (uint32_t i = 0; i < count; i++)
    if (request->legs[i].used)
      {
        slow += request->legs[i].error == -EOPNOTSUPP;
        good += request->legs[i].error == 0;
        if (request->legs[i].done_bytes < least)
          least = request->legs[i].done_bytes;
        if (request->legs[i].done_bytes > most)
          most = request->legs[i].done_bytes;
      }
  if (slow == 0 || (good == 0 && least == most))
    return false;
  request->flags &= ~(uint32_t) LHB_IO_FAST_ZERO;
  request->pending = slow + 1;
  for (uint32_t i = 0; i < count; i++)
    if (request->legs[i].used && request->legs[i].error == -EOPNOTSUPP)
      submit_zero (&request->legs[i]);
  lhb_request_end_leg (request);
  return true;
}

static void
end_zero_leg (struct lhb_request *request)
{
  if (request->pending > 1 || !retry_slow_legs (request))
    lhb_request_end_leg (request);
}

static void
handle_zero_done (struct lhb_message *message)
{
  end_zero_leg (lhb_container_of (message, struct lhb_leg, job.done)->request);
}

static void
zero_call_done (struct lhb_peer_call *call)
{
  end_zero_leg (lhb_leg_of_call (call)->request);
}

static void
zero_on_replicas (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;

  lhb_request_enlist (request);
  for (uint32_t i = 0; i < volume->store_count; i++)
    if (request->legs[i].used)
      submit_zero (&request->legs[i]);
  end_zero_leg (request);
}

/* ---- Partial blocks, with a store that can not be read.
 *
 * A replica zeroes a part of a block by itself, but one that is being rebuilt
 * does not have the rest of the block yet.  So the whole blocks are zeroed
 * first; then the edge blocks, read from the volume, are written with their
 * part of zeros: three steps, each on all replicas and judged. */

static bool
has_wo (const struct lhb_volume *volume)
{
  for (uint32_t i = 0; i < volume->store_count; i++)
    if (atomic_load_explicit (&volume->states[i], memory_order_acquire)
        == LHB_STATE_WO)
      return true;
  return false;
}

static void
write_edge (struct lhb_request *request, uint64_t block, char *edge)
{
  request->first_block = block;
  request->block_count = 1;
  request->buffer = edge;
  lhb_request_write_blocks (request);
}

bool
lhb_request_next_zero_step (struct lhb_request *request)
{
  const struct lhb_range_claim *claim = &request->claim;
  uint64_t end = request->offset_bytes + request->length_bytes;

  switch (request->zero_step)
    {
    case LHB_ZERO_HEAD:
      request->zero_step = LHB_ZERO_TAIL;
      if (request->offset_bytes % LHB_BLOCK_BYTES > 0
          || claim->first_block == claim->last_block)
        {
          write_edge (request, claim->first_block, request->edges);
          return true;
        }
      /* fall through */
    case LHB_ZERO_TAIL:
      request->zero_step = LHB_ZERO_WHOLE;
      if (end % LHB_BLOCK_BYTES > 0
          && claim->first_block != claim->last_block)
        {
          write_edge (request, claim->last_block,
                      request->edges + LHB_BLOCK_BYTES);
          return true;
        }
      /* fall through */
    default:
      return false;
    }
}

/* The parts of the edge blocks that are to be zeros. */
static void
clear_edges (struct lhb_request *request)
{
  size_t start = request->offset_bytes % LHB_BLOCK_BYTES;
  size_t tail = (size_t) ((request->offset_bytes + request->length_bytes)
                          % LHB_BLOCK_BYTES);

  if (request->claim.first_block == request->claim.last_block)
    memset (request->edges + start, 0, (size_t) request->length_bytes);
  else
    {
      memset (request->edges + start, 0, LHB_BLOCK_BYTES - start);
      memset (request->edges + LHB_BLOCK_BYTES, 0, tail);
    }
}

void
lhb_request_zero_widened (struct lhb_request *request)
{
  const uint64_t mask = LHB_BLOCK_BYTES - 1;
  uint64_t first = (request->offset_bytes + mask) & ~mask;
  uint64_t last = (request->offset_bytes + request->length_bytes) & ~mask;

  clear_edges (request);
  request->zero_step = LHB_ZERO_HEAD;
  if (first < last)
    {
      request->zero_offset_bytes = first;
      request->zero_length_bytes = last - first;
      zero_on_replicas (request);
    }
  else
    (void) lhb_request_next_zero_step (request);
}

void
lhb_request_zero (struct lhb_request *request)
{
  request->zero_step = LHB_ZERO_WHOLE;
  request->zero_offset_bytes = request->offset_bytes;
  request->zero_length_bytes = request->length_bytes;
  if (request->edges != NULL && has_wo (request->volume))
    lhb_request_read_edges (request);
  else
    zero_on_replicas (request);
}
