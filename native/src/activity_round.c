/* Activity log: what a thread that may block does with it.
 *
 * A round lets extents turn cold; its order is in docs/internals/
 * activity-log.md, section "Turning cold".
 */

#include <errno.h>
#include <stdlib.h>

#include "lhb_activity.h"
#include "lhb_util.h"
#include "lhb_volume.h"

/* A claim that excludes a freeze, and nothing else. */
static void
hold_set (struct lhb_volume *volume, struct lhb_range_claim *claim)
{
  lhb_volume_claim (volume, LHB_RANGE_FLUSH, 0, 1, claim);
}

/* With the lock: a transaction that begins from now on has ended well. */
static int
write_now (struct lhb_activity *log)
{
  uint64_t until = log->begun + 1;

  lhb_activity_ask (log);
  while (log->ended < until)
    pthread_cond_wait (&log->changed, &log->lock);
  return log->result;
}

int
lhb_volume_activity_write (lhb_volume *volume)
{
  struct lhb_activity *log = volume->activity;
  struct lhb_range_claim claim;
  int err;

  if (log == NULL)
    return 0;
  hold_set (volume, &claim);
  pthread_mutex_lock (&log->lock);
  err = write_now (log);
  pthread_mutex_unlock (&log->lock);
  lhb_range_release (volume->ranges, &claim);
  return err;
}

uint64_t
lhb_volume_activity_hot (lhb_volume *volume)
{
  const struct lhb_activity *log = volume->activity;
  uint64_t count = 0;

  for (size_t i = 0; log != NULL && i < LHB_ACTIVITY_WORDS; i++)
    count += (uint64_t) __builtin_popcountll (atomic_load (&log->hot[i]));
  return count;
}

/* Touched bits go before the epoch ends: a change that counts in the next one
 * finds them cleared. */
static bool
choose_candidates (struct lhb_activity *log, uint64_t *candidates)
{
  uint64_t any = 0;

  for (size_t i = 0; i < LHB_ACTIVITY_WORDS; i++)
    {
      uint64_t hot = atomic_load (&log->hot[i]);

      if (hot == 0 && atomic_load (&log->touched[i]) == 0)
        continue;
      candidates[i] = hot & ~atomic_exchange (&log->touched[i], 0);
      any |= candidates[i];
    }
  return any != 0;
}

/* With the lock: changes that began before this have ended after it. */
static void
end_epoch (struct lhb_activity *log)
{
  uint32_t before = atomic_load (&log->epoch);

  atomic_store (&log->draining, true);
  atomic_store (&log->epoch, before + 1);
  while (atomic_load (&log->running[before & 1]) > 0)
    pthread_cond_wait (&log->changed, &log->lock);
  atomic_store (&log->draining, false);
}

/* With the lock.  Who looks at a bit has touched it before. */
static int64_t
make_cold (struct lhb_activity *log, const uint64_t *candidates)
{
  int64_t count = 0;

  for (size_t i = 0; i < LHB_ACTIVITY_WORDS; i++)
    {
      uint64_t cold, again;

      if (candidates[i] == 0)
        continue;
      atomic_fetch_and (&log->hot[i], ~candidates[i]);
      again = candidates[i] & atomic_load (&log->touched[i]);
      atomic_fetch_or (&log->hot[i], again);
      cold = candidates[i] & ~again;
      if (cold == 0)
        continue;
      log->wanted[i] &= ~cold;
      log->page_dirty[i / LHB_ACTIVITY_PAGE_WORDS] = true;
      log->cooled = true;
      count += __builtin_popcountll (cold);
    }
  return count;
}

static bool
has_several (struct lhb_volume *volume)
{
  bool several;

  pthread_mutex_lock (&volume->lock);
  several = volume->store_count > 1;
  pthread_mutex_unlock (&volume->lock);
  return several;
}

static int64_t
cool (struct lhb_volume *volume, uint64_t *candidates)
{
  struct lhb_activity *log = volume->activity;
  struct lhb_range_claim claim;
  uint64_t resets;
  int64_t result;
  bool any;

  pthread_mutex_lock (&log->lock);
  resets = log->resets;
  any = choose_candidates (log, candidates);
  if (any)
    end_epoch (log);
  pthread_mutex_unlock (&log->lock);
  if (!any)
    return 0;
  result = lhb_volume_io (volume, LHB_OP_FLUSH, 0, 0, 0, NULL);
  if (result < 0)
    return result;
  hold_set (volume, &claim);
  pthread_mutex_lock (&log->lock);
  if (log->resets == resets)
    result = make_cold (log, candidates);
  if (result > 0)
    {
      int err = write_now (log);

      result = err ? err : result;
    }
  pthread_mutex_unlock (&log->lock);
  lhb_range_release (volume->ranges, &claim);
  return result;
}

int64_t
lhb_volume_activity_cool (lhb_volume *volume)
{
  uint64_t *candidates;
  int64_t result;

  if (volume->activity == NULL || !has_several (volume))
    return 0;
  candidates = calloc (LHB_ACTIVITY_WORDS, sizeof *candidates);
  if (candidates == NULL)
    return -ENOMEM;
  result = cool (volume, candidates);
  free (candidates);
  return result;
}
