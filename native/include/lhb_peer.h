/* Peer: a remote replica, an lhb_store without files.
 *
 * Every queue has its own connections to it, so nothing on the path of a
 * request takes a lock.  What a replica has to do for a request is a call; a
 * call is one frame, or several, one after the other.  What makes a peer end,
 * and what that means, is in docs/internals/remote-replicas.md.
 */
#ifndef LHB_PEER_H
#define LHB_PEER_H

#include <stdbool.h>
#include <stdint.h>

#include "lhb_contract.h"
#include "lhb_limits.h"
#include "lhb_replica_wire.h"

struct lhb_peer;
struct lhb_peer_connection;
struct lhb_queue;
struct lhb_store;
struct lhb_volume;

enum lhb_peer_stage {
  LHB_PEER_BODY,                /* all of it; of TRIM and ZERO whole blocks */
  LHB_PEER_HEAD,                /* TRIM and ZERO: a part of a block */
  LHB_PEER_TAIL,
  LHB_PEER_SYNC,                /* FUA of TRIM and ZERO */
  LHB_PEER_OVER,
};

struct lhb_peer_call {
  /* Set by the caller. */
  void (*done) (struct lhb_peer_call *call);    /* in the queue's thread */
  uint32_t op;                  /* LHB_OP_* */
  uint32_t flags;               /* LHB_IO_* */
  uint64_t offset_bytes, length_bytes;
  char *buffer;                 /* READ and WRITE */

  /* Result. */
  int error;                    /* 0 or -errno */
  uint64_t done_bytes;          /* of a change, as in struct lhb_leg */
  bool unsure;

  /* The peer's own. */
  struct lhb_peer_call *prev, *next;    /* in flight, or waiting */
  struct lhb_peer_call *next_send;
  struct lhb_peer_connection *connection;       /* NULL: waiting */
  uint64_t since_ns;            /* when its frame was queued */
  enum lhb_peer_stage stage;    /* of the next frame */
  bool counts;                  /* the frame's bytes are done_bytes */
  bool sent;                    /* the whole frame is with the kernel */
  bool replied;                 /* before that: an error */
  uint32_t sequence, type;
  uint32_t size_bytes;          /* of the frame's range */
  uint32_t payload_bytes;
  const char *payload;
  uint8_t frame[LHB_FRAME_BYTES];
};

/* Begin, in the queue's thread.  'done' may be called before this returns. */
void lhb_peer_start (struct lhb_store *store, struct lhb_queue *queue,
                     struct lhb_peer_call *call);

/* Tell the peer whose it is, so that it can say when it ends; NULL: nobody's.
 * Without the volume's lock. */
void lhb_peer_set_volume (struct lhb_peer *peer, struct lhb_volume *volume);
/* Its connections are closed, or are about to be. */
bool lhb_peer_has_ended (const struct lhb_peer *peer);
/* Every queue can reach it. */
bool lhb_peer_is_complete (struct lhb_peer *peer);
/* For lhb_store_close: blocking. */
void lhb_peer_close (struct lhb_peer *peer);

#endif
