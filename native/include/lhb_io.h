/* Messages, jobs and single I/O operations.
 *
 * A message is a call that runs in a queue's thread.  A job is a blocking
 * function that runs in the worker pool and whose completion is a message.
 * An io is one pread or pwrite of a data file, done by io_uring where the
 * engine uses it and by a job otherwise; its completion runs in its queue's
 * thread in both cases.
 */
#ifndef LHB_IO_H
#define LHB_IO_H

#include <stdint.h>

struct lhb_queue;
struct lhb_engine;

struct lhb_message {
  struct lhb_message *next;
  void (*handle) (struct lhb_message *message);
};

struct lhb_job {
  struct lhb_job *next;
  void (*run) (struct lhb_job *job);    /* in a worker; may block */
  struct lhb_message done;              /* posted to 'queue' afterwards */
  struct lhb_queue *queue;              /* NULL: 'done.handle' is called in the
                                           worker itself */
};

enum lhb_io_op { LHB_IO_PREAD, LHB_IO_PWRITE };

struct lhb_io {
  struct lhb_job job;                   /* used by the pool driver */
  struct lhb_queue *queue;
  void (*done) (struct lhb_io *io);     /* in the queue's thread */
  void *buffer;
  uint64_t offset_bytes;
  uint32_t length_bytes;
  int fd;
  enum lhb_io_op op;
  int rw_flags;                         /* RWF_DSYNC, ... */
  int32_t result;                       /* bytes, or -errno */
};

/* Worker pool.  Threads are started when work waits, up to 'workers_max', and
 * end after some idle seconds.  Submitting never fails and never blocks; the
 * backlog is bounded because every job belongs to a request slot. */
struct lhb_pool;
int lhb_pool_open (uint32_t workers_max, struct lhb_pool **pool_out);
void lhb_pool_close (struct lhb_pool *pool);    /* after the last submit */
void lhb_pool_submit (struct lhb_pool *pool, struct lhb_job *job);
uint32_t lhb_pool_threads (struct lhb_pool *pool);      /* alive now */
/* How long a thread waits for work before it ends; for those not yet waiting. */
void lhb_pool_set_idle_ms (struct lhb_pool *pool, uint32_t idle_ms);

/* io_uring of one queue; used by that queue's thread only. */
struct lhb_uring;
int lhb_uring_open (uint32_t entries, struct lhb_uring **uring_out);
void lhb_uring_close (struct lhb_uring *uring); /* nothing in flight */
int lhb_uring_fd (const struct lhb_uring *uring);       /* for epoll */
/* 0, or -EAGAIN when 'entries' are in flight. */
int lhb_uring_prepare (struct lhb_uring *uring, struct lhb_io *io);
/* 0, or -errno with some ios still unsubmitted: call it again soon. */
int lhb_uring_submit (struct lhb_uring *uring);
/* Prepared ios that a submit has yet to hand over.  Do not sleep while there
 * are any: no completion may be on its way to wake you. */
uint32_t lhb_uring_unsubmitted (const struct lhb_uring *uring);
/* Call 'done' of every completed io.  Returns how many. */
unsigned lhb_uring_reap (struct lhb_uring *uring);
uint32_t lhb_uring_in_flight (const struct lhb_uring *uring);

/* In queue.c.  Start an io from its queue's thread: io_uring if the queue has
 * one with room, else the pool. */
void lhb_io_start (struct lhb_io *io);
/* One blocking execution, short transfers continued, EINTR retried: sets
 * io->result to the bytes transferred before an error or end of file, or
 * -errno when none were. */
void lhb_io_execute (struct lhb_io *io);

#endif
