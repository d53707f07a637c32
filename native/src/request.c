/* Request: its beginning and its end.
 *
 * The states and what each of them waits for are in docs/internals/io-path.md.
 */

#include <assert.h>
#include <errno.h>

#include "lhb_activity.h"
#include "lhb_queue.h"
#include "lhb_request_steps.h"
#include "lhb_util.h"

static void claim_range (struct lhb_request *request);

/* ---- The end. */

void
lhb_request_finish (struct lhb_request *request)
{
  struct lhb_counters *counters = &request->volume->counters;

  /* Reads too: they may see what was never acknowledged. */
  if (request->error == 0 && atomic_load (&request->volume->given_up))
    request->error = -EIO;
  lhb_count (&counters->requests[request->op], 1);
  lhb_count (&counters->bytes[request->op], request->length_bytes);
  lhb_count (&counters->ns[request->op], lhb_now_ns () - request->start_ns);
  if (request->error)
    lhb_count (&counters->errors, 1);
  atomic_fetch_sub_explicit (&counters->in_flight, 1, memory_order_relaxed);
  if (request->activity_epoch != 0)
    lhb_activity_leave (request);
  /* Last: a volume that closes waits for the claims, and may be gone then. */
  lhb_range_release (request->volume->ranges, &request->claim);
  request->complete (request);
}

/* A change is done on every replica that is left.  If one was dropped and the
 * others do not say so durably yet, the answer waits, with the range still
 * claimed: nobody may read what a crash could take back.  That holds for a
 * change that failed, too, for a part of it may be there to be read. */
void
lhb_request_finish_change (struct lhb_request *request)
{
  lhb_trackers_note (&request->volume->trackers, request->offset_bytes,
                     request->length_bytes);
  if (lhb_volume_hold (request->volume, request))
    return;
  lhb_request_finish (request);
}

void
lhb_request_resume_held (struct lhb_message *message)
{
  lhb_request_finish_change (
      lhb_container_of (message, struct lhb_request, message));
}

void
lhb_request_submit_job (struct lhb_request *request,
                        void (*run) (struct lhb_job *job),
                        void (*done) (struct lhb_message *message))
{
  request->job.run = run;
  request->job.done.handle = done;
  request->job.queue = request->queue;
  lhb_pool_submit (lhb_queue_engine (request->queue)->pool, &request->job);
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
handle_job_done (struct lhb_message *message)
{
  lhb_request_finish (lhb_container_of (message, struct lhb_request, job.done));
}

/* ---- The beginning. */

static bool
depends_on_gate (const struct lhb_request *request)
{
  return request->op == LHB_OP_FLUSH || request->flags & LHB_IO_FUA;
}

/* ---- ACTIVITY. */

static void
run_activity (struct lhb_job *job)
{
  struct lhb_request *request
      = lhb_container_of (job, struct lhb_request, job);

  request->error = lhb_activity_write_images (
      request->volume->stores[0], request->buffer, request->length_bytes);
}

static bool
is_change (const struct lhb_request *request)
{
  return request->op == LHB_OP_WRITE || request->op == LHB_OP_TRIM
         || request->op == LHB_OP_ZERO;
}

static void
run (struct lhb_request *request)
{
  switch (request->op)
    {
    case LHB_OP_READ:
      lhb_request_read (request);
      return;
    case LHB_OP_WRITE:
      lhb_request_write (request);
      return;
    case LHB_OP_FLUSH:
      lhb_request_flush (request);
      return;
    case LHB_OP_PROBE:
      lhb_request_submit_job (request, run_probe, handle_job_done);
      return;
    case LHB_OP_ACTIVITY:
      lhb_request_submit_job (request, run_activity, handle_job_done);
      return;
    default:
      lhb_request_zero (request);
      return;
    }
}

void
lhb_request_heated (struct lhb_request *request)
{
  if (request->error)
    lhb_request_finish_change (request);
  else
    run (request);
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
  if (!is_change (request) || lhb_activity_enter (request))
    run (request);
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
    [LHB_OP_ACTIVITY] = LHB_RANGE_FLUSH,
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
    lhb_count (&volume->counters.waits, 1);
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
  request->done_bytes = 0;
  request->unsure = false;
  request->tried_mask = 0;
  request->zero_step = LHB_ZERO_WHOLE;
  request->activity_epoch = 0;
  request->start_ns = lhb_now_ns ();
  lhb_count (&volume->counters.in_flight, 1);
  if (depends_on_gate (request) && lhb_volume_wait_gate (volume, request))
    return;
  claim_range (request);
}
