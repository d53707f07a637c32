/* Activity log: where the replicas of a volume may differ after a crash.
 *
 * The rule, the format and the steps are in docs/internals/activity-log.md.
 * activity_page.c has the file, activity.c the log of a volume that is open,
 * activity_round.c what a thread that may block does with it.
 */
#ifndef LHB_ACTIVITY_H
#define LHB_ACTIVITY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "lhb_contract.h"
#include "lhb_limits.h"
#include "lhb_peer.h"
#include "lhb_request.h"

enum {
  LHB_ACTIVITY_HEADER_BYTES = 64,
  LHB_ACTIVITY_PAGE_WORDS
      = (LHB_ACTIVITY_PAGE_BYTES - LHB_ACTIVITY_HEADER_BYTES) / 8,
  LHB_ACTIVITY_PAGE_EXTENTS = LHB_ACTIVITY_PAGE_WORDS * 64,
  LHB_ACTIVITY_WORDS = LHB_ACTIVITY_PAGES_MAX * LHB_ACTIVITY_PAGE_WORDS,
  LHB_ACTIVITY_EXTENTS_MAX = LHB_ACTIVITY_WORDS * 64,
};

#define LHB_ACTIVITY_EXTENT_SHIFT 22
_Static_assert (1u << LHB_ACTIVITY_EXTENT_SHIFT == LHB_ACTIVITY_EXTENT_BYTES,
                "the shift");
_Static_assert (LHB_ACTIVITY_BITMAP_BYTES == LHB_ACTIVITY_WORDS * 8,
                "the size of a bitmap");

/* What a page says beside its bits. */
struct lhb_activity_page {
  const uint8_t *id;            /* LHB_ACTIVITY_ID_BYTES */
  uint64_t sequence, coolings;
  uint32_t index, slot;
};

/* ---- activity_page.c */

/* The extents of a range of at least one byte. */
static inline uint32_t
lhb_activity_extent_of (uint64_t offset_bytes)
{
  uint64_t extent = offset_bytes >> LHB_ACTIVITY_EXTENT_SHIFT;

  return extent < LHB_ACTIVITY_EXTENTS_MAX
             ? (uint32_t) extent
             : LHB_ACTIVITY_EXTENTS_MAX - 1u;
}

uint32_t lhb_activity_pages_of (uint64_t size_bytes);
void lhb_activity_encode_page (const struct lhb_activity_page *page,
                               const uint64_t *bits, char *image_out);
/* Put images of pages, 'length_bytes' of them, at their places in a store's
 * file, durably.  Blocking.  -EINVAL: they are no images. */
int lhb_activity_write_images (struct lhb_store *store, char *images,
                               size_t length_bytes);

/* ---- activity.c */

struct lhb_activity_leg {
  struct lhb_activity *log;
  struct lhb_job job;
  struct lhb_peer_call call;
  char *images;
  uint32_t length_bytes;
  int error;
  bool used, is_wo;
};

struct lhb_activity {
  struct lhb_volume *volume;
  uint8_t id[LHB_ACTIVITY_ID_BYTES];

  /* Asked by every change.  'hot': durable in the log of every replica. */
  _Atomic uint64_t *hot, *touched;
  _Atomic uint32_t epoch;
  _Atomic uint64_t running[2];  /* changes, by the epoch they began in */
  _Atomic bool draining;

  pthread_mutex_t lock;         /* all below */
  pthread_cond_t changed;
  uint64_t *wanted;             /* what the next transaction writes */
  struct lhb_request *waiting, **waiting_tail;
  struct lhb_request *batch;    /* those of the transaction under way */
  bool writing;                 /* a transaction is under way, or about to be */
  bool asked;                   /* another one, whoever waits */
  uint64_t begun, ended;        /* transactions */
  uint64_t missed_ns;           /* when the last one began that was waited for */
  uint32_t width, width_max;    /* extents that a miss heats, powers of 2 */
  int result;                   /* of the last one */
  uint64_t resets;              /* how often everything turned hot */

  /* Of the transaction that succeeded last. */
  uint64_t sequence, coolings;
  bool cooled;                  /* the next one turns extents cold */
  bool cooling;                 /* the one under way does */
  uint64_t page_sequence[LHB_ACTIVITY_PAGES_MAX];       /* 0: never written */
  uint64_t page_coolings[LHB_ACTIVITY_PAGES_MAX];
  uint8_t page_slot[LHB_ACTIVITY_PAGES_MAX];
  bool page_dirty[LHB_ACTIVITY_PAGES_MAX];
  bool page_written[LHB_ACTIVITY_PAGES_MAX];    /* by the one under way */

  /* The transaction's own, without the lock. */
  char *images;                 /* where they are needed: all pages */
  char *changes;                /* those that are dirty */
  struct lhb_queue *queue;
  struct lhb_message start;
  struct lhb_activity_leg legs[LHB_STORES_MAX];
  uint32_t pending;
};

void lhb_activity_free (struct lhb_activity *log);
/* A change is about to be issued, its range claimed.  False: it waits, and
 * lhb_request_heated follows. */
bool lhb_activity_enter (struct lhb_request *request);
/* It is about to be answered. */
void lhb_activity_leave (struct lhb_request *request);
/* With the volume frozen: nothing was recorded for a while, so the next
 * transaction says that everything is hot. */
void lhb_activity_heat_all (struct lhb_activity *log);
/* With the lock: have a transaction, one that begins from now on. */
void lhb_activity_ask (struct lhb_activity *log);

#endif
