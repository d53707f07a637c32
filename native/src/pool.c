/* Worker pool: threads that may block, so that queue threads need not.
 *
 * One thread always lives; it is started with the pool, so a job never waits
 * for memory the kernel does not have.  Others come with the backlog and end
 * when they were idle for a while.  An ended thread must be joined by
 * somebody: the next one to end does it, and lhb_pool_close joins the last.
 */
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <time.h>

#include "lhb_io.h"
#include "lhb_limits.h"
#include "lhb_queue.h"

#define POOL_IDLE_MS 10000
#define POOL_STACK_BYTES (256u << 10)

struct lhb_pool {
  pthread_mutex_t lock;
  pthread_cond_t work;                  /* a job came, or the pool closes */
  pthread_cond_t ended;                 /* the last thread went */
  struct lhb_job *first, **last_next;   /* backlog, oldest first */
  uint32_t backlog;
  uint32_t threads, threads_max;
  uint32_t starting;                    /* of 'threads': not yet running */
  uint32_t idle;                        /* of 'threads': in pool_wait */
  uint32_t idle_ms;
  bool closing;
  bool has_unjoined;
  pthread_t unjoined;                   /* ended, not yet joined */
};

static void
deadline_after_ms (uint32_t ms, struct timespec *deadline_out)
{
  clock_gettime (CLOCK_MONOTONIC, deadline_out);
  deadline_out->tv_sec += ms / 1000;
  deadline_out->tv_nsec += (long) (ms % 1000) * 1000000;
  if (deadline_out->tv_nsec >= 1000000000)
    {
      deadline_out->tv_sec++;
      deadline_out->tv_nsec -= 1000000000;
    }
}

/* Wait for the next job, with the lock held.  NULL: this thread is to end. */
static struct lhb_job *
pool_wait (struct lhb_pool *pool)
{
  struct timespec deadline;
  struct lhb_job *job;
  int status = 0;

  deadline_after_ms (pool->idle_ms, &deadline);
  while (pool->first == NULL)
    {
      if (pool->closing || (status == ETIMEDOUT && pool->threads > 1))
        return NULL;
      pool->idle++;
      /* The last thread has nothing to time out for. */
      if (pool->threads > 1 && status == 0)
        status = pthread_cond_timedwait (&pool->work, &pool->lock, &deadline);
      else
        pthread_cond_wait (&pool->work, &pool->lock);
      pool->idle--;
    }

  job = pool->first;
  pool->first = job->next;
  if (pool->first == NULL)
    pool->last_next = &pool->first;
  pool->backlog--;
  job->next = NULL;
  return job;
}

/* After 'run' the job is its owner's again as soon as 'done' is posted. */
static void
pool_run (struct lhb_job *job)
{
  job->run (job);
  if (job->queue != NULL)
    lhb_queue_post (job->queue, &job->done);
  else
    job->done.handle (&job->done);
}

static void *
pool_thread (void *argument)
{
  struct lhb_pool *pool = argument;
  struct lhb_job *job;
  pthread_t before;
  bool has_before;

  pthread_setname_np (pthread_self (), "lhb-worker");
  pthread_mutex_lock (&pool->lock);
  pool->starting--;
  while ((job = pool_wait (pool)) != NULL)
    {
      pthread_mutex_unlock (&pool->lock);
      pool_run (job);
      pthread_mutex_lock (&pool->lock);
    }

  has_before = pool->has_unjoined;
  before = pool->unjoined;
  pool->unjoined = pthread_self ();
  pool->has_unjoined = true;
  pool->threads--;
  if (pool->threads == 0)
    pthread_cond_signal (&pool->ended);
  pthread_mutex_unlock (&pool->lock);
  if (has_before)
    pthread_join (before, NULL);
  return NULL;
}

/* Start the thread that was counted in 'threads' and 'starting' already.  It
 * is born with all signals blocked: they are for the Python threads.
 */
static int
pool_start_thread (struct lhb_pool *pool)
{
  pthread_attr_t attributes;
  sigset_t all, before;
  pthread_t thread;
  int status;

  status = pthread_attr_init (&attributes);
  if (status != 0)
    return -status;
  pthread_attr_setstacksize (&attributes, POOL_STACK_BYTES);
  sigfillset (&all);
  pthread_sigmask (SIG_SETMASK, &all, &before);
  status = pthread_create (&thread, &attributes, pool_thread, pool);
  pthread_sigmask (SIG_SETMASK, &before, NULL);
  pthread_attr_destroy (&attributes);
  return -status;
}

int
lhb_pool_open (uint32_t workers_max, struct lhb_pool **pool_out)
{
  pthread_condattr_t attributes;
  struct lhb_pool *pool;
  int result;

  if (workers_max < 1 || workers_max > LHB_WORKERS_MAX)
    return -EINVAL;
  pool = calloc (1, sizeof *pool);
  if (pool == NULL)
    return -ENOMEM;
  pthread_mutex_init (&pool->lock, NULL);
  pthread_condattr_init (&attributes);
  pthread_condattr_setclock (&attributes, CLOCK_MONOTONIC);
  pthread_cond_init (&pool->work, &attributes);
  pthread_cond_init (&pool->ended, &attributes);
  pthread_condattr_destroy (&attributes);
  pool->last_next = &pool->first;
  pool->threads_max = workers_max;
  pool->idle_ms = POOL_IDLE_MS;

  pool->threads = pool->starting = 1;
  result = pool_start_thread (pool);
  if (result < 0)
    {
      pthread_cond_destroy (&pool->work);
      pthread_cond_destroy (&pool->ended);
      pthread_mutex_destroy (&pool->lock);
      free (pool);
      return result;
    }
  *pool_out = pool;
  return 0;
}

/* Nobody submits any more.  What is left in the backlog is run: a helper that
 * came too late for its batch may still be there. */
void
lhb_pool_close (struct lhb_pool *pool)
{
  pthread_mutex_lock (&pool->lock);
  pool->closing = true;
  pthread_cond_broadcast (&pool->work);
  while (pool->threads > 0)
    pthread_cond_wait (&pool->ended, &pool->lock);
  pthread_mutex_unlock (&pool->lock);

  /* Each ended thread joins the one before it, so this joins them all. */
  assert (pool->has_unjoined);
  pthread_join (pool->unjoined, NULL);
  pthread_cond_destroy (&pool->work);
  pthread_cond_destroy (&pool->ended);
  pthread_mutex_destroy (&pool->lock);
  free (pool);
}

void
lhb_pool_submit (struct lhb_pool *pool, struct lhb_job *job)
{
  bool start;

  job->next = NULL;
  pthread_mutex_lock (&pool->lock);
  assert (!pool->closing);
  *pool->last_next = job;
  pool->last_next = &job->next;
  pool->backlog++;
  /* Idle threads that were signalled but did not run yet still count as idle;
   * their jobs still count in the backlog, so the comparison holds. */
  start = pool->backlog > pool->idle + pool->starting
          && pool->threads < pool->threads_max;
  if (start)
    {
      pool->threads++;
      pool->starting++;
    }
  else if (pool->idle > 0)
    pthread_cond_signal (&pool->work);
  pthread_mutex_unlock (&pool->lock);

  /* Failing is harmless: the threads there are will come to the job. */
  if (start && pool_start_thread (pool) < 0)
    {
      pthread_mutex_lock (&pool->lock);
      pool->threads--;
      pool->starting--;
      pthread_cond_signal (&pool->work);
      pthread_mutex_unlock (&pool->lock);
    }
}

uint32_t
lhb_pool_threads (struct lhb_pool *pool)
{
  uint32_t threads;

  pthread_mutex_lock (&pool->lock);
  threads = pool->threads;
  pthread_mutex_unlock (&pool->lock);
  return threads;
}

void
lhb_pool_set_idle_ms (struct lhb_pool *pool, uint32_t idle_ms)
{
  pthread_mutex_lock (&pool->lock);
  pool->idle_ms = idle_ms;
  pthread_mutex_unlock (&pool->lock);
}

void
lhb_io_execute (struct lhb_io *io)
{
  uint32_t done_bytes = 0;
  int error = 0;

  assert (io->length_bytes > 0 && io->length_bytes <= INT32_MAX);
  while (done_bytes < io->length_bytes)
    {
      struct iovec iov = { (char *) io->buffer + done_bytes,
                           io->length_bytes - done_bytes };
      off_t offset = (off_t) (io->offset_bytes + done_bytes);
      ssize_t got;

      if (io->op == LHB_IO_PREAD)
        got = preadv2 (io->fd, &iov, 1, offset, io->rw_flags);
      else
        got = pwritev2 (io->fd, &iov, 1, offset, io->rw_flags);
      if (got == -1 && errno == EINTR)
        continue;
      if (got <= 0)
        {
          /* No file takes zero bytes of a write; a loop would not end. */
          error = got == -1 ? errno : io->op == LHB_IO_PWRITE ? EIO : 0;
          break;
        }
      done_bytes += (uint32_t) got;
    }
  io->result = done_bytes > 0 ? (int32_t) done_bytes : -error;
}
