/* Request: one READ, WRITE, FLUSH, TRIM or ZERO on its way through a volume.
 *
 *   gate? -> claim the range -> activity log? -> execute on the replicas -> hold? -> release
 *   the range -> complete
 *
 * A request belongs to one queue; all its steps run in that queue's thread,
 * except the blocking jobs it sends to the pool.
 */
#ifndef LHB_REQUEST_H
#define LHB_REQUEST_H

#include <stdbool.h>
#include <stdint.h>

#include "lhb_io.h"
#include "lhb_limits.h"
#include "lhb_peer.h"
#include "lhb_range.h"
#include "lhb_store.h"
#include "lhb_contract.h"

/* Not for Python: call 'probe' in a worker with the range claimed for reading.
 */
#define LHB_OP_PROBE (LHB_OP_ZERO + 1)
/* Of an engine elsewhere: write pages of the activity log, in 'buffer'. */
#define LHB_OP_ACTIVITY (LHB_OP_PROBE + 1)
#define LHB_OP_COUNT (LHB_OP_ACTIVITY + 1)

struct lhb_volume;
struct lhb_request;

/* What one replica does for a request. */
struct lhb_leg {
  struct lhb_request *request;
  struct lhb_io io;
  struct lhb_job job;
  struct lhb_sync_wait sync;
  struct lhb_message synced;
  struct lhb_peer_call call;    /* if the replica is a peer */
  uint64_t done_bytes;          /* written or zeroed, from the start on */
  bool unsure;                  /* and then some part that is not known */
  int error;
  bool used;
  bool is_wo;                   /* its replica answers no reads */
};

/* What follows when the replicas are done with this step of a TRIM or ZERO. */
enum lhb_zero_step {
  LHB_ZERO_WHOLE,               /* nothing */
  LHB_ZERO_HEAD,                /* the first block is written */
  LHB_ZERO_TAIL,                /* the last block is written */
};

struct lhb_request {
  /* Set by the owner. */
  struct lhb_volume *volume;
  struct lhb_queue *queue;
  uint32_t op;                  /* LHB_OP_* */
  uint32_t flags;               /* LHB_IO_* */
  uint64_t offset_bytes;
  uint64_t length_bytes;
  /* READ and WRITE: whole blocks; the bytes of the request begin at
   * offset_bytes % LHB_BLOCK_BYTES.  Block-aligned memory. */
  char *buffer;
  /* A WRITE with a partial block at an end: room for two blocks, else NULL.
   * TRIM and ZERO, too, if the volume may have stores that are not read. */
  char *edges;
  void (*probe) (struct lhb_request *request);
  void (*complete) (struct lhb_request *request);

  /* Result. */
  int error;                    /* 0 or -errno */
  /* Of a change that failed, on the replicas that stay; as in lhb_leg. */
  uint64_t done_bytes;
  bool unsure;

  /* The request's own. */
  uint64_t first_block;
  uint32_t block_count;         /* READ and WRITE only */
  uint32_t pending;             /* ios and jobs under way */
  uint32_t tried_mask;          /* replicas a READ has tried */
  uint32_t source;              /* index of the replica a READ uses */
  enum lhb_zero_step zero_step;
  uint64_t zero_offset_bytes, zero_length_bytes;        /* of TRIM and ZERO */
  uint64_t start_ns;
  uint32_t activity_epoch;      /* it counts in the activity log; 0: not */
  struct lhb_range_claim claim;
  struct lhb_message message;
  struct lhb_job job;           /* a READ or the edges of a WRITE, blocking */
  struct lhb_request *next;     /* on the volume's lists */
  struct lhb_leg legs[LHB_REQUEST_IOS_MAX];
};

_Static_assert (LHB_REQUEST_IOS_MAX >= LHB_STORES_MAX, "one leg a replica");

/* Begin.  'complete' may be called before this returns. */
void lhb_request_start (struct lhb_request *request);
/* The gate opened, or the claim was granted, or the fence is up. */
void lhb_request_resume_gated (struct lhb_message *message);
void lhb_request_resume_held (struct lhb_message *message);

/* For batch.c: do the write of one replica; then, in the queue's thread, count
 * it as done. */
void lhb_leg_write (struct lhb_leg *leg);
void lhb_leg_done (struct lhb_leg *leg);

/* Whole blocks that a byte range touches. */
static inline uint32_t
lhb_request_span_blocks (uint64_t offset_bytes, uint32_t length_bytes)
{
  uint64_t start = offset_bytes % LHB_BLOCK_BYTES;

  return (uint32_t) ((start + length_bytes + LHB_BLOCK_BYTES - 1)
                     / LHB_BLOCK_BYTES);
}

static inline bool
lhb_request_is_partial (uint64_t offset_bytes, uint64_t length_bytes)
{
  return ((offset_bytes | length_bytes) & (LHB_BLOCK_BYTES - 1)) != 0;
}

#endif
