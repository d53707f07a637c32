/* What the replicas did for a request, and what follows from it. */

#include <errno.h>

#include "lhb_request_steps.h"
#include "lhb_util.h"

/* No replica could do it.  Dropping all would lose the volume for a full disk,
 * so those that did the same stay, for they are equal: of the amounts that were
 * done without a doubt, the one most replicas share, and the greatest of such.
 * Where all are in doubt only the first stays.  Returns the replica to equal. */
static uint32_t
choose_model (const struct lhb_request *request)
{
  const uint32_t stores = request->volume->store_count;
  uint32_t best = UINT32_MAX, best_count = 0;

  for (uint32_t i = 0; i < stores; i++)
    {
      const struct lhb_leg *leg = &request->legs[i];
      uint32_t count = 0;

      if (!leg->used || leg->is_wo)
        continue;
      for (uint32_t j = 0; j < stores && !leg->unsure; j++)
        count += request->legs[j].used && !request->legs[j].is_wo
                 && !request->legs[j].unsure
                 && request->legs[j].done_bytes == leg->done_bytes;
      if (request->op == LHB_OP_WRITE && count > 1)
        count = 1;              /* the furthest, for its client retries */
      if (best == UINT32_MAX || count > best_count
          || (count == best_count && count > 0
              && leg->done_bytes > request->legs[best].done_bytes))
        {
          best = i;
          best_count = count;
        }
    }
  return best;
}

static bool
is_like_model (const struct lhb_request *request, uint32_t index,
               uint32_t model)
{
  const struct lhb_leg *leg = &request->legs[index];

  return index == model
         || (leg->error && !leg->unsure && !request->legs[model].unsure
             && leg->done_bytes == request->legs[model].done_bytes);
}

/* Judge the replicas' results: one that failed where another succeeded is
 * dropped.  The request succeeded if every replica that is still RW did it;
 * the last RW replica is never dropped, so its failure is the client's.  A WO
 * one has no say, and goes when it is not like the others, even if it alone
 * could do it. */
static void
judge_legs (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;
  uint32_t model = 0;           /* counts only when none is good */
  bool any_good = false;
  int error = 0, rw = 0;

  for (uint32_t i = 0; i < volume->store_count; i++)
    {
      struct lhb_leg *leg = &request->legs[i];

      any_good |= leg->used && !leg->is_wo && leg->error == 0;
    }
  if (!any_good)
    model = choose_model (request);
  for (uint32_t i = 0; i < volume->store_count; i++)
    {
      struct lhb_leg *leg = &request->legs[i];

      if (leg->used
          && (any_good ? leg->error != 0 : !is_like_model (request, i, model)))
        lhb_volume_fail_store (volume, i, leg->error ? -leg->error : EIO,
                               request->offset_bytes, request->length_bytes);
    }
  for (uint32_t i = 0; i < volume->store_count; i++)
    if (request->legs[i].used && lhb_request_is_rw (volume, i))
      {
        rw++;
        if (request->legs[i].error)
          {
            error = request->legs[i].error;
            request->done_bytes = request->legs[i].done_bytes;
            request->unsure = request->legs[i].unsure;
          }
      }
  request->error = rw == 0 ? -EIO : error;
  if (request->error == -ENOSPC)
    lhb_volume_report_full (volume, request->offset_bytes);
}

static void
run_settle (struct lhb_job *job)
{
  struct lhb_request *request
      = lhb_container_of (job, struct lhb_request, job);
  uint64_t first = request->offset_bytes >> LHB_BLOCK_SHIFT;
  uint64_t end = (request->offset_bytes + request->length_bytes
                  + LHB_BLOCK_BYTES - 1)
                 >> LHB_BLOCK_SHIFT;

  for (uint32_t i = 0; i < request->volume->store_count; i++)
    {
      struct lhb_leg *leg = &request->legs[i];

      struct lhb_store *store = request->volume->stores[i];

      if (leg->used && leg->error && store->peer == NULL
          && lhb_store_settle (store, first, end - first) != 0)
        leg->unsure = true;
    }
}

/* Every replica has done its part, or could not. */
static void
end_step (struct lhb_request *request)
{
  judge_legs (request);
  if (request->error || !lhb_request_next_zero_step (request))
    lhb_request_finish_change (request);
}

static void
handle_settled (struct lhb_message *message)
{
  struct lhb_request *request
      = lhb_container_of (message, struct lhb_request, job.done);

  end_step (request);
}

/* A change that failed may have left in a head's file what its map does not
 * know; nobody else sees the range until that is put right.  A peer does that
 * itself before it replies. */
static bool
needs_settling (const struct lhb_request *request)
{
  bool any = false;

  for (uint32_t i = 0; i < request->volume->store_count; i++)
    any |= request->legs[i].used && request->legs[i].error
           && request->volume->stores[i]->peer == NULL
           && request->legs[i].error != -EOPNOTSUPP;
  return any && request->op != LHB_OP_FLUSH;
}

void
lhb_request_end_leg (struct lhb_request *request)
{
  if (--request->pending > 0)
    return;
  if (needs_settling (request))
    {
      lhb_request_submit_job (request, run_settle, handle_settled);
      return;
    }
  end_step (request);
}

void
lhb_request_enlist (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;
  uint32_t count = 0;

  for (uint32_t i = 0; i < volume->store_count; i++)
    {
      struct lhb_leg *leg = &request->legs[i];
      uint8_t state = atomic_load_explicit (&volume->states[i],
                                            memory_order_acquire);

      leg->request = request;
      leg->is_wo = state == LHB_STATE_WO;
      leg->used = state == LHB_STATE_RW || leg->is_wo;
      leg->error = 0;
      leg->done_bytes = 0;
      leg->unsure = false;
      count += leg->used;
    }
  /* One more than the legs, so that legs that end at once do not finish the
   * request while others are still being started. */
  request->pending = count + 1;
}
