/* NBD transmission phase of one connection.
 *
 * Wire format: the NBD protocol specification, sections "Transmission",
 * "Structured reply" and "NBD_CMD_*".  All integers are big endian.
 */
#ifndef LHB_NBD_H
#define LHB_NBD_H

#include <stdbool.h>
#include <stdint.h>

#include "lhb_queue.h"
#include "lhb_request.h"

#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698u
#define NBD_STRUCTURED_REPLY_MAGIC 0x668e33efu
#define NBD_REQUEST_BYTES 28

enum {
  NBD_CMD_READ = 0,
  NBD_CMD_WRITE = 1,
  NBD_CMD_DISC = 2,
  NBD_CMD_FLUSH = 3,
  NBD_CMD_TRIM = 4,
  NBD_CMD_CACHE = 5,
  NBD_CMD_WRITE_ZEROES = 6,
  NBD_CMD_BLOCK_STATUS = 7,
};

enum {
  NBD_CMD_FLAG_FUA = 1 << 0,
  NBD_CMD_FLAG_NO_HOLE = 1 << 1,
  NBD_CMD_FLAG_DF = 1 << 2,
  NBD_CMD_FLAG_REQ_ONE = 1 << 3,
  NBD_CMD_FLAG_FAST_ZERO = 1 << 4,
};

enum {
  NBD_REPLY_FLAG_DONE = 1 << 0,
  NBD_REPLY_TYPE_NONE = 0,
  NBD_REPLY_TYPE_OFFSET_DATA = 1,
  NBD_REPLY_TYPE_BLOCK_STATUS = 5,
  NBD_REPLY_TYPE_ERROR = 0x8001,
};

enum {
  NBD_EPERM = 1,
  NBD_EIO = 5,
  NBD_ENOMEM = 12,
  NBD_EINVAL = 22,
  NBD_ENOSPC = 28,
  NBD_ENOTSUP = 95,
  NBD_ESHUTDOWN = 108,
};

enum {
  NBD_STATE_HOLE = 1 << 0,
  NBD_STATE_ZERO = 1 << 1,
};

struct lhb_nbd_header {
  uint16_t flags, type;
  uint64_t cookie, offset_bytes;
  uint32_t length_bytes;
};

/* One request of a client, from its header to the last byte of its reply. */
struct lhb_nbd_slot {
  struct lhb_request request;
  struct lhb_nbd_connection *connection;
  struct lhb_nbd_header header;
  char *slab;                   /* payload; NULL if none */
  char *edges;                  /* LHB_OP_WRITE with partial blocks */
  struct lhb_nbd_slot *next;    /* free list, or list of replies */
  const char *payload;          /* of the reply */
  uint32_t payload_bytes;
  uint32_t reply_bytes;
  uint8_t reply[32];            /* its header */
};

/* Buffers of one connection, in classes of sizes; LIFO, so that a small
 * working set stays in the CPU's cache. */
struct lhb_slab_class {
  char *memory;
  uint32_t blocks, count, free_count;
  uint16_t *free;               /* indices */
};

struct lhb_slabs {
  char *memory;
  size_t memory_bytes;
  struct lhb_slab_class classes[LHB_CONN_SLAB_CLASSES];
  uint16_t indices[1024];
};

int lhb_slabs_open (struct lhb_slabs *slabs);
void lhb_slabs_close (struct lhb_slabs *slabs);
/* A buffer of at least 'blocks' blocks, or NULL when none is free now. */
char *lhb_slabs_take (struct lhb_slabs *slabs, uint32_t blocks);
void lhb_slabs_give (struct lhb_slabs *slabs, char *slab);

enum lhb_nbd_state {
  LHB_NBD_HEADER,               /* the next bytes are a request */
  LHB_NBD_PAYLOAD,              /* ... the data of 'receiving' */
  LHB_NBD_SKIP,                 /* ... data of a refused write */
};

struct lhb_nbd_connection {
  struct lhb_pollable socket;
  struct lhb_turn_end turn_end;
  struct lhb_message attach, close_asked;
  struct lhb_volume *volume;
  struct lhb_queue *queue;
  uint64_t id;
  uint32_t flags;               /* LHB_NBD_* */
  uint32_t base_allocation_id;
  struct lhb_nbd_connection *prev, *next;       /* volume->connections */
  bool close_posted;            /* under volume->lock */

  /* The rest belongs to the queue's thread. */
  bool close_handled;
  bool readable, writable;      /* edge-triggered: until EAGAIN */
  bool hung_up;                 /* the peer sends no more: read to the end */
  bool starved;                 /* waits for a free slot or slab */
  bool closing;                 /* reads no more requests */
  bool dead;                    /* the socket is of no more use */
  bool expect_large;            /* the last request was a large write */
  int close_reason;             /* LHB_CLOSE_* */
  enum lhb_nbd_state state;
  struct lhb_nbd_slot *receiving;
  uint32_t payload_left;        /* LHB_NBD_PAYLOAD and LHB_NBD_SKIP */
  uint32_t in_flight;           /* slots in use */
  struct lhb_nbd_slot *free_slots;
  uint32_t slots_touched;       /* slots beyond were never used */
  struct lhb_nbd_slot *replies, **replies_tail;
  size_t reply_sent_bytes;      /* of the first reply */
  char *receive;
  uint32_t receive_first, receive_count;
  struct lhb_slabs slabs;
  struct lhb_nbd_slot slots[LHB_CONN_REQUESTS];
};

/* nbd_command.c: judge a request's header: 0 or an NBD error. */
uint32_t lhb_nbd_check (const struct lhb_nbd_connection *connection,
                        const struct lhb_nbd_header *header);
/* Execute; ends in lhb_nbd_reply. */
void lhb_nbd_execute (struct lhb_nbd_slot *slot);
/* Blocks of buffer that a request needs. */
uint32_t lhb_nbd_span_blocks (const struct lhb_nbd_header *header);

/* nbd_connection.c: queue the reply of a slot: NBD error, or 0 and the
 * payload already set. */
void lhb_nbd_reply (struct lhb_nbd_slot *slot, uint32_t error);
/* Give a slot and its buffers back. */
void lhb_nbd_free_slot (struct lhb_nbd_slot *slot);
/* Ask every connection of the volume to end. */
void lhb_nbd_close_all (struct lhb_volume *volume);

static inline void
lhb_put_be16 (uint8_t *at, uint16_t value)
{
  at[0] = (uint8_t) (value >> 8);
  at[1] = (uint8_t) value;
}

static inline void
lhb_put_be32 (uint8_t *at, uint32_t value)
{
  value = __builtin_bswap32 (value);
  __builtin_memcpy (at, &value, sizeof value);
}

static inline void
lhb_put_be64 (uint8_t *at, uint64_t value)
{
  value = __builtin_bswap64 (value);
  __builtin_memcpy (at, &value, sizeof value);
}

_Static_assert (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
                "the on-disk and wire code assumes little endian");

#endif
