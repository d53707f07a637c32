/* The engine: what all volumes of a process share. */
#ifndef LHB_ENGINE_H
#define LHB_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "lhb_io.h"
#include "lhb_limits.h"
#include "lhb_contract.h"

struct lhb_engine {
  struct lhb_queue *queues[LHB_QUEUES_MAX];
  uint32_t queue_count;
  uint32_t driver;
  struct lhb_pool *pool;
  _Atomic uint64_t next_id;             /* volumes, stores, connections */
  _Atomic uint32_t next_queue;          /* round robin of connections */

  /* Event ring.  Space is never missing for what must not be lost: a store
   * fails once, a connection closes once, and both are bounded.  When the
   * ring is full the producer waits for Python to drain it. */
  pthread_mutex_t event_lock;
  pthread_cond_t event_room;
  struct lhb_event events[LHB_EVENTS_MAX];
  uint32_t event_first, event_count;
  int events_closed;                    /* nobody drains any more */
  int event_fd;

  pthread_mutex_t fuse_lock;
  lhb_fuse *fuse;                       /* the relay, or NULL */
};

uint64_t lhb_engine_new_id (struct lhb_engine *engine);
/* Waits while the ring is full, so call it without locks.  Whoever blocks on a
 * queue or on the pool (lhb_volume_close, lhb_store_close, ...) must leave a
 * thread that drains the ring meanwhile.  Once lhb_engine_close has begun
 * nothing waits, and events are dropped. */
void lhb_engine_post_event (struct lhb_engine *engine,
                            const struct lhb_event *event);

#endif
