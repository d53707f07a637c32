/* Every bound of the native core, in one place. */
#ifndef LHB_LIMITS_H
#define LHB_LIMITS_H

#define LHB_BLOCK_SHIFT 12
#define LHB_QUEUES_MAX 64
#define LHB_WORKERS_MAX 64
#define LHB_EVENTS_MAX 1024             /* records of the event ring */

/* A request is executed in pieces of at most this many bytes, so one slab of
 * this size (plus the two partial blocks at its ends) holds any piece. */
#define LHB_PIECE_BYTES_MAX (1u << 20)
/* Largest READ or WRITE announced to NBD clients. */
#define LHB_NBD_PAYLOAD_MAX (32u << 20)
/* A refused WRITE up to this size is read and thrown away; beyond it the
 * connection is closed. */
#define LHB_NBD_SKIP_MAX (64u << 20)
#define LHB_NBD_EXTENTS_MAX 1000        /* descriptors of one block status */

/* Buffers and requests of one connection.  They are its own, so a client
 * that stalls holds nobody else's memory. */
#define LHB_CONN_REQUESTS 256
#define LHB_CONN_SLABS_SMALL 256        /* 2 blocks each */
#define LHB_CONN_SLABS_MEDIUM 64        /* 33 blocks each: 128 KiB anywhere */
#define LHB_CONN_SLABS_LARGE 16         /* 257 blocks each: 1 MiB anywhere */
#define LHB_CONN_RECEIVE_BYTES (256u << 10)
#define LHB_CONN_SEND_IOV_MAX 128
#define LHB_TURN_RECEIVES_MAX 4         /* recv calls a connection has a turn */

#define LHB_REQUEST_IOS_MAX 8           /* system calls in flight per request */
#define LHB_URING_ENTRIES 256           /* per queue */
#define LHB_EPOLL_EVENTS 64

#define LHB_RANGE_SHARDS 64
#define LHB_RANGE_REGION_SHIFT 8        /* blocks: 1 MiB regions */
#define LHB_MAP_CHUNK_SHIFT 15          /* blocks: 128 MiB chunks */
#define LHB_MAP_STRIPES 64

/* A buffered write slower than this sends the store's writes to the driver
 * for LHB_SLOW_PENALTY_NS, so that a throttled disk does not stall a queue. */
#define LHB_SLOW_WRITE_NS 5000000ull
#define LHB_SLOW_PENALTY_NS 200000000ull

#endif
