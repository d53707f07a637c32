/* Store: the layers of one replica directory and their block map. */
#ifndef LHB_STORE_H
#define LHB_STORE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "lhb_engine.h"
#include "lhb_layer_io.h"
#include "lhb_map.h"

struct lhb_layer {
  _Atomic int fd;               /* -1: the slot is free */
  int discard_fd;               /* -1 until a discard is recorded or read */
  uint64_t size_bytes;
  char discard_name[LHB_NAME_BYTES_MAX];
  _Atomic bool dirty;           /* has writes that no fdatasync covered */
  bool in_map;
  bool adopted;                 /* by lhb_layer_adopt, since it was opened */
};

/* One waiter of a group commit; 'done' runs in a worker thread. */
struct lhb_sync_wait {
  struct lhb_sync_wait *next;
  void (*done) (struct lhb_sync_wait *wait, int error);
};

struct lhb_store {
  struct lhb_engine *engine;
  struct lhb_peer *peer;        /* NULL: files of this host, all of the rest */
  uint64_t id;
  int dir_fd;
  uint32_t flags;               /* LHB_STORE_* */
  uint64_t size_bytes;
  struct lhb_map *map;
  struct lhb_layer layers[LHB_MAP_HEAD];        /* by id; 0 is never used */
  uint8_t head;                 /* id of the head; 0 in a read-only store */
  uint8_t newest;               /* id of the layer added last */
  uint8_t prepared;             /* id of a head made ready, else 0 */

  pthread_mutex_t discard_lock; /* discard files: read-modify-write of bits */

  pthread_mutex_t activity_lock;
  int activity_fd;              /* of the activity log; -1 until it is written */
  bool has_activity;            /* the whole log of the volume is in it; with
                                   the log's lock */

  pthread_mutex_t syncing;      /* held through fdatasync and what it marks */

  /* Group commit: one fdatasync runs; those who ask meanwhile share the next.
   */
  pthread_mutex_t sync_lock;
  struct lhb_job sync_job;
  struct lhb_sync_wait *sync_running, *sync_waiting;
  bool sync_active;
  int sync_result;
  /* An fdatasync failed: the kernel forgot dirty pages, so nothing written
   * before can be promised any more.  Never cleared. */
  _Atomic bool sync_failed;
  _Atomic bool makes_zeros;     /* the file system can: FALLOC_FL_ZERO_RANGE */

  _Atomic uint64_t slow_until_ns;       /* buffered writes avoid the queue */
  _Atomic uint64_t outstanding_bytes;   /* reads at the driver or peer */
};

static inline bool
lhb_store_is_direct (const struct lhb_store *store)
{
  return (store->flags & LHB_STORE_DIRECT) != 0;
}

/* The file that holds a run found in the map. */
static inline int
lhb_store_run_fd (const struct lhb_store *store, uint8_t layer)
{
  uint8_t id = layer == LHB_MAP_HEAD ? store->head : layer;

  return atomic_load_explicit (&store->layers[id].fd, memory_order_acquire);
}

/* A store that has nothing yet, for lhb_store_open and lhb_peer_open; NULL:
 * no memory. */
struct lhb_store *lhb_store_make (struct lhb_engine *engine,
                                  uint64_t size_bytes);
/* Read whole blocks from the page cache only.  0; -EAGAIN when some block is
 * not there (part of 'buffer' may be filled); -errno.  Never blocks. */
int lhb_store_try_read (struct lhb_store *store, uint64_t block,
                        uint32_t blocks, void *buffer);
/* Read whole blocks.  Blocks the thread. */
int lhb_store_read (struct lhb_store *store, uint64_t block, uint32_t blocks,
                    void *buffer);
/* Write whole blocks to the head, now, in this thread.  Returns the bytes
 * written, fewer than asked only with an error in '*error_out'. */
uint32_t lhb_store_write (struct lhb_store *store, uint64_t block,
                          uint32_t blocks, const void *buffer, int rw_flags,
                          int *error_out);
/* Account for a finished write of the head: 'written_bytes' from 'block'. */
void lhb_store_wrote (struct lhb_store *store, uint64_t block,
                      uint64_t written_bytes);
/* Make [offset, offset+length) read as zeros, any alignment; blocks the
 * thread.  trim: give back space and leave holes with discard bits; else
 * zeros that any reader of the format sees, as holes where nothing is below
 * unless 'io_flags' has LHB_IO_NO_HOLE.  With LHB_IO_FAST_ZERO it is
 * -EOPNOTSUPP where zeros would have to be written block by block. */
int lhb_store_zero (struct lhb_store *store, uint64_t offset_bytes,
                    uint64_t length_bytes, bool trim, uint32_t io_flags);
/* How far it came.  'changed': and did a part of what comes next. */
struct lhb_progress {
  uint64_t done_bytes;
  bool changed;
};
int lhb_store_zero_noting (struct lhb_store *store, uint64_t offset_bytes,
                           uint64_t length_bytes, bool trim, uint32_t io_flags,
                           struct lhb_progress *progress_out);
/* After a failed change, whose range is still claimed: what the head's file
 * has of it and the map does not know is removed, and the map learns of the
 * discard bits.  Blocks the thread. */
int lhb_store_settle (struct lhb_store *store, uint64_t block,
                      uint64_t blocks);
/* Start loading into the page cache; best effort. */
void lhb_store_prefetch (struct lhb_store *store, uint64_t block,
                         uint64_t blocks);
/* Group-committed lhb_store_sync; 'wait->done' is always called. */
void lhb_store_sync_async (struct lhb_store *store,
                           struct lhb_sync_wait *wait);

/* Layers, for merge.c. */
int lhb_store_sync_layer (struct lhb_store *store, struct lhb_layer *layer);
struct lhb_layer *lhb_store_layer (struct lhb_store *store, int id);
void lhb_store_forget_layer (struct lhb_store *store, int id);

/* A regular file of the store's directory, opened as the store is: the file
 * descriptor or -errno.  'flags' are added ones. */
int lhb_store_open_file (struct lhb_store *store, const char *name, int flags);

/* A layer with a discard file is ours: only what was written there is data,
 * for a power loss leaves space of writes that did not reach the disk.  In a
 * layer of another program such space is data, too: zeros (adopt.c). */
int lhb_layer_data_kind (struct lhb_store *store, struct lhb_layer *layer,
                         enum lhb_extent_kind *kind_out);
/* Before the first write to a layer: it becomes ours, with a discard bit for
 * each block of unwritten space.  If it is ours, unwritten space without a bit
 * is given back.  Afterwards any extent of it is data.  Durable. */
int lhb_layer_adopt (struct lhb_store *store, struct lhb_layer *layer);

/* Discard bits of a layer (discard.c).  Set is durable when it returns; the
 * layer is adopted before.  Open: -ENOENT when there is no file. */
int lhb_discard_open (struct lhb_store *store, struct lhb_layer *layer);
/* Make the file, with a bit for each block of 'kind'. */
int lhb_discard_create (struct lhb_store *store, struct lhb_layer *layer,
                        enum lhb_extent_kind kind);
int lhb_discard_set (struct lhb_store *store, struct lhb_layer *layer,
                     uint64_t block, uint64_t blocks, bool *changed_io);
/* The next run of set bits at or after 'block' and before 'end': 1 and the
 * run, 0 when there is none, -errno. */
int lhb_discard_next (struct lhb_store *store, struct lhb_layer *layer,
                      uint64_t block, uint64_t end, uint64_t *first_out,
                      uint64_t *blocks_out);
/* The bits of whole bytes from 'block' on, a multiple of 8: read, or made to
 * be these, of a layer that is adopted.  Write returns 1 if that changed any;
 * it is not durable. */
int lhb_discard_read (struct lhb_store *store, struct lhb_layer *layer,
                      uint64_t block, uint8_t *bits, size_t length);
int lhb_discard_write (struct lhb_store *store, struct lhb_layer *layer,
                       uint64_t block, const uint8_t *bits, size_t length);
/* 'target' gets exactly the bits of 'source' of the blocks from 'block', a
 * multiple of 8, up to 'end', another one or the end of the layer; returns 1 if
 * that changed any.  Durable after lhb_discard_sync. */
int lhb_discard_copy (struct lhb_store *source_store,
                      struct lhb_layer *source,
                      struct lhb_store *target_store,
                      struct lhb_layer *target, uint64_t block, uint64_t end);
int lhb_discard_sync (struct lhb_store *store, struct lhb_layer *layer);

#endif
