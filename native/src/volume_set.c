/* Volume: which stores it has, and how it loses one. */

#include <errno.h>
#include <string.h>

#include "lhb_activity.h"
#include "lhb_peer.h"
#include "lhb_volume.h"

static int
check_set (const lhb_volume *volume, lhb_store **stores, const uint32_t *modes,
           uint32_t count)
{
  uint64_t size_bytes = atomic_load (&volume->size_bytes);
  uint32_t rw = 0;

  if (count == 0 || count > LHB_STORES_MAX)
    return -EINVAL;
  for (uint32_t i = 0; i < count; i++)
    {
      if (stores[i]->size_bytes != size_bytes
          || (modes != NULL && modes[i] > LHB_MODE_WO))
        return -EINVAL;
      rw += modes == NULL || modes[i] == LHB_MODE_RW;
    }
  return rw == 0 ? -EINVAL : 0;
}

static bool
has_store (const lhb_volume *volume, const struct lhb_store *store)
{
  for (uint32_t i = 0; i < volume->store_count; i++)
    if (volume->stores[i] == store)
      return true;
  return false;
}

/* A peer that ends after this was looked at finds the volume's lock held, and
 * then the new set.  A volume that gave up acknowledges nothing any more: its
 * last replica may have ended, or the others could never leave the set. */
static int
commit_set (lhb_volume *volume, lhb_store **stores, const uint32_t *modes,
            uint32_t count)
{
  int err = 0;

  pthread_mutex_lock (&volume->lock);
  for (uint32_t i = 0; i < count; i++)
    if (stores[i]->peer != NULL && lhb_peer_has_ended (stores[i]->peer)
        && !atomic_load (&volume->given_up))
      err = -ENOTCONN;
  if (err == 0)
    {
      if (volume->activity != NULL && volume->store_count == 1 && count > 1)
        lhb_activity_heat_all (volume->activity);
      for (uint32_t i = 0; i < count; i++)
        {
          bool is_wo = modes != NULL && modes[i] == LHB_MODE_WO;

          volume->stores[i] = stores[i];
          atomic_store (&volume->states[i],
                        is_wo ? LHB_STATE_WO : LHB_STATE_RW);
        }
      volume->store_count = count;
      atomic_store (&volume->unfenced, 0);
    }
  pthread_mutex_unlock (&volume->lock);
  return err;
}

int
lhb_volume_publish (lhb_volume *volume, lhb_store **stores,
                    const uint32_t *modes, uint32_t count)
{
  struct lhb_store *before[LHB_STORES_MAX];
  uint32_t before_count = volume->store_count;
  int err = check_set (volume, stores, modes, count);

  for (uint32_t i = 0; i < count && err == 0; i++)
    if (stores[i]->peer != NULL && !lhb_peer_is_complete (stores[i]->peer))
      err = -ENOTCONN;
  if (err)
    return err;
  memcpy (before, volume->stores, sizeof before);
  for (uint32_t i = 0; i < count; i++)
    if (stores[i]->peer != NULL)
      lhb_peer_set_volume (stores[i]->peer, volume);
  err = commit_set (volume, stores, modes, count);
  /* Those that did not come in, or went out. */
  for (uint32_t i = 0; i < count; i++)
    if (stores[i]->peer != NULL && !has_store (volume, stores[i]))
      lhb_peer_set_volume (stores[i]->peer, NULL);
  for (uint32_t i = 0; i < before_count; i++)
    if (before[i]->peer != NULL && !has_store (volume, before[i]))
      lhb_peer_set_volume (before[i]->peer, NULL);
  return err;
}

/* ---- Failing replicas. */

static uint32_t
count_rw (const struct lhb_volume *volume)
{
  uint32_t count = 0;

  for (uint32_t i = 0; i < volume->store_count; i++)
    count += atomic_load (&volume->states[i]) == LHB_STATE_RW;
  return count;
}

/* With the lock: the store is used no more from now on.  The last RW one is
 * never dropped.  True: it was dropped now. */
static bool
drop_store (struct lhb_volume *volume, uint32_t index)
{
  uint8_t state = atomic_load (&volume->states[index]);

  if (state == LHB_STATE_WO)
    {
      atomic_store (&volume->states[index], LHB_STATE_GONE);
      return true;
    }
  if (state != LHB_STATE_RW || count_rw (volume) == 1)
    return false;
  /* Both first: whoever sees the state also sees that changes it missed are
   * recorded and that a fence is owed.  Without a tracker nobody knows what it
   * missed, and everything counts. */
  (void) lhb_trackers_add (&volume->trackers, volume->stores[index]->id);
  atomic_fetch_add (&volume->unfenced, 1);
  atomic_store (&volume->states[index], LHB_STATE_FAILED);
  return true;
}

void
lhb_volume_fail_store (struct lhb_volume *volume, uint32_t index, int error,
                       uint64_t offset_bytes, uint64_t length_bytes)
{
  struct lhb_event event = {
    .type = LHB_EVENT_STORE_FAILED,
    .error = error,
    .volume_id = volume->id,
    .offset_bytes = offset_bytes,
    .length_bytes = length_bytes,
  };
  bool dropped;

  pthread_mutex_lock (&volume->lock);
  dropped = drop_store (volume, index);
  if (dropped)
    event.subject_id = volume->stores[index]->id;
  pthread_mutex_unlock (&volume->lock);
  if (dropped)
    lhb_engine_post_event (volume->engine, &event);
}

bool
lhb_volume_lose_peer (struct lhb_volume *volume, const struct lhb_store *store,
                      int error, struct lhb_event *event_out)
{
  bool post = false;

  pthread_mutex_lock (&volume->lock);
  for (uint32_t i = 0; i < volume->store_count; i++)
    if (volume->stores[i] == store)
      {
        bool dropped = drop_store (volume, i);

        *event_out = (struct lhb_event) {
          .type = dropped ? LHB_EVENT_STORE_FAILED : LHB_EVENT_LAST_PEER_LOST,
          .error = error,
          .volume_id = volume->id,
          .subject_id = store->id,
        };
        post = dropped
               || atomic_load (&volume->states[i]) == LHB_STATE_RW;
      }
  pthread_mutex_unlock (&volume->lock);
  return post;
}
