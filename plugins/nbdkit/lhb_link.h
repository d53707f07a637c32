/* The requests of one client of nbdkit, on one connection to the engine.
 *
 * nbdkit calls with many threads.  Each sends its own request, one after the
 * other; whoever finds that nobody receives does so, for all, until its own
 * request is answered, and then passes that on to one that waits.  So a lone
 * request needs no other thread, and many are answered by one receive.
 */
#ifndef LHB_LINK_H
#define LHB_LINK_H

#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdint.h>

#include "lhb_nbd.h"
#include "lhb_session.h"

#define LHB_LINK_RECEIVE_BYTES (128u << 10)
#define LHB_LINK_EXTENTS_MAX 1024       /* the engine sends 1000 */
#define LHB_LINK_RETRY_NS 100000000u
#define LHB_LINK_RETRY_S_MAX 86400

struct lhb_extent {
  uint32_t bytes, state;        /* NBD_STATE_HOLE, NBD_STATE_ZERO */
};

/* One request.  The first fields are the caller's. */
struct lhb_request {
  uint16_t type, flags;
  uint32_t bytes;
  uint64_t offset;
  union {
    uint8_t *in;                /* NBD_CMD_READ: 'bytes' of them */
    const uint8_t *out;         /* NBD_CMD_WRITE */
    struct lhb_extent *extents; /* NBD_CMD_BLOCK_STATUS: LHB_LINK_EXTENTS_MAX */
  };
  uint32_t got;                 /* bytes read, or extents */

  uint64_t cookie;
  struct lhb_request *next;
  sem_t wake;
  int err;                      /* what the server said, or -EIO */
  bool done;
  bool lost;                    /* done, without an answer */
  bool waits;                   /* until done, or made the one who receives */
};

struct lhb_link {
  const char *path, *name;
  unsigned retry_s;
  struct lhb_export export;     /* as first told */

  pthread_mutex_t sending;      /* also for changing 'fd'; taken first */
  int fd;

  pthread_mutex_t lock;         /* of what follows */
  bool down;                    /* nothing can be sent or received */
  bool led;                     /* somebody receives */
  uint64_t cookie;              /* the last */
  struct lhb_request *sent;     /* no answer yet; oldest first */
  struct lhb_request **sent_end;

  /* The receiver's. */
  struct lhb_request *reading;  /* its payload is coming in */
  uint8_t *reading_at;
  uint32_t reading_rest;
  bool reading_last;            /* no other chunk follows */
  uint32_t head, tail;          /* of what was received */
  uint8_t received[LHB_LINK_RECEIVE_BYTES];
};

/* Connect.  'path' and 'name' must outlive the link.  0 or -errno, with what
 * the server said in 'export.said'. */
int lhb_link_open (struct lhb_link *link, const char *path, const char *name,
                   unsigned retry_s);

/* Called when no request is under way. */
void lhb_link_close (struct lhb_link *link);

/* Carry out a request.  When the server goes away it is sent again to the next
 * one, for 'retry_s' seconds.  0 or -errno; -ESHUTDOWN when nbdkit ends. */
int lhb_link_call (struct lhb_link *link, struct lhb_request *request);

#endif
