/* Activity log of a volume that is open: who waits for it, and transactions.
 *
 * What a bit means and why this order is right is in
 * docs/internals/activity-log.md.
 */

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lhb_activity.h"
#include "lhb_queue.h"
#include "lhb_request_steps.h"
#include "lhb_util.h"
#include "lhb_volume.h"

/* Too large for malloc's arenas, so what is never touched costs no memory. */
static void *
allocate (size_t bytes)
{
  return aligned_alloc (LHB_ACTIVITY_PAGE_BYTES,
                        (bytes + LHB_ACTIVITY_PAGE_BYTES - 1)
                            / LHB_ACTIVITY_PAGE_BYTES
                            * LHB_ACTIVITY_PAGE_BYTES);
}

void
lhb_activity_free (struct lhb_activity *log)
{
  if (log == NULL)
    return;
  assert (!log->writing && log->waiting == NULL);
  free ((void *) log->hot);
  free ((void *) log->touched);
  free (log->wanted);
  free (log->images);
  free (log->changes);
  pthread_cond_destroy (&log->changed);
  pthread_mutex_destroy (&log->lock);
  free (log);
}

int
lhb_volume_activity_start (lhb_volume *volume, const uint8_t *id)
{
  const size_t pages_bytes
      = LHB_ACTIVITY_PAGES_MAX * (size_t) LHB_ACTIVITY_PAGE_BYTES;
  struct lhb_activity *log = calloc (1, sizeof *log);

  assert (volume->activity == NULL);
  if (log == NULL)
    return -ENOMEM;
  lhb_mutex_init (&log->lock);
  if (pthread_cond_init (&log->changed, NULL) != 0)
    abort ();
  log->volume = volume;
  memcpy (log->id, id, sizeof log->id);
  log->waiting_tail = &log->waiting;
  log->hot = calloc (LHB_ACTIVITY_WORDS, sizeof *log->hot);
  log->touched = calloc (LHB_ACTIVITY_WORDS, sizeof *log->touched);
  log->wanted = calloc (LHB_ACTIVITY_WORDS, sizeof *log->wanted);
  log->images = allocate (pages_bytes);
  log->changes = allocate (pages_bytes);
  if (log->hot == NULL || log->touched == NULL || log->wanted == NULL
      || log->images == NULL || log->changes == NULL)
    {
      lhb_activity_free (log);
      return -ENOMEM;
    }
  /* What lhb_activity_encode wrote. */
  log->sequence = 1;
  log->width = 1;
  log->width_max = LHB_ACTIVITY_WIDTH_MAX;
  for (uint32_t i = 0;
       i < lhb_activity_pages_of (atomic_load (&volume->size_bytes)); i++)
    log->page_sequence[i] = 1;
  volume->activity = log;
  return 0;
}

/* ---- A change comes and goes. */

/* The part of a range of extents that is in one word. */
static uint64_t
mask_of (uint32_t word, uint32_t first, uint32_t last)
{
  uint64_t mask = UINT64_MAX;

  if (word == first / 64)
    mask &= UINT64_MAX << (first % 64);
  if (word == last / 64)
    mask &= UINT64_MAX >> (63 - last % 64);
  return mask;
}

static bool
all_hot (const struct lhb_activity *log, uint32_t first, uint32_t last)
{
  uint64_t cold = 0;

  for (uint32_t word = first / 64; word <= last / 64; word++)
    cold |= mask_of (word, first, last) & ~atomic_load (&log->hot[word]);
  return cold == 0;
}

/* Before the bits are looked at: see the round. */
static void
touch (struct lhb_activity *log, uint32_t first, uint32_t last)
{
  for (uint32_t word = first / 64; word <= last / 64; word++)
    {
      uint64_t mask = mask_of (word, first, last);

      if ((atomic_load (&log->touched[word]) & mask) != mask)
        atomic_fetch_or (&log->touched[word], mask);
    }
}

static void
extents_of (const struct lhb_request *request, uint32_t *first_out,
            uint32_t *last_out)
{
  *first_out = lhb_activity_extent_of (request->offset_bytes);
  *last_out = lhb_activity_extent_of (request->offset_bytes
                                      + request->length_bytes - 1);
}

/* Whoever counts in an epoch that has just ended was perhaps not seen. */
static void
count_in (struct lhb_activity *log, struct lhb_request *request)
{
  for (;;)
    {
      uint32_t epoch = atomic_load (&log->epoch);

      request->activity_epoch = 1 + (epoch & 1);
      atomic_fetch_add (&log->running[epoch & 1], 1);
      if (atomic_load (&log->epoch) == epoch)
        return;
      lhb_activity_leave (request);
    }
}

void
lhb_activity_leave (struct lhb_request *request)
{
  struct lhb_activity *log = request->volume->activity;
  uint32_t epoch = request->activity_epoch - 1u;

  request->activity_epoch = 0;
  if (atomic_fetch_sub (&log->running[epoch], 1) == 1
      && atomic_load (&log->draining))
    {
      pthread_mutex_lock (&log->lock);
      pthread_cond_broadcast (&log->changed);
      pthread_mutex_unlock (&log->lock);
    }
}

static void begin_transaction (struct lhb_activity *log,
                               struct lhb_queue *queue);

/* True: the request waits for a transaction. */
static bool
wait_for_heat (struct lhb_activity *log, struct lhb_request *request,
               uint32_t first, uint32_t last)
{
  bool begins;

  pthread_mutex_lock (&log->lock);
  if (all_hot (log, first, last))
    {
      pthread_mutex_unlock (&log->lock);
      return false;
    }
  request->next = NULL;
  *log->waiting_tail = request;
  log->waiting_tail = &request->next;
  begins = !log->writing;
  log->writing = true;
  pthread_mutex_unlock (&log->lock);
  if (begins)
    begin_transaction (log, request->queue);
  return true;
}

bool
lhb_activity_enter (struct lhb_request *request)
{
  struct lhb_activity *log = request->volume->activity;
  uint32_t first, last;

  /* The count changes only while the volume is frozen. */
  if (log == NULL || request->volume->store_count < 2)
    return true;
  extents_of (request, &first, &last);
  count_in (log, request);
  touch (log, first, last);
  return all_hot (log, first, last)
         || !wait_for_heat (log, request, first, last);
}

/* ---- A transaction.  Between its begin and its end nobody else touches the
 * legs, the images, and 'batch'. */

static void
mark_dirty (struct lhb_activity *log, uint32_t first, uint32_t last)
{
  for (uint32_t page = first / LHB_ACTIVITY_PAGE_EXTENTS;
       page <= last / LHB_ACTIVITY_PAGE_EXTENTS; page++)
    log->page_dirty[page] = true;
}

/* Whoever goes through the volume, in order or not, waits less often for more
 * of it. */
static void
choose_width (struct lhb_activity *log)
{
  uint64_t now_ns = lhb_now_ns ();
  uint64_t passed_ns = now_ns > log->missed_ns ? now_ns - log->missed_ns : 0;

  log->missed_ns = now_ns;
  if (passed_ns < LHB_ACTIVITY_BUSY_NS)
    {
      if (log->width < log->width_max)
        log->width *= 2;
    }
  else
    for (; log->width > 1 && passed_ns > LHB_ACTIVITY_CALM_NS;
         passed_ns -= LHB_ACTIVITY_CALM_NS)
      log->width /= 2;
}

static void
want_range (struct lhb_activity *log, uint32_t first, uint32_t last)
{
  const uint32_t end
      = lhb_activity_extent_of (atomic_load (&log->volume->size_bytes) - 1);

  first &= ~(log->width - 1);
  last |= log->width - 1;
  last = last < end ? last : end;
  for (uint32_t word = first / 64; word <= last / 64; word++)
    log->wanted[word] |= mask_of (word, first, last);
  mark_dirty (log, first, last);
}

/* The first change waits until all of it is durable. */
void
lhb_activity_heat_all (struct lhb_activity *log)
{
  const uint32_t end
      = lhb_activity_extent_of (atomic_load (&log->volume->size_bytes) - 1);

  pthread_mutex_lock (&log->lock);
  log->resets++;
  want_range (log, 0, end);
  for (uint32_t word = 0; word <= end / 64; word++)
    atomic_store (&log->hot[word], 0);
  pthread_mutex_unlock (&log->lock);
}

/* Encode the pages that are dirty, for their other slots, into 'changes', too;
 * with 'whole' the others as they are.  Returns how many are dirty. */
static uint32_t
encode (struct lhb_activity *log, uint32_t pages, bool whole)
{
  uint32_t count = 0;

  for (uint32_t i = 0; i < pages; i++)
    {
      char *image = log->images + (size_t) i * LHB_ACTIVITY_PAGE_BYTES;
      struct lhb_activity_page page = {
        .id = log->id,
        .sequence = log->page_sequence[i],
        .coolings = log->page_coolings[i],
        .index = i,
        .slot = log->page_slot[i],
      };
      bool dirty = log->page_dirty[i] || page.sequence == 0;

      if (dirty)
        {
          page.sequence = log->sequence + 1;
          page.coolings = log->coolings + log->cooling;
          page.slot ^= 1;
        }
      if (dirty || whole)
        lhb_activity_encode_page (
            &page, log->wanted + (size_t) i * LHB_ACTIVITY_PAGE_WORDS, image);
      if (dirty)
        memcpy (log->changes + (size_t) count++ * LHB_ACTIVITY_PAGE_BYTES,
                image, LHB_ACTIVITY_PAGE_BYTES);
      log->page_dirty[i] = false;
      log->page_written[i] = dirty;
    }
  return count;
}

/* With the lock.  Returns how many legs there are. */
static uint32_t
enlist (struct lhb_activity *log)
{
  struct lhb_volume *volume = log->volume;
  uint32_t pages = lhb_activity_pages_of (atomic_load (&volume->size_bytes));
  uint32_t used = 0, dirty;
  bool whole = false;

  for (uint32_t i = 0; i < volume->store_count; i++)
    {
      struct lhb_activity_leg *leg = &log->legs[i];
      uint8_t state = atomic_load (&volume->states[i]);

      leg->log = log;
      leg->error = 0;
      leg->is_wo = state == LHB_STATE_WO;
      leg->used = state == LHB_STATE_RW || leg->is_wo;
      used += leg->used;
      whole |= leg->used && !volume->stores[i]->has_activity;
    }
  log->cooling = log->cooled;
  log->cooled = false;
  dirty = encode (log, pages, whole);
  for (uint32_t i = 0; i < volume->store_count; i++)
    {
      struct lhb_activity_leg *leg = &log->legs[i];
      bool all = !volume->stores[i]->has_activity;

      leg->images = all ? log->images : log->changes;
      leg->length_bytes = (all ? pages : dirty) * LHB_ACTIVITY_PAGE_BYTES;
    }
  return used;
}

/* With the lock: what the transaction that ended has made of the log. */
static void
take_result (struct lhb_activity *log, bool good)
{
  bool any = false;

  for (uint32_t i = 0; i < LHB_ACTIVITY_PAGES_MAX; i++)
    {
      const size_t first = (size_t) i * LHB_ACTIVITY_PAGE_WORDS;

      if (!log->page_written[i])
        continue;
      log->page_written[i] = false;
      any = true;
      if (!good)
        {
          /* Nobody knows what the other slot has: it is written again, with
           * what is wanted still. */
          log->page_dirty[i] = true;
          continue;
        }
      log->page_sequence[i] = log->sequence + 1;
      log->page_coolings[i] = log->coolings + log->cooling;
      log->page_slot[i] ^= 1;
      for (size_t word = first; word < first + LHB_ACTIVITY_PAGE_WORDS; word++)
        if (log->wanted[word] != atomic_load (&log->hot[word]))
          atomic_store (&log->hot[word], log->wanted[word]);
    }
  if (!good)
    log->cooled |= log->cooling;
  else if (any)
    {
      log->sequence++;
      log->coolings += log->cooling;
    }
}

static void
handle_heated (struct lhb_message *message)
{
  lhb_request_heated (lhb_container_of (message, struct lhb_request, message));
}

/* After the last one the log may be gone. */
static void
resume (struct lhb_request *batch, int error)
{
  while (batch != NULL)
    {
      struct lhb_request *next = batch->next;

      batch->error = error;
      batch->message.handle = handle_heated;
      lhb_queue_post (batch->queue, &batch->message);
      batch = next;
    }
}

/* 0 when an RW replica has the log; else the error of one. */
static int
judge_legs (const struct lhb_activity *log)
{
  int error = -EIO;

  for (uint32_t i = 0; i < log->volume->store_count; i++)
    {
      const struct lhb_activity_leg *leg = &log->legs[i];

      if (!leg->used || leg->is_wo)
        continue;
      if (leg->error == 0)
        return 0;
      error = leg->error;
    }
  return error;
}

static void
drop_failed (struct lhb_activity *log)
{
  for (uint32_t i = 0; i < log->volume->store_count; i++)
    if (log->legs[i].used && log->legs[i].error)
      lhb_volume_fail_store (log->volume, i, -log->legs[i].error, 0, 0);
}

static void
end_transaction (struct lhb_activity *log)
{
  struct lhb_queue *queue = log->queue;
  struct lhb_request *batch;
  int error = judge_legs (log);
  bool more;

  if (error == 0)
    drop_failed (log);
  pthread_mutex_lock (&log->lock);
  for (uint32_t i = 0; i < log->volume->store_count; i++)
    if (log->legs[i].used && log->legs[i].error == 0)
      log->volume->stores[i]->has_activity = true;
  take_result (log, error == 0);
  batch = log->batch;
  log->batch = NULL;
  log->ended++;
  log->result = error;
  more = log->waiting != NULL || log->asked;
  log->writing = more;
  pthread_cond_broadcast (&log->changed);
  pthread_mutex_unlock (&log->lock);
  resume (batch, error);
  if (more)
    begin_transaction (log, queue);
}

static void
end_leg (struct lhb_activity *log)
{
  if (--log->pending == 0)
    end_transaction (log);
}

static void
run_leg (struct lhb_job *job)
{
  struct lhb_activity_leg *leg
      = lhb_container_of (job, struct lhb_activity_leg, job);
  struct lhb_activity *log = leg->log;

  leg->error
      = lhb_activity_write_images (log->volume->stores[leg - log->legs],
                                   leg->images, leg->length_bytes);
}

static void
handle_leg_done (struct lhb_message *message)
{
  end_leg (lhb_container_of (message, struct lhb_activity_leg, job.done)->log);
}

static void
call_done (struct lhb_peer_call *call)
{
  struct lhb_activity_leg *leg
      = lhb_container_of (call, struct lhb_activity_leg, call);

  leg->error = call->error;
  end_leg (leg->log);
}

static void
start_leg (struct lhb_activity_leg *leg, struct lhb_store *store,
           struct lhb_queue *queue)
{
  if (leg->length_bytes == 0)
    {
      end_leg (leg->log);
      return;
    }
  if (store->peer != NULL)
    {
      leg->call = (struct lhb_peer_call){ .done = call_done,
                                          .op = LHB_OP_ACTIVITY,
                                          .length_bytes = leg->length_bytes,
                                          .buffer = leg->images };
      lhb_peer_start (store, queue, &leg->call);
      return;
    }
  leg->job.run = run_leg;
  leg->job.done.handle = handle_leg_done;
  leg->job.queue = queue;
  lhb_pool_submit (lhb_queue_engine (queue)->pool, &leg->job);
}

/* In the queue's thread, with 'writing' set by the caller.  The replica set
 * does not change meanwhile: whoever waits has a claim. */
static void
begin_transaction (struct lhb_activity *log, struct lhb_queue *queue)
{
  struct lhb_volume *volume = log->volume;

  pthread_mutex_lock (&log->lock);
  log->queue = queue;
  log->asked = false;
  log->begun++;
  if (log->waiting != NULL)
    choose_width (log);
  log->batch = log->waiting;
  log->waiting = NULL;
  log->waiting_tail = &log->waiting;
  for (struct lhb_request *request = log->batch; request != NULL;
       request = request->next)
    {
      uint32_t first, last;

      extents_of (request, &first, &last);
      want_range (log, first, last);
    }
  log->pending = enlist (log) + 1;
  pthread_mutex_unlock (&log->lock);
  for (uint32_t i = 0; i < volume->store_count; i++)
    if (log->legs[i].used)
      start_leg (&log->legs[i], volume->stores[i], queue);
  end_leg (log);
}

static void
handle_start (struct lhb_message *message)
{
  struct lhb_activity *log
      = lhb_container_of (message, struct lhb_activity, start);
  struct lhb_engine *engine = log->volume->engine;

  begin_transaction (
      log, engine->queues[log->volume->id % engine->queue_count]);
}

void
lhb_activity_ask (struct lhb_activity *log)
{
  struct lhb_engine *engine = log->volume->engine;

  log->asked = true;
  if (log->writing)
    return;
  log->writing = true;
  log->start.handle = handle_start;
  lhb_queue_post (engine->queues[log->volume->id % engine->queue_count],
                  &log->start);
}
