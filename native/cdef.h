/* The contract between Python and the native core.
 *
 * cffi reads this file as it is, and every C source includes it, so it holds
 * plain types, constants and functions only: no preprocessor conditionals, no
 * callbacks.  Python calls in; the core answers through return values and
 * through one ring of event records behind one eventfd.
 *
 * Every function returns 0 (or a count) on success and -errno on failure
 * unless its comment says otherwise.  "Blocking" marks the functions that may
 * wait for I/O: call them from a worker thread, never from the trio thread.
 */

#define LHB_BLOCK_BYTES 4096        /* unit of data, holes and ordering */
#define LHB_LAYERS_MAX 250          /* files of one live chain, head included */
#define LHB_STORES_MAX 8            /* replicas of one volume */
#define LHB_NAME_BYTES_MAX 256      /* file name inside a replica directory */

#define LHB_DRIVER_AUTO 0           /* io_uring where the probe works, else pool */
#define LHB_DRIVER_URING 1
#define LHB_DRIVER_POOL 2

#define LHB_STORE_DIRECT 1          /* cache=none: O_DIRECT files */
#define LHB_STORE_READ_ONLY 2       /* nothing is opened for writing */
/* Layers below the head are being rebuilt: they are not read, and taken to
 * have every block. */
#define LHB_STORE_WRITE_ONLY 4

#define LHB_PEER_OURS 1             /* it knows the frames that are our own */

/* Why a peer's connections were closed. */
#define LHB_PEER_END_NONE 0         /* they were not */
#define LHB_PEER_END_CLOSED 1       /* lhb_store_close() */
#define LHB_PEER_END_SOCKET_ERROR 2
#define LHB_PEER_END_EOF 3          /* it closed one, between two replies */
#define LHB_PEER_END_MID_REPLY 4    /* it closed one, inside a reply */
#define LHB_PEER_END_TIMEOUT 5      /* a request got no reply in time */
#define LHB_PEER_END_BAD_MAGIC 6
#define LHB_PEER_END_BAD_SEQUENCE 7 /* a reply to nothing that was asked */
#define LHB_PEER_END_BAD_TYPE 8
#define LHB_PEER_END_BAD_LENGTH 9   /* too much, or not what was asked for */
#define LHB_PEER_END_GOODBYE 10     /* it said that it closes */

#define LHB_VOLUME_READ_ONLY 1

#define LHB_MODE_RW 0
#define LHB_MODE_WO 1               /* gets every change, answers no reads */

#define LHB_OP_READ 0
#define LHB_OP_WRITE 1
#define LHB_OP_FLUSH 2
#define LHB_OP_TRIM 3
#define LHB_OP_ZERO 4

#define LHB_IO_FUA 1
#define LHB_IO_NO_HOLE 2            /* LHB_OP_ZERO must leave allocated space */
#define LHB_IO_FAST_ZERO 4          /* LHB_OP_ZERO: -EOPNOTSUPP if slow */

#define LHB_FUSE_WRITABLE 1         /* see lhb_fuse_add_file */
#define LHB_FUSE_FUA 2
#define LHB_FUSE_FILES_MAX 1024     /* open at once, of one mount */
#define LHB_FUSE_BYTES_MAX 1048576  /* of one READ or WRITE */

#define LHB_NBD_STRUCTURED 1        /* structured replies were negotiated */
#define LHB_NBD_BASE_ALLOCATION 2   /* base:allocation is selected, id below */
#define LHB_NBD_READ_ONLY 4

/* A store is used no more.  If it was RW: fence it, then lhb_volume_fenced();
 * a WO one needs no fence. */
#define LHB_EVENT_STORE_FAILED 1
#define LHB_EVENT_CONNECTION_CLOSED 2
#define LHB_EVENT_OUT_OF_SPACE 3    /* a write found no space on any replica */
/* The connections of the only RW store, a peer, are closed.  It is not dropped,
 * and all requests end with EIO until another set is published. */
#define LHB_EVENT_LAST_PEER_LOST 4

#define LHB_CLOSE_CLIENT 0          /* NBD_CMD_DISC */
#define LHB_CLOSE_EOF 1             /* peer vanished between requests */
#define LHB_CLOSE_MID_REQUEST 2     /* peer vanished inside a request */
#define LHB_CLOSE_BAD_MAGIC 3
#define LHB_CLOSE_TOO_LARGE 4       /* payload too large to skip over */
#define LHB_CLOSE_SOCKET_ERROR 5
#define LHB_CLOSE_READ_FAILED 6     /* error after a simple reply had begun */
#define LHB_CLOSE_ASKED 7           /* lhb_connection_close() or volume close */

typedef struct lhb_engine lhb_engine;
typedef struct lhb_volume lhb_volume;
typedef struct lhb_store lhb_store;
typedef struct lhb_fuse lhb_fuse;

struct lhb_engine_options {
  uint32_t queues;                  /* queue threads, 1..64 */
  uint32_t workers_max;             /* worker pool threads, 1..64 */
  uint32_t driver;                  /* LHB_DRIVER_* */
  uint32_t reserved;
};

struct lhb_event {
  uint32_t type;                    /* LHB_EVENT_* */
  int32_t error;                    /* errno, or LHB_CLOSE_* of a connection */
  uint64_t volume_id;
  uint64_t subject_id;              /* store id or connection id */
  uint64_t offset_bytes;
  uint64_t length_bytes;
};

struct lhb_extent {
  uint64_t offset_bytes;
  uint64_t length_bytes;
};

struct lhb_statistics {
  uint64_t reads, writes, flushes, trims, zeroes;       /* completed requests */
  uint64_t read_bytes, write_bytes, trim_bytes, zero_bytes;
  uint64_t read_ns, write_ns, flush_ns;                 /* summed latency */
  uint64_t errors;                  /* requests answered with an error */
  uint64_t waits;                   /* requests that waited for an overlap */
  uint64_t inline_reads, driver_reads;    /* page-cache hits, and the others */
  uint64_t inline_writes, driver_writes;
  uint64_t in_flight;
  uint64_t connections;
  uint64_t map_bytes;               /* memory of the block maps */
  uint64_t freeze_ns_max;           /* longest pause of I/O so far */
};

struct lhb_peer_statistics {
  uint64_t frames_sent, frames_received;
  uint64_t bytes_sent, bytes_received;
  uint64_t errors;                  /* replies that were errors */
  uint64_t timeouts;
  uint64_t in_flight, waiting;      /* frames, now */
  uint64_t connections;             /* open now */
  int32_t ended;                    /* errno; 0: it has not */
  uint32_t end_reason;              /* LHB_PEER_END_* */
};

/* ---- Engine: the queue threads, the worker pool, the event ring. */

int lhb_engine_open (const struct lhb_engine_options *options,
                     lhb_engine **engine_out);
/* Blocking.  Every volume must be closed before. */
void lhb_engine_close (lhb_engine *engine);
/* LHB_DRIVER_URING or LHB_DRIVER_POOL: what lhb_engine_open chose. */
int lhb_engine_driver (const lhb_engine *engine);
uint32_t lhb_engine_queues (const lhb_engine *engine);
int lhb_engine_event_fd (const lhb_engine *engine);
/* 1 and an event, or 0 when the ring is empty.  Clear the eventfd before. */
int lhb_engine_next_event (lhb_engine *engine, struct lhb_event *event_out);

/* ---- Probes, harmless. */

int lhb_probe_uring (void);         /* 0, or the reason as -errno */
int lhb_probe_fiemap (int fd);
int lhb_built_with_uring (void);    /* 1 or 0 */

/* ---- Files: extents, checksums and merges of frozen layers. */

/* Data extents (unwritten and delayed ones count as data) of an open file at
 * and after offset_bytes, block-rounded, adjacent ones joined, at most 'max'.
 * Returns the count; fewer than 'max' means the end was reached.  Blocking. */
int lhb_file_extents (int fd, uint64_t offset_bytes,
                      struct lhb_extent *extents_out, uint32_t max);
/* CRC-64/ISO over [offset, offset+length) with holes as zeros; '*crc_io' is
 * the running value, 0 to begin with.  Blocking. */
int lhb_file_crc64 (int fd, uint64_t offset_bytes, uint64_t length_bytes,
                    uint64_t *crc_io);
uint64_t lhb_crc64 (uint64_t crc, const void *data, size_t length_bytes);

/* ---- Store: one replica directory opened for sector I/O.
 *
 * Python owns all metadata of the directory and tells the store which image
 * files make the chain.  Layers have ids 1..254, given by lhb_store_add_layer
 * and stable for the life of the store.
 */

/* 'dir_fd' is duplicated. */
int lhb_store_open (lhb_engine *engine, int dir_fd, uint64_t size_bytes,
                    uint32_t flags, lhb_store **store_out);
/* Blocking for a peer: waits until its connections are closed. */
void lhb_store_close (lhb_store *store);
uint64_t lhb_store_id (const lhb_store *store);
/* Add the next newer layer (call oldest first; the last one added is the head
 * once lhb_store_start is called).  'discard' is the name of the layer's
 * discard file, which need not exist: then unwritten extents of the layer are
 * zeros, else they are what a power loss left, and nothing.  Blocking: reads
 * the extent map.
 * Returns the layer id. */
int lhb_store_add_layer (lhb_store *store, const char *image,
                         const char *discard);
/* The chain is complete. Read-only stores have no head: every layer is read
 * through the map.  A head without a discard file gets one. */
int lhb_store_start (lhb_store *store);
/* Make the next head ready (file exists, empty, right size), with a discard
 * file; I/O goes on. */
int lhb_store_prepare_head (lhb_store *store, const char *image,
                            const char *discard);
void lhb_store_abandon_head (lhb_store *store);
/* Volume frozen.  The prepared file becomes the head, the old head a layer.
 * 'size_bytes' is the new volume size.  Returns the new head's layer id. */
int lhb_store_commit_head (lhb_store *store, uint64_t size_bytes);
/* A layer's discard file has, or would get, another name from now on: that of
 * an old head changes when it becomes a snapshot. */
int lhb_store_rename_discard (lhb_store *store, int layer,
                              const char *discard);
/* fdatasync of every layer and discard file with unsynced data.  Blocking. */
int lhb_store_sync (lhb_store *store);
uint64_t lhb_store_map_bytes (const lhb_store *store);

/* ---- Peer: a replica of another process, as a store without files.
 *
 * Of the functions of a store it has lhb_store_id and lhb_store_close. */

/* 'flags': LHB_PEER_*.  A request that gets no reply within 'reply_timeout_ms'
 * (1 ms to 1 h) ends the peer. */
int lhb_peer_open (lhb_engine *engine, uint64_t size_bytes, uint32_t flags,
                   uint32_t reply_timeout_ms, lhb_store **store_out);
/* A connected stream socket, past its hello, for one queue's requests.  On
 * success it belongs to the core.  Every queue needs one, and may have up to 8,
 * before the peer is published.  -ENOTCONN: the peer has ended. */
int lhb_peer_add_connection (lhb_store *peer, uint32_t queue, int socket_fd);
/* Volume frozen, or not published: the replica has this size now. */
int lhb_peer_resize (lhb_store *peer, uint64_t size_bytes);
void lhb_peer_statistics (lhb_store *peer,
                          struct lhb_peer_statistics *statistics_out);

/* ---- Merging a removed layer away (docs/internals/snapshots.md).
 *
 * 'volume' may be NULL when nothing serves the store.  All are blocking and
 * handle one range of at most LHB_MERGE_STEP_BYTES per call.
 * lower is the removed layer, upper its only child; both are layer ids. */
#define LHB_MERGE_STEP_BYTES 67108864

/* Copy what 'upper' lacks from 'lower' into 'upper', sync it, free it in
 * 'lower'.  'upper' may be the head.  Returns bytes copied. */
int64_t lhb_merge_up (lhb_volume *volume, lhb_store *store, int lower,
                      int upper, uint64_t offset_bytes, uint64_t length_bytes);
/* Copy what 'upper' has into 'lower' (nobody can see 'lower' there).  Returns
 * bytes copied.  Sync with lhb_merge_down_finish before any rename. */
int64_t lhb_merge_down (lhb_store *store, int lower, int upper,
                        uint64_t offset_bytes, uint64_t length_bytes);
int lhb_merge_down_finish (lhb_store *store, int lower, int upper);
/* Free in 'lower' what 'upper' hides.  Returns bytes freed. */
int64_t lhb_merge_prune (lhb_store *store, int lower, int upper,
                         uint64_t offset_bytes, uint64_t length_bytes);
/* After merge_down and the renames: reads of both layers now go to lower's
 * file, under upper's id; then 'lower' is forgotten.  */
int lhb_store_replace_layer (lhb_volume *volume, lhb_store *store, int lower,
                             int upper);
/* After merge_up: no block is read from 'lower' any more; forget it. */
int lhb_store_drop_layer (lhb_volume *volume, lhb_store *store, int lower);
/* Add a layer that is not in the live chain (a side branch), to merge there;
 * it never appears in the map.  Remove it with lhb_store_drop_layer. */
int lhb_store_add_side_layer (lhb_store *store, const char *image,
                              const char *discard);

/* Make a layer of 'target' equal to a layer of 'source' in some ranges, block
 * by block: data, holes and discards.  Ranges begin and end at multiples of
 * LHB_RANGE_STEP_BYTES, or end at the end of the layer; what lies beyond it
 * does not count.  Neither store serves.  Returns the bytes changed.  The
 * target's map is out of date afterwards: close and reopen it.  Blocking. */
#define LHB_RANGE_STEP_BYTES 32768
int64_t lhb_store_reconcile (lhb_store *source, int source_layer,
                             lhb_store *target, int target_layer,
                             const struct lhb_extent *ranges, uint32_t count);

/* ---- Units: pieces of frozen layers, for a rebuild (rebuild.md).
 *
 * All but open and close are blocking.  Offsets are multiples of
 * LHB_UNIT_BYTES.  Merges leave the layers alone meanwhile. */
#define LHB_UNIT_BYTES 1048576
typedef struct lhb_unit lhb_unit;

int lhb_unit_open (lhb_unit **unit_out);
void lhb_unit_close (lhb_unit *unit);
/* Read a unit of a layer that is not the head.  Returns the bytes of data it
 * has. */
int64_t lhb_unit_read (lhb_store *store, int layer, uint64_t offset_bytes,
                       lhb_unit *unit);
/* Make a layer equal to a unit there, after lhb_unit_begin.  'empty': it is
 * known to have no data there.  Returns the bytes changed. */
int64_t lhb_unit_write (lhb_store *store, int layer, uint64_t offset_bytes,
                        lhb_unit *unit, int empty);
/* Which blocks it has and has discarded, and unless 'shape_only' its data. */
uint64_t lhb_unit_hash (const lhb_unit *unit, int shape_only);
/* For the way to another host: two maps one after the other, which blocks it
 * has and which it discarded, LHB_UNIT_MAP_BYTES each, and the data, each
 * block at its place in LHB_UNIT_BYTES. */
#define LHB_UNIT_MAP_BYTES 32
uint8_t *lhb_unit_maps (lhb_unit *unit);
char *lhb_unit_data (lhb_unit *unit);
/* Before the first write to a layer: it becomes ours and gets this size. */
int lhb_unit_begin (lhb_store *store, int layer, uint64_t size_bytes);
int lhb_unit_sync (lhb_store *store, int layer);

/* ---- Volume: a replica set behind one range table. */

int lhb_volume_open (lhb_engine *engine, uint64_t size_bytes, uint32_t flags,
                     lhb_volume **volume_out);
/* Blocking: closes its connections and waits for what is in flight.  Stores
 * are not closed. */
void lhb_volume_close (lhb_volume *volume);
uint64_t lhb_volume_id (const lhb_volume *volume);
/* Publish the replica set.  'modes' has an LHB_MODE_* for each store, one of
 * them RW; NULL: all are RW.  Before the first request or with the volume
 * frozen.  -ENOTCONN: a peer among them has ended and the volume did not give
 * up, or one lacks a connection of some queue; the set is what it was. */
int lhb_volume_publish (lhb_volume *volume, lhb_store **stores,
                        const uint32_t *modes, uint32_t count);
/* Blocking: waits for all I/O in flight and keeps new I/O waiting. */
int lhb_volume_freeze (lhb_volume *volume);
void lhb_volume_thaw (lhb_volume *volume);
/* Volume frozen. */
int lhb_volume_resize (lhb_volume *volume, uint64_t size_bytes);
uint64_t lhb_volume_size_bytes (const lhb_volume *volume);
/* While the gate is shut, FLUSH and FUA wait: metadata they depend on is not
 * durable yet. */
void lhb_volume_gate_flushes (lhb_volume *volume, int shut);
/* The failed store has been named stale on stable storage by the others:
 * release the acknowledgements held for it. */
int lhb_volume_fenced (lhb_volume *volume, uint64_t store_id);
/* Nothing can be promised any more: what waits for a fence or for the gate,
 * and every request that ends from now on, ends with EIO. */
void lhb_volume_give_up (lhb_volume *volume);
/* One request from the calling thread, through the same path as NBD.
 * Blocking.  Any alignment. */
int lhb_volume_io (lhb_volume *volume, uint32_t op, uint32_t flags,
                   uint64_t offset_bytes, uint64_t length_bytes, void *data);
/* Allocation status of [offset, offset+length): 'count' pairs of (length,
 * NBD state flags), at most 'max'.  Returns the count. */
int lhb_volume_block_status (lhb_volume *volume, uint64_t offset_bytes,
                             uint64_t length_bytes, uint32_t *pairs_out,
                             uint32_t max);
void lhb_volume_statistics (const lhb_volume *volume,
                            struct lhb_statistics *statistics_out);

/* ---- FUSE: I/O of open files is answered here, the rest by a server
 * (docs/internals/fuse.md).
 *
 * 'kernel_fd' is /dev/fuse of a mount; 'server_fd' one end of a pair of
 * SOCK_SEQPACKET sockets whose other end the server takes for it.  Both belong
 * to the relay when this succeeds.  An engine has one relay: -EBUSY. */

int lhb_fuse_open (lhb_engine *engine, int kernel_fd, int server_fd,
                   lhb_fuse **fuse_out);
/* Readable when the kernel has ended the mount, and for good. */
int lhb_fuse_fd (const lhb_fuse *fuse);
/* From now on answer I/O of a file that the server is about to say is open.
 * 'flags' are LHB_FUSE_*.  When the volume closes its requests end with EIO.
 * -EMFILE: LHB_FUSE_FILES_MAX are open. */
int lhb_fuse_add_file (lhb_fuse *fuse, uint64_t handle, lhb_volume *volume,
                       uint32_t flags);
/* Blocking: its requests end first. */
void lhb_fuse_remove_file (lhb_fuse *fuse, uint64_t handle);
/* Blocking: requests in progress are answered, no other is read. */
void lhb_fuse_close (lhb_fuse *fuse);

/* ---- Dirty maps: what changed since a replica left
 * (docs/internals/activity-log.md).
 *
 * A store that is dropped gets a tracker by itself, whose id is the store's.
 * It begins empty, says nothing of what the store may have had in its page
 * cache only, and has every change that the store missed, those in flight
 * included, before it is answered.  Trackers outlive their stores, end with the volume,
 * and may be asked at any time from any thread.  -ENOENT: no such tracker;
 * whoever asked for a dropped store must take everything for changed. */
#define LHB_DIRTY_GRANULE_BYTES 65536

/* Begin a tracker by hand: for a store that Python is about to take out of the
 * set, as if it were dropped now (it may be tracked already); or, with
 * 'store_id' 0, under a new id.  -ENOSPC: too many.  -ENOENT: the store was dropped before, and there was no room for its map. */
int lhb_volume_track (lhb_volume *volume, uint64_t store_id,
                      uint64_t *tracker_id_out);
int lhb_volume_untrack (lhb_volume *volume, uint64_t tracker_id);
/* Changed granules that begin at or after offset_bytes, adjacent ones joined,
 * the last one cut at the end of the volume, at most 'max'.  Returns the count;
 * fewer than 'max' means the end was reached. */
int lhb_dirty_extents (lhb_volume *volume, uint64_t tracker_id,
                       uint64_t offset_bytes, struct lhb_extent *extents_out,
                       uint32_t max);
/* A range changed, for example in an earlier life of the volume. */
int lhb_dirty_mark (lhb_volume *volume, uint64_t tracker_id,
                    uint64_t offset_bytes, uint64_t length_bytes);
/* The granules inside a range are equal again.  A change that ends after this
 * call sets them again, so clear first and compare then; what was not
 * compared in the end is marked again. */
int lhb_dirty_clear (lhb_volume *volume, uint64_t tracker_id,
                     uint64_t offset_bytes, uint64_t length_bytes);

/* ---- Activity log: where replicas may differ after a crash
 * (docs/internals/activity-log.md).
 *
 * A bit for each extent of LHB_ACTIVITY_EXTENT_BYTES; the last of
 * LHB_ACTIVITY_BITMAP_BYTES * 8 stands for the rest of a volume. */
#define LHB_ACTIVITY_EXTENT_BYTES 4194304
#define LHB_ACTIVITY_PAGE_BYTES 4096
#define LHB_ACTIVITY_PAGES_MAX 126
#define LHB_ACTIVITY_BITMAP_BYTES 508032
#define LHB_ACTIVITY_ID_BYTES 16

struct lhb_activity_state {
  uint64_t sequence;                /* of the last transaction */
  uint64_t coolings;                /* transactions that turned extents cold */
  uint32_t pages, pages_lost;       /* lost ones: all of their bits are set */
};

/* Bytes of the file of a volume. */
uint64_t lhb_activity_file_bytes (uint64_t size_bytes);
/* A log in which all is cold; 'file_out' has lhb_activity_file_bytes. */
void lhb_activity_encode (const uint8_t *id, uint64_t size_bytes,
                          char *file_out);
/* Add what a file says to a bitmap of LHB_ACTIVITY_BITMAP_BYTES.  Nothing in
 * it is believed but pages of this id. */
void lhb_activity_decode (const char *file, uint64_t length_bytes,
                          const uint8_t *id, uint64_t size_bytes,
                          uint64_t *bitmap_io,
                          struct lhb_activity_state *state_out);
/* The hot ranges at and after offset_bytes, which is the end of an extent or
 * 0: adjacent ones joined, the last one cut at the end of the volume, at most
 * 'max'.  Returns the count. */
uint32_t lhb_activity_ranges (const uint64_t *bitmap, uint64_t size_bytes,
                              uint64_t offset_bytes,
                              struct lhb_extent *ranges_out, uint32_t max);

/* From now on record changes, while there are two stores or more, whose
 * directories have an empty log of this id.  Before the first request. */
int lhb_volume_activity_start (lhb_volume *volume, const uint8_t *id);
/* Blocking: when it returns 0 every store that is published has the whole log.
 */
int lhb_volume_activity_write (lhb_volume *volume);
/* Blocking: flush, and let extents turn cold that were not changed since the
 * last call.  Returns how many. */
int64_t lhb_volume_activity_cool (lhb_volume *volume);
/* Hot extents, now. */
uint64_t lhb_volume_activity_hot (lhb_volume *volume);

/* ---- NBD transmission phase.
 *
 * The socket is past its handshake.  On success it belongs to the core, which
 * closes it and posts LHB_EVENT_CONNECTION_CLOSED. */
int lhb_nbd_attach (lhb_volume *volume, int socket_fd, uint32_t flags,
                    uint32_t base_allocation_id, uint64_t *connection_id_out);
/* The same for the data connection of an engine to this replica, whose store
 * is the volume's only one (native/include/lhb_replica_wire.h). */
int lhb_replica_attach (lhb_volume *volume, int socket_fd,
                        uint64_t *connection_id_out);
/* Its requests end, their replies are dropped.  -ENOENT: gone already. */
int lhb_connection_close (lhb_volume *volume, uint64_t connection_id);

/* ---- Fault points (tests): off unless armed. */

/* The next 'times' passes of 'point' after 'skip' ones fail with 'error'
 * (errno).  'store_id' 0 means any store.  -ENOENT: no such point. */
int lhb_fault_arm (const char *point, int error, uint64_t store_id,
                   uint64_t skip, uint64_t times);
void lhb_fault_clear (void);
