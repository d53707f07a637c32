/* Dirty maps: what changed in a volume since a replica left it.
 *
 * A tracker belongs to one replica that is away.  It has a bit for each granule
 * of LHB_DIRTY_GRANULE_BYTES, kept in chunks that are NULL while all their bits
 * are 0 and the mark 'all' once all are 1, so a TiB costs at most 2 MiB.  A bit
 * that is 1 although nothing differs costs a comparison; one that is 0 although
 * something differs would be damage, so whenever memory is missing the whole
 * chunk counts as changed, or there is no tracker.
 */
#ifndef LHB_DIRTY_H
#define LHB_DIRTY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "lhb_contract.h"
#include "lhb_limits.h"

struct lhb_tracker {
  uint64_t id;                  /* 0: free */
  uint64_t **chunks;
};

struct lhb_trackers {
  _Atomic uint32_t count;       /* asked by every change that ends */
  pthread_mutex_t lock;         /* all below */
  uint64_t size_bytes;          /* of the volume */
  struct lhb_tracker list[LHB_TRACKERS_MAX];
};

void lhb_trackers_init (struct lhb_trackers *trackers, uint64_t size_bytes);
void lhb_trackers_free (struct lhb_trackers *trackers);
/* The volume grows: the new part has not changed.  On -ENOMEM nothing has. */
int lhb_trackers_resize (struct lhb_trackers *trackers, uint64_t size_bytes);
/* From now on changes are recorded under 'id'.  -EEXIST: they are already;
 * -ENOSPC: LHB_TRACKERS_MAX others are; -ENOMEM. */
int lhb_trackers_add (struct lhb_trackers *trackers, uint64_t id);
/* A range changed: 'id' 0 means for every tracker.  -ENOENT: there is none. */
int lhb_trackers_mark (struct lhb_trackers *trackers, uint64_t id,
                       uint64_t offset_bytes, uint64_t length_bytes);

/* A change is about to be answered or to fail, its range still claimed. */
static inline void
lhb_trackers_note (struct lhb_trackers *trackers, uint64_t offset_bytes,
                   uint64_t length_bytes)
{
  if (__builtin_expect (atomic_load_explicit (&trackers->count,
                                              memory_order_acquire) != 0, 0))
    (void) lhb_trackers_mark (trackers, 0, offset_bytes, length_bytes);
}

#endif
