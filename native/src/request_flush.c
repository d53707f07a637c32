/* FLUSH: a sync of every local store, in workers, and a frame to each peer. */

#include "lhb_queue.h"
#include "lhb_request_steps.h"
#include "lhb_util.h"

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
