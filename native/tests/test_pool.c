/* The worker pool, and the blocking execution of one io.
 *
 * preadv2() and pwritev2() are defined here and stand before those of libc, so
 * that short and interrupted transfers come when a test wants them.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "lhb_io.h"
#include "lhb_limits.h"
#include "lhb_test.h"

/* ---- What the pool does. */

struct counted_job {
  struct lhb_job job;                   /* first */
  _Atomic int runs, dones;
};

static _Atomic int jobs_done;

static void
counted_run (struct lhb_job *job)
{
  ((struct counted_job *) job)->runs++;
}

static void
counted_done (struct lhb_message *message)
{
  char *job = (char *) message - offsetof (struct counted_job, job.done);

  ((struct counted_job *) job)->dones++;
  jobs_done++;
}

#define SUBMITTERS 4
#define JOBS_EACH 2500

struct submitter {
  struct lhb_pool *pool;
  struct counted_job jobs[JOBS_EACH];
};

static void *
submit_all (void *argument)
{
  struct submitter *submitter = argument;

  for (int i = 0; i < JOBS_EACH; i++)
    {
      submitter->jobs[i].job.run = counted_run;
      submitter->jobs[i].job.done.handle = counted_done;
      lhb_pool_submit (submitter->pool, &submitter->jobs[i].job);
    }
  return NULL;
}

static void
every_job_runs_once_and_is_reported_once (void)
{
  static struct submitter submitters[SUBMITTERS];
  pthread_t threads[SUBMITTERS];
  struct lhb_pool *pool;

  CHECK_EQUAL (lhb_pool_open (8, &pool), 0);
  for (int i = 0; i < SUBMITTERS; i++)
    {
      submitters[i].pool = pool;
      CHECK_EQUAL (pthread_create (&threads[i], NULL, submit_all,
                                   &submitters[i]), 0);
    }
  for (int i = 0; i < SUBMITTERS; i++)
    CHECK_EQUAL (pthread_join (threads[i], NULL), 0);
  while (jobs_done < SUBMITTERS * JOBS_EACH)
    sched_yield ();
  CHECK (lhb_pool_threads (pool) <= 8);
  lhb_pool_close (pool);
  for (int i = 0; i < SUBMITTERS; i++)
    for (int j = 0; j < JOBS_EACH; j++)
      {
        CHECK_EQUAL (submitters[i].jobs[j].runs, 1);
        CHECK_EQUAL (submitters[i].jobs[j].dones, 1);
      }
}

struct meeting_job {
  struct lhb_job job;                   /* first */
  sem_t *arrived, *leave;
};

static void
meeting_run (struct lhb_job *job)
{
  struct meeting_job *meeting = (struct meeting_job *) job;

  sem_post (meeting->arrived);
  while (sem_wait (meeting->leave) == -1)
    CHECK_EQUAL (errno, EINTR);
}

static void
meeting_done (struct lhb_message *message)
{
  (void) message;
  jobs_done++;
}

static void
submit_meeting (struct lhb_pool *pool, struct meeting_job *jobs, int count,
                sem_t *arrived, sem_t *leave)
{
  jobs_done = 0;
  for (int i = 0; i < count; i++)
    {
      jobs[i] = (struct meeting_job) { .arrived = arrived, .leave = leave };
      jobs[i].job.run = meeting_run;
      jobs[i].job.done.handle = meeting_done;
      lhb_pool_submit (pool, &jobs[i].job);
    }
}

/* Eight jobs that block, three threads: three of them meet, and the others
 * come after them.
 */
static void
blocked_jobs_get_threads_up_to_the_limit (void)
{
  struct meeting_job jobs[8];
  struct lhb_pool *pool;
  sem_t arrived, leave;

  sem_init (&arrived, 0, 0);
  sem_init (&leave, 0, 0);
  CHECK_EQUAL (lhb_pool_open (3, &pool), 0);
  CHECK_EQUAL (lhb_pool_threads (pool), 1);
  submit_meeting (pool, jobs, 8, &arrived, &leave);
  for (int i = 0; i < 3; i++)
    CHECK_EQUAL (sem_wait (&arrived), 0);
  CHECK_EQUAL (lhb_pool_threads (pool), 3);
  CHECK_EQUAL (sem_trywait (&arrived), -1);
  for (int i = 0; i < 8; i++)
    sem_post (&leave);
  while (jobs_done < 8)
    sched_yield ();
  CHECK_EQUAL (lhb_pool_threads (pool), 3);
  lhb_pool_close (pool);
  sem_destroy (&arrived);
  sem_destroy (&leave);
}

static void
idle_threads_end_but_for_one (void)
{
  struct meeting_job jobs[8];
  struct lhb_pool *pool;
  sem_t arrived, leave;

  sem_init (&arrived, 0, 0);
  sem_init (&leave, 0, 0);
  CHECK_EQUAL (lhb_pool_open (8, &pool), 0);
  lhb_pool_set_idle_ms (pool, 1);
  for (int round = 0; round < 3; round++)
    {
      submit_meeting (pool, jobs, 8, &arrived, &leave);
      for (int i = 0; i < 8; i++)
        CHECK_EQUAL (sem_wait (&arrived), 0);
      CHECK_EQUAL (lhb_pool_threads (pool), 8);
      for (int i = 0; i < 8; i++)
        sem_post (&leave);
      while (lhb_pool_threads (pool) > 1)
        sched_yield ();
      CHECK_EQUAL (jobs_done, 8);
    }
  lhb_pool_close (pool);
  sem_destroy (&arrived);
  sem_destroy (&leave);
}

static void
close_waits_for_the_job_that_runs (void)
{
  struct meeting_job job;
  struct lhb_pool *pool;
  sem_t arrived, leave;

  sem_init (&arrived, 0, 0);
  sem_init (&leave, 0, 1);
  CHECK_EQUAL (lhb_pool_open (1, &pool), 0);
  submit_meeting (pool, &job, 1, &arrived, &leave);
  CHECK_EQUAL (sem_wait (&arrived), 0);
  lhb_pool_close (pool);
  CHECK_EQUAL (jobs_done, 1);
  sem_destroy (&arrived);
  sem_destroy (&leave);
}

struct self_job {
  struct lhb_job job;                   /* first */
  sigset_t blocked;
  char name[16];
};

static void
self_run (struct lhb_job *job)
{
  struct self_job *self = (struct self_job *) job;

  pthread_sigmask (SIG_SETMASK, NULL, &self->blocked);
  pthread_getname_np (pthread_self (), self->name, sizeof self->name);
}

static void
workers_take_no_signals_and_have_a_name (void)
{
  struct self_job self = { .job = { .run = self_run } };
  struct lhb_pool *pool;
  sigset_t mine;

  self.job.done.handle = meeting_done;
  jobs_done = 0;
  CHECK_EQUAL (lhb_pool_open (1, &pool), 0);
  lhb_pool_submit (pool, &self.job);
  while (jobs_done == 0)
    sched_yield ();
  lhb_pool_close (pool);
  CHECK_EQUAL (strcmp (self.name, "lhb-worker"), 0);
  CHECK_EQUAL (sigismember (&self.blocked, SIGINT), 1);
  CHECK_EQUAL (sigismember (&self.blocked, SIGTERM), 1);
  CHECK_EQUAL (sigismember (&self.blocked, SIGUSR1), 1);
  pthread_sigmask (SIG_SETMASK, NULL, &mine);
  CHECK_EQUAL (sigismember (&mine, SIGINT), 0);
}

static void
pool_refuses_wrong_sizes (void)
{
  struct lhb_pool *pool;

  CHECK_EQUAL (lhb_pool_open (0, &pool), -EINVAL);
  CHECK_EQUAL (lhb_pool_open (LHB_WORKERS_MAX + 1, &pool), -EINVAL);
}

/* ---- What lhb_io_execute does. */

#define CALLS_MAX 8

static int script[CALLS_MAX];           /* bytes to allow, or -errno; 0: all */
static int script_calls;
static int script_flags;

static ssize_t
scripted (long number, int fd, const struct iovec *iov, off_t offset,
          int flags)
{
  struct iovec one = *iov;
  int step = 0;

  if (script_calls < CALLS_MAX)
    step = script[script_calls];
  script_calls++;
  script_flags = flags;
  if (step < 0)
    {
      errno = -step;
      return -1;
    }
  if (step > 0 && (size_t) step < one.iov_len)
    one.iov_len = (size_t) step;
  return syscall (number, fd, &one, 1, offset, 0, flags);
}

ssize_t
preadv2 (int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
  CHECK_EQUAL (count, 1);
  return scripted (SYS_preadv2, fd, iov, offset, flags);
}

ssize_t
pwritev2 (int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
  CHECK_EQUAL (count, 1);
  return scripted (SYS_pwritev2, fd, iov, offset, flags);
}

static int32_t
execute (enum lhb_io_op op, int fd, void *buffer, uint32_t length_bytes,
         uint64_t offset_bytes, int rw_flags)
{
  struct lhb_io io = {
    .op = op, .fd = fd, .buffer = buffer, .length_bytes = length_bytes,
    .offset_bytes = offset_bytes, .rw_flags = rw_flags, .result = 12345,
  };

  script_calls = 0;
  lhb_io_execute (&io);
  return io.result;
}

static void
set_script (int a, int b, int c, int d)
{
  memset (script, 0, sizeof script);
  script[0] = a;
  script[1] = b;
  script[2] = c;
  script[3] = d;
}

static void
short_and_interrupted_transfers_are_continued (void)
{
  int fd = memfd_create ("x", MFD_CLOEXEC);
  char bytes[1000], got[1000] = { 0 };

  for (size_t i = 0; i < sizeof bytes; i++)
    bytes[i] = (char) (i * 7);
  set_script (-EINTR, 1, 300, -EINTR);
  CHECK_EQUAL (execute (LHB_IO_PWRITE, fd, bytes, 1000, 50, RWF_DSYNC), 1000);
  CHECK_EQUAL (script_calls, 5);
  CHECK_EQUAL (script_flags, RWF_DSYNC);
  set_script (999, -EINTR, 0, 0);
  CHECK_EQUAL (execute (LHB_IO_PREAD, fd, got, 1000, 50, 0), 1000);
  CHECK_EQUAL (script_calls, 3);
  CHECK_EQUAL (memcmp (bytes, got, 1000), 0);
  close (fd);
}

static void
result_counts_what_came_before_an_error_or_the_end (void)
{
  int fd = memfd_create ("x", MFD_CLOEXEC);
  char bytes[1000] = { 0 };

  set_script (400, -ENOSPC, 0, 0);
  CHECK_EQUAL (execute (LHB_IO_PWRITE, fd, bytes, 1000, 0, 0), 400);
  set_script (-ENOSPC, 0, 0, 0);
  CHECK_EQUAL (execute (LHB_IO_PWRITE, fd, bytes, 1000, 0, 0), -ENOSPC);
  set_script (0, 0, 0, 0);
  CHECK_EQUAL (execute (LHB_IO_PREAD, fd, bytes, 1000, 100, 0), 300);
  CHECK_EQUAL (execute (LHB_IO_PREAD, fd, bytes, 1000, 400, 0), 0);
  CHECK_EQUAL (execute (LHB_IO_PREAD, -1, bytes, 1000, 0, 0), -EBADF);
  set_script (-EAGAIN, 0, 0, 0);
  CHECK_EQUAL (execute (LHB_IO_PREAD, fd, bytes, 400, 0, RWF_NOWAIT), -EAGAIN);
  close (fd);
}

static const struct lhb_test tests[] = {
  LHB_TEST (every_job_runs_once_and_is_reported_once),
  LHB_TEST (blocked_jobs_get_threads_up_to_the_limit),
  LHB_TEST (idle_threads_end_but_for_one),
  LHB_TEST (close_waits_for_the_job_that_runs),
  LHB_TEST (workers_take_no_signals_and_have_a_name),
  LHB_TEST (pool_refuses_wrong_sizes),
  LHB_TEST (short_and_interrupted_transfers_are_continued),
  LHB_TEST (result_counts_what_came_before_an_error_or_the_end),
};

LHB_TEST_MAIN (tests)
