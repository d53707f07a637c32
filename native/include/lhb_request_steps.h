/* Steps of a request: what request.c and the files of the operations share. */
#ifndef LHB_REQUEST_STEPS_H
#define LHB_REQUEST_STEPS_H

#include "lhb_request.h"
#include "lhb_util.h"
#include "lhb_volume.h"

/* ---- request.c */

/* The end: count it, release the claim, call 'complete'. */
void lhb_request_finish (struct lhb_request *request);
/* The same for a change, whose answer may have to wait for a fence. */
void lhb_request_finish_change (struct lhb_request *request);
/* Run the request's own job in a worker; 'done' in the queue's thread. */
void lhb_request_submit_job (struct lhb_request *request,
                             void (*run) (struct lhb_job *job),
                             void (*done) (struct lhb_message *message));

/* The activity log has the range of a change that waited for it; or, with the
 * request's error set, it cannot have it. */
void lhb_request_heated (struct lhb_request *request);

/* ---- request_legs.c */

/* The leg of every replica that is RW or WO now is ready to be started, and
 * 'pending' is one more than they are: legs that end at once do not finish the
 * request while others are being started.  End with lhb_request_end_leg. */
void lhb_request_enlist (struct lhb_request *request);
/* One leg, or the starting of them, is done.  The last one judges. */
void lhb_request_end_leg (struct lhb_request *request);

/* ---- request_peer.c */

/* Start what the leg's replica, a peer, has to do for the request: 'op' on a
 * range.  'done' as in lhb_peer_call; the results are the call's. */
void lhb_leg_start_call (struct lhb_leg *leg, uint32_t index, uint32_t op,
                         void (*done) (struct lhb_peer_call *call));
/* Read from the request's source, a peer, or fill in its edges from one. */
void lhb_request_read_peer (struct lhb_request *request);
void lhb_request_read_peer_edges (struct lhb_request *request);

/* Count a call as its leg's result. */
static inline struct lhb_leg *
lhb_leg_of_call (struct lhb_peer_call *call)
{
  struct lhb_leg *leg = lhb_container_of (call, struct lhb_leg, call);

  leg->error = call->error;
  leg->done_bytes = call->done_bytes;
  leg->unsure = call->unsure;
  return leg;
}

static inline bool
lhb_request_is_rw (const struct lhb_volume *volume, uint32_t index)
{
  return atomic_load_explicit (&volume->states[index], memory_order_acquire)
         == LHB_STATE_RW;
}

/* ---- The operations, with the range claimed. */

/* Begin, or go on after an error, with the next replica. */
void lhb_request_read (struct lhb_request *request);
/* Its end, or another attempt. */
void lhb_request_end_read (struct lhb_request *request, int error);
/* The replica to read from, or -1: all were tried. */
int lhb_request_choose_source (const struct lhb_request *request);
void lhb_request_write (struct lhb_request *request);
/* Write 'block_count' blocks from 'first_block' on to all replicas. */
void lhb_request_write_blocks (struct lhb_request *request);
/* Fill in 'edges'; go on when that is done. */
void lhb_request_read_edges (struct lhb_request *request);
void lhb_request_edges_read (struct lhb_request *request);
void lhb_request_zero_widened (struct lhb_request *request);
/* False: there is none. */
bool lhb_request_next_zero_step (struct lhb_request *request);
void lhb_request_zero (struct lhb_request *request);
void lhb_request_flush (struct lhb_request *request);

static inline void
lhb_count (_Atomic uint64_t *counter, uint64_t amount)
{
  atomic_fetch_add_explicit (counter, amount, memory_order_relaxed);
}

#endif
