/* Connection: a client's stream socket, the requests that arrive on it and the
 * replies that leave.  What the bytes mean is its protocol's business.
 */
#ifndef LHB_CONNECTION_H
#define LHB_CONNECTION_H

#include <stdbool.h>
#include <stdint.h>

#include "lhb_queue.h"
#include "lhb_request.h"
#include "lhb_slab.h"

struct lhb_connection;
struct lhb_slot;

/* A request of a client, taken from its header. */
struct lhb_call {
  uint64_t cookie;              /* goes back with the reply */
  uint64_t offset_bytes;
  uint32_t length_bytes;
  uint32_t payload_bytes;       /* that follow the header */
  uint32_t payload_at;          /* where in the slab they go */
  uint32_t slab_blocks;         /* buffer that the call needs; 0: none */
  uint32_t refusal;             /* 0, or the protocol's error: not executed */
  uint16_t type, flags;
  bool needs_edges;             /* a write with partial blocks */
};

enum lhb_verdict {
  LHB_CALL_OK,                  /* execute or refuse it */
  LHB_CALL_IGNORE,              /* no reply; its payload is skipped */
  LHB_CALL_BAD_MAGIC,           /* the stream makes no sense: close */
  LHB_CALL_END,                 /* the client says goodbye */
};

struct lhb_protocol {
  uint32_t header_bytes;
  /* Take a header apart and judge it; the only function that doubts it. */
  enum lhb_verdict (*parse) (const struct lhb_connection *connection,
                             const uint8_t *header, struct lhb_call *call);
  /* Start an accepted call; ends in lhb_connection_reply. */
  void (*execute) (struct lhb_slot *slot);
  /* Fill in slot->reply, and slot->payload if there is one. */
  void (*format_reply) (struct lhb_slot *slot, uint32_t error);
};

/* One call, from its header to the last byte of its reply. */
struct lhb_slot {
  struct lhb_request request;
  struct lhb_connection *connection;
  struct lhb_call call;
  char *slab;                   /* NULL if none */
  char *edges;                  /* two blocks, for a write with partial ones */
  struct lhb_slot *next;        /* free list, or list of replies */
  const char *payload;          /* of the reply */
  uint32_t payload_bytes;
  uint32_t reply_bytes;
  uint8_t reply[96];            /* its header, and an error text */
};

enum lhb_receive_state {
  LHB_RECEIVE_HEADER,           /* the next bytes are a header */
  LHB_RECEIVE_PAYLOAD,          /* ... the payload of 'receiving' */
  LHB_RECEIVE_SKIP,             /* ... a payload that nobody wants */
};

struct lhb_connection {
  struct lhb_pollable socket;
  struct lhb_turn_end turn_end;
  struct lhb_message attach, close_asked;
  const struct lhb_protocol *protocol;
  struct lhb_volume *volume;
  struct lhb_queue *queue;
  uint64_t id;
  uint32_t flags;               /* LHB_NBD_* */
  uint32_t base_allocation_id;
  struct lhb_connection *prev, *next;   /* volume->connections */
  bool close_posted;            /* under volume->lock */

  /* The rest belongs to the queue's thread. */
  bool close_handled;
  bool readable, writable;      /* edge-triggered: until EAGAIN */
  bool hung_up;                 /* the peer sends no more: read to the end */
  bool starved;                 /* waits for a free slot or slab */
  bool closing;                 /* reads no more requests */
  bool dead;                    /* the socket is of no more use */
  bool expect_large;            /* the last call had a large payload */
  int close_reason;             /* LHB_CLOSE_* */
  enum lhb_receive_state state;
  struct lhb_slot *receiving;
  uint32_t payload_left;        /* unless LHB_RECEIVE_HEADER */
  uint32_t in_flight;           /* slots in use */
  struct lhb_slot *free_slots;
  uint32_t slots_touched;       /* slots beyond were never used */
  struct lhb_slot *replies, **replies_tail;
  size_t reply_sent_bytes;      /* of the first reply */
  char *receive;
  uint32_t receive_first, receive_count;
  struct lhb_slabs slabs;
  struct lhb_slot slots[LHB_CONN_REQUESTS];
};

/* Hand a connected socket to the core; see lhb_nbd_attach. */
int lhb_connection_attach (struct lhb_volume *volume,
                           const struct lhb_protocol *protocol, int socket_fd,
                           uint32_t flags, uint32_t base_allocation_id,
                           uint64_t *connection_id_out);
/* Ask every connection of the volume to end. */
void lhb_connections_close_all (struct lhb_volume *volume);

/* For protocols, in the queue's thread: queue the reply of a slot. */
void lhb_connection_reply (struct lhb_slot *slot, uint32_t error);

/* For connection.c and connection_receive.c only. */

/* Read what the socket has, within the turn's limit, and start every complete
 * call.  Stops early when slots or slabs run out ('starved'); then the next
 * reply that is sent makes room. */
void lhb_connection_pump (struct lhb_connection *connection);
/* End the connection: no more calls are read.  The first reason counts. */
void lhb_connection_give_up (struct lhb_connection *connection, int reason);
/* Give a slot and its buffers back. */
void lhb_connection_free_slot (struct lhb_slot *slot);

#endif
