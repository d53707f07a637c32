/* Volume: open and close, replica states, freeze, gate and fence. */

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lhb_activity.h"
#include "lhb_connection.h"
#include "lhb_fuse.h"
#include "lhb_peer.h"
#include "lhb_queue.h"
#include "lhb_util.h"
#include "lhb_volume.h"

int
lhb_volume_open (lhb_engine *engine, uint64_t size_bytes, uint32_t flags,
                 lhb_volume **volume_out)
{
  struct lhb_volume *volume;
  int err;

  if (size_bytes == 0 || size_bytes % LHB_BLOCK_BYTES != 0
      || size_bytes > INT64_MAX)
    return -EINVAL;
  volume = calloc (1, sizeof *volume);
  if (volume == NULL)
    return -ENOMEM;
  err = lhb_range_open (&volume->ranges);
  if (err)
    {
      free (volume);
      return err;
    }
  volume->engine = engine;
  volume->id = lhb_engine_new_id (engine);
  volume->size_bytes = size_bytes;
  volume->flags = flags;
  lhb_trackers_init (&volume->trackers, size_bytes);
  lhb_mutex_init (&volume->lock);
  if (pthread_cond_init (&volume->changed, NULL) != 0)
    abort ();
  *volume_out = volume;
  return 0;
}

uint64_t
lhb_volume_id (const lhb_volume *volume)
{
  return volume->id;
}

uint64_t
lhb_volume_size_bytes (const lhb_volume *volume)
{
  return atomic_load (&volume->size_bytes);
}

/* Requests that a list held go on in their queues' threads. */
static void
resume_all (struct lhb_request *list,
            void (*handle) (struct lhb_message *message))
{
  while (list != NULL)
    {
      struct lhb_request *next = list->next;

      list->message.handle = handle;
      lhb_queue_post (list->queue, &list->message);
      list = next;
    }
}

/* A freeze waits for the claims there are.  A request that comes from the gate
 * has yet to make its claim, but it is counted; one that is no longer counted
 * may have yet to release it. */
static void
end_requests (struct lhb_volume *volume)
{
  bool all_claimed;

  do
    {
      all_claimed = atomic_load (&volume->counters.in_flight) == 0;
      (void) lhb_volume_freeze (volume);
      lhb_volume_thaw (volume);
    }
  while (!all_claimed);
}

void
lhb_volume_close (lhb_volume *volume)
{
  struct lhb_request *held;

  if (volume == NULL)
    return;
  lhb_volume_gate_flushes (volume, 0);
  pthread_mutex_lock (&volume->lock);
  /* No connection comes any more.  Nobody will fence any more: what waits for
   * that was not acknowledged and now ends with an error. */
  volume->closing = true;
  held = volume->held;
  volume->held = NULL;
  pthread_mutex_unlock (&volume->lock);
  lhb_connections_close_all (volume);
  resume_all (held, lhb_request_resume_held);
  lhb_fuse_release_volume (volume);
  pthread_mutex_lock (&volume->lock);
  while (volume->connection_count > 0)
    pthread_cond_wait (&volume->changed, &volume->lock);
  pthread_mutex_unlock (&volume->lock);
  end_requests (volume);
  for (uint32_t i = 0; i < volume->store_count; i++)
    if (volume->stores[i]->peer != NULL)
      lhb_peer_set_volume (volume->stores[i]->peer, NULL);
  lhb_range_close (volume->ranges);
  lhb_trackers_free (&volume->trackers);
  lhb_activity_free (volume->activity);
  pthread_cond_destroy (&volume->changed);
  pthread_mutex_destroy (&volume->lock);
  free (volume);
}

int
lhb_volume_resize (lhb_volume *volume, uint64_t size_bytes)
{
  int err;

  if (size_bytes % LHB_BLOCK_BYTES != 0
      || size_bytes < atomic_load (&volume->size_bytes))
    return -EINVAL;
  err = lhb_trackers_resize (&volume->trackers, size_bytes);
  if (err == 0)
    atomic_store (&volume->size_bytes, size_bytes);
  return err;
}

/* ---- The fence. */

int
lhb_volume_fenced (lhb_volume *volume, uint64_t store_id)
{
  struct lhb_request *held = NULL;
  int err = -ENOENT;

  pthread_mutex_lock (&volume->lock);
  for (uint32_t i = 0; i < volume->store_count; i++)
    if (volume->stores[i]->id == store_id
        && atomic_load (&volume->states[i]) == LHB_STATE_FAILED)
      {
        atomic_store (&volume->states[i], LHB_STATE_GONE);
        if (atomic_fetch_sub (&volume->unfenced, 1) == 1)
          {
            held = volume->held;
            volume->held = NULL;
          }
        err = 0;
      }
  pthread_mutex_unlock (&volume->lock);
  resume_all (held, lhb_request_resume_held);
  return err;
}

void
lhb_volume_give_up (lhb_volume *volume)
{
  struct lhb_request *held;

  pthread_mutex_lock (&volume->lock);
  atomic_store (&volume->given_up, true);
  held = volume->held;
  volume->held = NULL;
  pthread_mutex_unlock (&volume->lock);
  resume_all (held, lhb_request_resume_held);
  lhb_volume_gate_flushes (volume, 0);
}

bool
lhb_volume_hold (struct lhb_volume *volume, struct lhb_request *request)
{
  bool hold;

  if (atomic_load (&volume->unfenced) == 0)
    return false;
  pthread_mutex_lock (&volume->lock);
  hold = atomic_load (&volume->unfenced) > 0 && !volume->closing
         && !atomic_load (&volume->given_up);
  if (hold)
    {
      request->next = volume->held;
      volume->held = request;
    }
  else if (volume->closing)
    request->error = -EIO;
  pthread_mutex_unlock (&volume->lock);
  return hold;
}

void
lhb_volume_report_full (struct lhb_volume *volume, uint64_t offset_bytes)
{
  struct lhb_event event = {
    .type = LHB_EVENT_OUT_OF_SPACE,
    .error = ENOSPC,
    .volume_id = volume->id,
    .offset_bytes = offset_bytes,
  };
  uint64_t now = lhb_now_ns ();
  bool post;

  pthread_mutex_lock (&volume->lock);
  post = now - volume->last_full_event_ns > 1000000000u;
  if (post)
    volume->last_full_event_ns = now;
  pthread_mutex_unlock (&volume->lock);
  if (post)
    lhb_engine_post_event (volume->engine, &event);
}

/* ---- The gate of flushes. */

void
lhb_volume_gate_flushes (lhb_volume *volume, int shut)
{
  struct lhb_request *gated = NULL;

  pthread_mutex_lock (&volume->lock);
  atomic_store (&volume->gate_shut, shut != 0);
  if (!shut)
    {
      gated = volume->gated;
      volume->gated = NULL;
    }
  pthread_mutex_unlock (&volume->lock);
  resume_all (gated, lhb_request_resume_gated);
}

bool
lhb_volume_wait_gate (struct lhb_volume *volume, struct lhb_request *request)
{
  bool shut;

  if (!atomic_load (&volume->gate_shut))
    return false;
  pthread_mutex_lock (&volume->lock);
  shut = atomic_load (&volume->gate_shut);
  if (shut)
    {
      request->next = volume->gated;
      volume->gated = request;
    }
  pthread_mutex_unlock (&volume->lock);
  return shut;
}

/* ---- Claims of threads that may block. */

/* Claims of one volume share its condition: the waiter asks its own flag. */
static void
wake_claimer (struct lhb_range_claim *claim)
{
  struct lhb_volume *volume = claim->owner;

  pthread_mutex_lock (&volume->lock);
  claim->owner = NULL;
  pthread_cond_broadcast (&volume->changed);
  pthread_mutex_unlock (&volume->lock);
}

void
lhb_volume_claim (struct lhb_volume *volume, enum lhb_range_kind kind,
                  uint64_t block, uint64_t blocks,
                  struct lhb_range_claim *claim)
{
  claim->first_block = block;
  claim->last_block = block + blocks - 1;
  claim->kind = kind;
  claim->granted = wake_claimer;
  claim->owner = volume;
  if (lhb_range_acquire (volume->ranges, claim))
    return;
  pthread_mutex_lock (&volume->lock);
  while (claim->owner != NULL)
    pthread_cond_wait (&volume->changed, &volume->lock);
  pthread_mutex_unlock (&volume->lock);
}

int
lhb_volume_freeze (lhb_volume *volume)
{
  uint64_t asked_ns;

  pthread_mutex_lock (&volume->lock);
  while (volume->frozen)
    pthread_cond_wait (&volume->changed, &volume->lock);
  volume->frozen = true;
  pthread_mutex_unlock (&volume->lock);
  /* New requests wait from the moment the claim stands in the table, so the
   * pause is counted from here. */
  asked_ns = lhb_now_ns ();
  lhb_volume_claim (volume, LHB_RANGE_FREEZE, 0, UINT64_MAX,
                    &volume->freeze_claim);
  volume->frozen_at_ns = asked_ns;
  return 0;
}

void
lhb_volume_thaw (lhb_volume *volume)
{
  uint64_t pause_ns = lhb_now_ns () - volume->frozen_at_ns;

  lhb_range_release (volume->ranges, &volume->freeze_claim);
  pthread_mutex_lock (&volume->lock);
  if (pause_ns > atomic_load (&volume->counters.freeze_ns_max))
    atomic_store (&volume->counters.freeze_ns_max, pause_ns);
  volume->frozen = false;
  pthread_cond_broadcast (&volume->changed);
  pthread_mutex_unlock (&volume->lock);
}

/* ---- Statistics. */

void
lhb_volume_statistics (const lhb_volume *volume,
                       struct lhb_statistics *statistics_out)
{
  const struct lhb_counters *c = &volume->counters;
  struct lhb_statistics s = {
    .reads = atomic_load (&c->requests[LHB_OP_READ]),
    .writes = atomic_load (&c->requests[LHB_OP_WRITE]),
    .flushes = atomic_load (&c->requests[LHB_OP_FLUSH]),
    .trims = atomic_load (&c->requests[LHB_OP_TRIM]),
    .zeroes = atomic_load (&c->requests[LHB_OP_ZERO]),
    .read_bytes = atomic_load (&c->bytes[LHB_OP_READ]),
    .write_bytes = atomic_load (&c->bytes[LHB_OP_WRITE]),
    .trim_bytes = atomic_load (&c->bytes[LHB_OP_TRIM]),
    .zero_bytes = atomic_load (&c->bytes[LHB_OP_ZERO]),
    .read_ns = atomic_load (&c->ns[LHB_OP_READ]),
    .write_ns = atomic_load (&c->ns[LHB_OP_WRITE]),
    .flush_ns = atomic_load (&c->ns[LHB_OP_FLUSH]),
    .errors = atomic_load (&c->errors),
    .waits = atomic_load (&c->waits),
    .inline_reads = atomic_load (&c->inline_reads),
    .driver_reads = atomic_load (&c->driver_reads),
    .inline_writes = atomic_load (&c->inline_writes),
    .driver_writes = atomic_load (&c->driver_writes),
    .in_flight = atomic_load (&c->in_flight),
    .freeze_ns_max = atomic_load (&c->freeze_ns_max),
  };

  pthread_mutex_lock ((pthread_mutex_t *) &volume->lock);
  s.connections = volume->connection_count;
  for (uint32_t i = 0; i < volume->store_count; i++)
    s.map_bytes += lhb_store_map_bytes (volume->stores[i]);
  pthread_mutex_unlock ((pthread_mutex_t *) &volume->lock);
  *statistics_out = s;
}
