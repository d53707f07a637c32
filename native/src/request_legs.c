/* What the replicas did for a request, and what follows from it. */

#include <errno.h>

#include "lhb_request_steps.h"

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
    if (request->legs[i].used && lhb_request_is_rw (volume, i))
      {
        rw++;
        if (request->legs[i].error)
          error = request->legs[i].error;
      }
  request->error = rw == 0 ? -EIO : error;
  if (request->error == -ENOSPC)
    lhb_volume_report_full (volume, request->offset_bytes);
}

void
lhb_request_end_leg (struct lhb_request *request)
{
  if (--request->pending > 0)
    return;
  judge_legs (request);
  lhb_request_finish_change (request);
}

void
lhb_request_enlist (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;
  uint32_t count = 0;

  for (uint32_t i = 0; i < volume->store_count; i++)
    {
      struct lhb_leg *leg = &request->legs[i];

      leg->request = request;
      leg->used = lhb_request_is_rw (volume, i);
      leg->error = 0;
      leg->written_bytes = 0;
      count += leg->used;
    }
  /* One more than the legs, so that legs that end at once do not finish the
   * request while others are still being started. */
  request->pending = count + 1;
}
