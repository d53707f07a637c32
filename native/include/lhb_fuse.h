/* FUSE: the relay between the kernel and the server in Python.
 *
 * Every queue reads requests of the kernel from /dev/fuse.  Those about files
 * that were added are executed here; all others go to the server through a
 * socket, and its replies come back through it, to lane 0.
 */
#ifndef LHB_FUSE_H
#define LHB_FUSE_H

#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "lhb_queue.h"
#include "lhb_request.h"

/* All of a READ or WRITE but its payload. */
#define LHB_FUSE_HEAD_BYTES 80

struct lhb_fuse_file {
  uint64_t handle;              /* 0: nobody's */
  lhb_volume *volume;           /* NULL: it was closed */
  uint32_t flags;               /* LHB_FUSE_* */
  uint32_t in_flight;
};

/* One request of the kernel. */
struct lhb_fuse_slot {
  struct lhb_request request;
  struct lhb_fuse_lane *lane;
  struct lhb_fuse_slot *next;
  struct lhb_fuse_file *file;
  lhb_volume *volume;           /* of the file; NULL: it was closed */
  uint64_t unique;
  uint32_t opcode;
  uint32_t whence;              /* LSEEK: SEEK_DATA or SEEK_HOLE */
  uint64_t found;               /* LSEEK: the answer, or UINT64_MAX */
  char *data;                   /* page-aligned: payload, then two edges */
  size_t message_bytes;
  union {
    char head[LHB_FUSE_HEAD_BYTES];
    struct {
      struct fuse_in_header in;
      union {
        struct fuse_read_in read;
        struct fuse_write_in write;
        struct fuse_fsync_in fsync;
        struct fuse_fallocate_in fallocate;
        struct fuse_lseek_in lseek;
      };
    };
  };
};

_Static_assert (sizeof (struct fuse_in_header) + sizeof (struct fuse_write_in)
                    == LHB_FUSE_HEAD_BYTES,
                "payload begins in a buffer of its own");
_Static_assert (sizeof (struct fuse_in_header) + sizeof (struct fuse_read_in)
                    == LHB_FUSE_HEAD_BYTES,
                "a READ is all head");

/* What one queue has of the relay; its thread's own. */
struct lhb_fuse_lane {
  struct lhb_fuse *fuse;
  struct lhb_queue *queue;
  struct lhb_pollable kernel;
  struct lhb_message message;   /* start, stop, gone */
  struct lhb_timer retry;
  struct lhb_fuse_slot *free;
  struct lhb_fuse_slot *stalled;        /* waits for room in the socket */
  uint32_t busy;
  bool watching, ended, stopping;
  int start_error;
  struct lhb_fuse_slot slots[LHB_FUSE_SLOTS];
};

struct lhb_fuse {
  struct lhb_engine *engine;
  int kernel_fd, server_fd, ended_fd;
  struct lhb_pollable server;   /* of lane 0 */
  char *message;                /* of lane 0: a reply of the server */
  _Atomic uint64_t init_unique;

  pthread_mutex_t lock;         /* all below */
  pthread_cond_t changed;       /* lanes, in_flight */
  uint32_t lanes_settled;
  uint32_t file_count;          /* used at any time: how far to look */
  struct lhb_fuse_file files[LHB_FUSE_FILES_MAX];
  uint64_t opens[LHB_FUSE_OPENS];       /* uniques, 0: none */
  uint32_t next_open;

  char *memory;
  size_t memory_bytes;
  struct lhb_fuse_lane lanes[];
};

/* The volume is closing: its files answer with EIO from now on, and what is in
 * progress ends first.  Any volume. */
void lhb_fuse_release_volume (lhb_volume *volume);

/* For fuse.c and fuse_io.c. */

/* Execute or refuse a request about a file that was added.  False: it is the
 * server's. */
bool lhb_fuse_execute (struct lhb_fuse_slot *slot);
/* Answer: 'error' is 0 or -errno; then the slot is free. */
void lhb_fuse_reply (struct lhb_fuse_slot *slot, int error,
                     const void *payload, size_t payload_bytes);
/* NULL: it was not added.  Otherwise it and its volume stay until it is put;
 * '*volume_out' is NULL if the volume was closed. */
struct lhb_fuse_file *lhb_fuse_take_file (struct lhb_fuse *fuse,
                                          uint64_t handle,
                                          lhb_volume **volume_out);
void lhb_fuse_put_file (struct lhb_fuse *fuse, struct lhb_fuse_file *file);

#endif
