/* Volume: a replica set, the range table in front of it, and what freezes,
 * gates and fences requests. */
#ifndef LHB_VOLUME_H
#define LHB_VOLUME_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "lhb_dirty.h"
#include "lhb_range.h"
#include "lhb_request.h"
#include "lhb_store.h"

enum lhb_store_state {
  LHB_STATE_RW,
  LHB_STATE_WO,                 /* gets every change, answers no reads */
  LHB_STATE_FAILED,             /* dropped; acknowledgements that depend on it
                                   wait for the fence */
  LHB_STATE_GONE,               /* the others name it stale, durably; or it
                                   was WO, so that nobody has to */
};

/* Counters, in the order and meaning of struct lhb_statistics. */
struct lhb_counters {
  _Atomic uint64_t requests[LHB_OP_COUNT];
  _Atomic uint64_t bytes[LHB_OP_COUNT];
  _Atomic uint64_t ns[LHB_OP_COUNT];
  _Atomic uint64_t errors, waits;
  _Atomic uint64_t inline_reads, driver_reads, inline_writes, driver_writes;
  _Atomic uint64_t in_flight, freeze_ns_max;
};

struct lhb_activity;
struct lhb_connection;

struct lhb_volume {
  struct lhb_engine *engine;
  uint64_t id;
  _Atomic uint64_t size_bytes;
  uint32_t flags;               /* LHB_VOLUME_* */
  struct lhb_range_table *ranges;

  /* Changed only while the volume is frozen; states change at any time. */
  struct lhb_store *stores[LHB_STORES_MAX];
  uint32_t store_count;
  _Atomic uint8_t states[LHB_STORES_MAX];       /* enum lhb_store_state */
  _Atomic uint32_t unfenced;    /* stores in LHB_STATE_FAILED */

  struct lhb_range_claim freeze_claim;
  uint64_t frozen_at_ns;

  pthread_mutex_t lock;         /* all below, and changes of 'states' */
  pthread_cond_t changed;
  bool frozen;                  /* one freezer at a time */
  bool closing;
  _Atomic bool given_up;        /* never again false */
  _Atomic bool gate_shut;
  struct lhb_request *gated;    /* flushes and FUA waiting for the gate */
  struct lhb_request *held;     /* done, but not to be acknowledged yet */
  struct lhb_connection *connections;
  uint64_t connection_count;
  uint64_t last_full_event_ns;

  struct lhb_trackers trackers; /* of replicas that were dropped */
  struct lhb_activity *activity;        /* NULL: nothing is recorded */

  struct lhb_counters counters;
};

/* A replica failed: no request uses it from now on.  Posts the event once. */
void lhb_volume_fail_store (struct lhb_volume *volume, uint32_t index,
                            int error, uint64_t offset_bytes,
                            uint64_t length_bytes);
/* The same for a peer whose connections are closed, whenever that happens.
 * The caller holds the peer's lock, so the event is its to post: true. */
bool lhb_volume_lose_peer (struct lhb_volume *volume,
                           const struct lhb_store *store, int error,
                           struct lhb_event *event_out);
/* A write found no space anywhere; posts at most one event a second. */
void lhb_volume_report_full (struct lhb_volume *volume, uint64_t offset_bytes);
/* True: the request was put aside until the failed stores are fenced. */
bool lhb_volume_hold (struct lhb_volume *volume, struct lhb_request *request);
/* True: the request was put aside until the gate opens. */
bool lhb_volume_wait_gate (struct lhb_volume *volume,
                           struct lhb_request *request);
/* Claim a range for a thread that may block (merges). */
void lhb_volume_claim (struct lhb_volume *volume, enum lhb_range_kind kind,
                       uint64_t block, uint64_t blocks,
                       struct lhb_range_claim *claim);

#endif
