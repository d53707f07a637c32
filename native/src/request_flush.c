/* TRIM, ZERO and FLUSH: they block, so workers do them. */

#include <errno.h>

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
      store, request->offset_bytes, request->length_bytes,
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

void
lhb_request_zero (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;

  lhb_request_enlist (request);
  for (uint32_t i = 0; i < volume->store_count; i++)
    if (request->legs[i].used)
      submit_zero (&request->legs[i]);
  end_zero_leg (request);
}

static void
handle_synced (struct lhb_message *message)
{
  lhb_request_end_leg (
      lhb_container_of (message, struct lhb_leg, synced)->request);
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
flush_call_done (struct lhb_peer_call *call)
{
  lhb_request_end_leg (lhb_leg_of_call (call)->request);
}

void
lhb_request_flush (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;

  lhb_request_enlist (request);
  for (uint32_t i = 0; i < volume->store_count; i++)
    {
      struct lhb_leg *leg = &request->legs[i];

      if (!leg->used)
        continue;
      if (volume->stores[i]->peer != NULL)
        {
          lhb_leg_start_call (leg, i, LHB_OP_FLUSH, flush_call_done);
          continue;
        }
      leg->sync.done = sync_done;
      lhb_store_sync_async (volume->stores[i], &leg->sync);
    }
  lhb_request_end_leg (request);
}
