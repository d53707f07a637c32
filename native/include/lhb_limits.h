/* Every bound of the native core, in one place. */
#ifndef LHB_LIMITS_H
#define LHB_LIMITS_H

#define LHB_BLOCK_SHIFT 12
#define LHB_QUEUES_MAX 64
#define LHB_WORKERS_MAX 64
#define LHB_EVENTS_MAX 1024             /* records of the event ring */

/* Largest READ or WRITE; announced to NBD clients. */
#define LHB_PAYLOAD_BYTES_MAX (32u << 20)
/* Blocks that the largest one touches, if its ends are inside blocks. */
#define LHB_SPAN_BLOCKS_MAX 8193
/* A refused WRITE up to this size is read and thrown away; beyond it the
 * connection is closed. */
#define LHB_SKIP_BYTES_MAX (64u << 20)
#define LHB_NBD_EXTENTS_MAX 1000        /* descriptors of one block status */

/* Buffers and requests of one connection.  They are its own, so a client
 * that stalls holds nobody else's memory. */
#define LHB_CONN_REQUESTS 256
#define LHB_CONN_SLAB_CLASSES 5
/* (blocks of a slab, slabs): any request of 4 KiB, 128 KiB, 1 MiB, 4 MiB and
 * LHB_PAYLOAD_BYTES_MAX at any alignment fits its class.  Address space only:
 * untouched slabs cost no memory. */
#define LHB_CONN_SLAB_TABLE                                                   \
  { { 2, 256 }, { 33, 64 }, { 257, 16 }, { 1025, 8 }, { 8193, 1 } }
#define LHB_CONN_RECEIVE_BYTES (256u << 10)
#define LHB_CONN_SEND_IOV_MAX 128
#define LHB_TURN_RECEIVES_MAX 4         /* recv calls a connection has a turn */

/* Remote replicas.  Frames in flight on one connection; what does not fit
 * waits, and each that waits belongs to a request slot. */
#define LHB_PEER_IN_FLIGHT_MAX 128
#define LHB_PEER_CONNECTIONS_MAX 8      /* of one queue to one peer */
#define LHB_PEER_RECEIVE_BYTES (256u << 10)
#define LHB_PEER_TEXT_BYTES_MAX 4096    /* of an error */
#define LHB_PEER_SEND_IOV_MAX 128
#define LHB_PEER_ZERO_BYTES (1u << 20)  /* one write of zeros */
/* A peer is as far away as so many bytes waiting at a local disk. */
#define LHB_PEER_FARTHER_BYTES (1u << 20)
#define LHB_PEER_TIMEOUT_MS_MAX 3600000u

/* FUSE.  Requests in flight of one queue, and read in one turn of it. */
#define LHB_FUSE_SLOTS 32
#define LHB_FUSE_TURN_MAX 8
#define LHB_FUSE_BACKGROUND_MAX 64      /* asynchronous ones, told to the kernel */
#define LHB_FUSE_MESSAGE_BYTES (256u << 10)     /* to and from the server */
#define LHB_FUSE_OPENS 64               /* being opened by the server */
#define LHB_FUSE_RETRY_NS 1000000ull    /* while the server's socket is full */
#define LHB_FUSE_SEEK_BYTES (1ull << 30)        /* looked through with one claim */

#define LHB_REQUEST_IOS_MAX 8           /* system calls in flight per request */
/* Larger page-cache copies leave the queue thread for the driver, so that two
 * cores copy at once and small requests do not wait behind them. */
#define LHB_INLINE_BYTES_MAX (128u << 10)
/* A write call makes page-cache folios of up to its own size, and ext4 walks
 * all buffers of a folio at every later write of 4 KiB into it: 25 us for a
 * folio of 2 MiB, 4 us for one of this size. */
#define LHB_FOLIO_BYTES_MAX (64u << 10)
#define LHB_ZERO_STEP_BYTES (64u << 20) /* one fallocate call */
#define LHB_URING_ENTRIES 256           /* per queue */
#define LHB_EPOLL_EVENTS 64

/* A queue that had something to do stays awake for so long before it sleeps:
 * waking an idle CPU costs more than the request that comes next. */
#define LHB_AWAKE_NS 50000ull
/* And for so long while the kernel has I/O of it.  Otherwise client and disk
 * fall into step: all requests of a client go out together, their replies come
 * back together, and one of the two always waits for the other. */
#define LHB_AWAKE_IN_FLIGHT_NS 1000000ull

#define LHB_RANGE_SHARDS 64
#define LHB_RANGE_REGION_SHIFT 8        /* blocks: 1 MiB regions */
#define LHB_MAP_CHUNK_SHIFT 15          /* blocks: 128 MiB chunks */
#define LHB_MAP_STRIPES 64

#define LHB_TRACKERS_MAX 16             /* replicas away from one volume */
#define LHB_DIRTY_CHUNK_SHIFT 15        /* granules: 2 GiB, 4 KiB of memory */

/* Extents that are heated together, at most: twice as many as before when the
 * transaction before began less than LHB_ACTIVITY_BUSY_NS ago, half as many
 * for each LHB_ACTIVITY_CALM_NS that it is ago. */
#define LHB_ACTIVITY_WIDTH_MAX 256u
#define LHB_ACTIVITY_BUSY_NS 10000000ull
#define LHB_ACTIVITY_CALM_NS 100000000ull
#define LHB_ACTIVITY_NAME "lhblock.activity"

/* A buffered write slower than this sends the store's writes to the driver
 * for LHB_SLOW_PENALTY_NS, so that a throttled disk does not stall a queue. */
#define LHB_SLOW_WRITE_NS 20000000ull
#define LHB_SLOW_PENALTY_NS 100000000ull

#endif
