/* Peer: what the peer_*.c files share.  All but what is said to be otherwise
 * belongs to the thread of one queue. */
#ifndef LHB_PEER_PARTS_H
#define LHB_PEER_PARTS_H

#include <pthread.h>
#include <stdatomic.h>

#include "lhb_peer.h"
#include "lhb_queue.h"
#include "lhb_store.h"

struct lhb_peer_queue;

struct lhb_peer_connection {
  struct lhb_pollable socket;
  struct lhb_turn_end turn_end;
  struct lhb_message attach;
  struct lhb_peer_queue *owner;
  bool readable, writable;      /* edge-triggered: until EAGAIN */
  bool hung_up;                 /* the peer sends no more: read to the end */
  bool watched, closed;
  bool expect_large;            /* the last reply had a large payload */

  /* Frames to send; of the first one 'sent_bytes' are. */
  struct lhb_peer_call *send, **send_tail;
  size_t sent_bytes;

  /* Calls by the low byte of their sequence number; the rest of it counts. */
  struct lhb_peer_call *calls[LHB_PEER_IN_FLIGHT_MAX];
  uint8_t free_slots[LHB_PEER_IN_FLIGHT_MAX];
  uint32_t free_count;
  uint32_t next_number;
  uint64_t outstanding_bytes;

  /* Replies: unparsed bytes, and the READ whose payload is arriving. */
  char *receive;
  uint32_t receive_first, receive_count;
  struct lhb_peer_call *receiving;      /* NULL: thrown away */
  uint32_t payload_left;
};

/* Counters of one queue, written by its thread only. */
struct lhb_peer_counters {
  _Atomic uint64_t frames_sent, frames_received, bytes_sent, bytes_received;
  _Atomic uint64_t errors, timeouts, in_flight, waiting;
};

struct lhb_peer_queue {
  struct lhb_peer *peer;
  struct lhb_queue *queue;
  struct lhb_message end;
  struct lhb_timer timer;
  struct lhb_peer_connection *connections[LHB_PEER_CONNECTIONS_MAX];
  uint32_t connection_count;
  struct lhb_peer_call in_flight;       /* head of a ring, oldest first */
  struct lhb_peer_call waiting;         /* the same: no slot was free */
  struct lhb_peer_counters counters;
};

struct lhb_peer {
  struct lhb_store *store;
  struct lhb_engine *engine;
  uint32_t flags;               /* LHB_PEER_* */
  uint64_t reply_timeout_ns;
  _Atomic int ended;            /* errno; 0: not yet.  Set once */
  _Atomic uint32_t reason;      /* LHB_PEER_END_* */

  pthread_mutex_t lock;         /* the rest, up to the queues */
  pthread_cond_t changed;
  struct lhb_volume *volume;
  uint32_t added[LHB_QUEUES_MAX];       /* connections of each queue */
  uint32_t open;                /* connections that are not freed yet */
  uint32_t ending;              /* queues that have yet to end */

  uint32_t queue_count;
  struct lhb_peer_queue queues[];
};

static inline bool
lhb_peer_is_ours (const struct lhb_peer *peer)
{
  return (peer->flags & LHB_PEER_OURS) != 0;
}

/* One thread writes a counter, any may read it. */
static inline void
lhb_peer_count (_Atomic uint64_t *counter, uint64_t amount)
{
  atomic_store_explicit (
      counter,
      atomic_load_explicit (counter, memory_order_relaxed) + amount,
      memory_order_relaxed);
}

/* peer.c.  Any thread: the peer is of no more use.  The first reason counts;
 * its calls end soon after, in their queues' threads. */
void lhb_peer_end (struct lhb_peer *peer, int error, uint32_t reason);

/* peer_call.c.  The reply to a call's frame came, with an error or without;
 * the next frame, or the end of the call. */
void lhb_peer_replied (struct lhb_peer_call *call, int error,
                       uint32_t size_bytes);
/* The whole frame of a call is with the kernel. */
void lhb_peer_sent (struct lhb_peer_call *call);
/* End all calls of a queue. */
void lhb_peer_drop_calls (struct lhb_peer_queue *owner, int error);
void lhb_peer_timer_fired (struct lhb_timer *timer);

/* peer_send.c */
void lhb_peer_send (struct lhb_peer_connection *connection);

/* peer_receive.c.  Read what the socket has, within the turn's limit. */
void lhb_peer_receive (struct lhb_peer_connection *connection);

#endif
