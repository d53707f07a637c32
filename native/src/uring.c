/* io_uring of one queue: reads and writes of data files without a thread each.
 *
 * Whoever opens the ring need not be the one who uses it: the ring is made
 * disabled and enabled at the first submission, so that the queue's thread and
 * not the opener becomes its single issuer.  The kernel wakes that thread for
 * completions even out of epoll_wait(), which then may return EINTR.  Ring
 * descriptors are close-on-exec by the kernel's own choice.
 */
#include <errno.h>

#include "lhb_io.h"

#ifdef LHB_HAVE_URING

#include <assert.h>
#include <fcntl.h>
#include <signal.h>
#include <liburing.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define URING_ENTRIES_MAX 4096
#define URING_REAP_BATCH 32
#define URING_SUBMIT_TRIES_MAX 1000     /* while the kernel lacks memory */

struct lhb_uring {
  struct io_uring ring;
  uint32_t entries;
  uint32_t in_flight;                   /* prepared, 'done' not yet called */
  bool enabled;
};

/* From the best to what every kernel with io_uring knows. */
static const unsigned uring_setup_flags[] = {
  IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN
    | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_R_DISABLED,       /* 6.0 */
  IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN,            /* 5.19 */
  0,
};

int
lhb_uring_open (uint32_t entries, struct lhb_uring **uring_out)
{
  struct lhb_uring *uring;
  int result = -EINVAL;

  if (entries < 1 || entries > URING_ENTRIES_MAX)
    return -EINVAL;
  uring = calloc (1, sizeof *uring);
  if (uring == NULL)
    return -ENOMEM;
  for (size_t i = 0; i < sizeof uring_setup_flags / sizeof (unsigned); i++)
    {
      unsigned flags = uring_setup_flags[i];

      result = io_uring_queue_init (entries, &uring->ring, flags);
      uring->enabled = (flags & IORING_SETUP_R_DISABLED) == 0;
      if (result != -EINVAL)
        break;                          /* EINVAL: a flag it does not know */
    }
  if (result < 0)
    {
      free (uring);
      return result;
    }
  uring->entries = entries;
  *uring_out = uring;
  return 0;
}

void
lhb_uring_close (struct lhb_uring *uring)
{
  assert (uring->in_flight == 0);
  io_uring_queue_exit (&uring->ring);
  free (uring);
}

int
lhb_uring_fd (const struct lhb_uring *uring)
{
  return uring->ring.ring_fd;
}

uint32_t
lhb_uring_in_flight (const struct lhb_uring *uring)
{
  return uring->in_flight;
}

uint32_t
lhb_uring_unsubmitted (const struct lhb_uring *uring)
{
  return io_uring_sq_ready (&uring->ring);
}

/* Queue what is left of an io.  While one is in flight, io->result counts the
 * bytes it has transferred so far.  There is always a free entry: those not
 * yet submitted are some of those in flight, and they are at most 'entries'.
 */
static void
uring_queue_rest (struct lhb_uring *uring, struct lhb_io *io, unsigned flags)
{
  uint32_t done_bytes = (uint32_t) io->result;
  char *buffer = (char *) io->buffer + done_bytes;
  unsigned length_bytes = io->length_bytes - done_bytes;
  uint64_t offset_bytes = io->offset_bytes + done_bytes;
  struct io_uring_sqe *sqe = io_uring_get_sqe (&uring->ring);

  assert (sqe != NULL);
  assert (length_bytes > 0);
  if (io->op == LHB_IO_PREAD)
    io_uring_prep_read (sqe, io->fd, buffer, length_bytes, offset_bytes);
  else
    io_uring_prep_write (sqe, io->fd, buffer, length_bytes, offset_bytes);
  sqe->rw_flags = io->rw_flags;
  io_uring_sqe_set_flags (sqe, flags);
  io_uring_sqe_set_data (sqe, io);
}

int
lhb_uring_prepare (struct lhb_uring *uring, struct lhb_io *io)
{
  assert (io->length_bytes > 0 && io->length_bytes <= INT32_MAX);
  if (uring->in_flight == uring->entries)
    return -EAGAIN;
  io->result = 0;
  uring_queue_rest (uring, io, 0);
  uring->in_flight++;
  return 0;
}

/* From now on the calling thread is the ring's only issuer.  The system call is
 * made by hand because liburing 2.3 forgets to export its function for it.
 */
static int
uring_enable (struct lhb_uring *uring)
{
  if (uring->enabled)
    return 0;
  if (syscall (__NR_io_uring_register, uring->ring.ring_fd,
               IORING_REGISTER_ENABLE_RINGS, NULL, 0) == -1)
    return -errno;
  uring->enabled = true;
  return 0;
}

/* Hand all prepared ios to the kernel.  -EAGAIN: it has no memory for now and
 * has not taken all of them; they stay prepared, and the next call, or a reap
 * that continues an io, takes them along.
 */
int
lhb_uring_submit (struct lhb_uring *uring)
{
  unsigned tries = 0;
  int result;

  result = uring_enable (uring);
  if (result < 0)
    return result;
  while (io_uring_sq_ready (&uring->ring) > 0)
    {
      result = io_uring_submit (&uring->ring);
      if (result > 0 || result == -EINTR)
        continue;
      if (result < 0 && result != -EAGAIN && result != -EBUSY)
        return result;
      if (++tries == URING_SUBMIT_TRIES_MAX)
        return -EAGAIN;
      sched_yield ();
    }
  return 0;
}

/* Take in one completion.  True: the io is complete.  False: its rest was
 * queued again.
 */
static bool
uring_complete (struct lhb_uring *uring, struct lhb_io *io, int32_t got)
{
  if (got > 0)
    {
      assert ((uint32_t) got <= io->length_bytes - (uint32_t) io->result);
      io->result += got;
      if ((uint32_t) io->result == io->length_bytes)
        return true;
      uring_queue_rest (uring, io, 0);
      return false;
    }
  /* To a caller who did not ask for it, "try again" is no answer.  A kernel
   * worker does the second try and may wait, so it does not come back soon. */
  if (got == -EINTR || (got == -EAGAIN && (io->rw_flags & RWF_NOWAIT) == 0))
    {
      uring_queue_rest (uring, io, IOSQE_ASYNC);
      return false;
    }
  if (io->result == 0)
    io->result = got == 0 && io->op == LHB_IO_PWRITE ? -EIO : got;
  return true;
}

/* 'done' may prepare new ios: their completions are left to the next call, so
 * the loop is bounded by what is complete when it begins.
 */
unsigned
lhb_uring_reap (struct lhb_uring *uring)
{
  unsigned left = io_uring_cq_ready (&uring->ring);
  unsigned completed = 0;
  bool continued = false;

  while (left > 0)
    {
      struct io_uring_cqe *cqes[URING_REAP_BATCH];
      unsigned want = left < URING_REAP_BATCH ? left : URING_REAP_BATCH;
      unsigned count = io_uring_peek_batch_cqe (&uring->ring, cqes, want);

      if (count == 0)
        break;
      left -= count;
      for (unsigned i = 0; i < count; i++)
        {
          struct lhb_io *io = io_uring_cqe_get_data (cqes[i]);
          int32_t got = cqes[i]->res;

          if (!uring_complete (uring, io, got))
            {
              continued = true;
              continue;
            }
          assert (uring->in_flight > 0);
          uring->in_flight--;
          completed++;
          io->done (io);
        }
      io_uring_cq_advance (&uring->ring, count);
    }
  if (continued)
    lhb_uring_submit (uring);
  return completed;
}

#else /* !LHB_HAVE_URING */

int
lhb_uring_open (uint32_t entries, struct lhb_uring **uring_out)
{
  (void) entries;
  (void) uring_out;
  return -ENOSYS;
}

/* Without a ring nobody can call the others: they exist for the linker. */

void
lhb_uring_close (struct lhb_uring *uring)
{
  (void) uring;
}

int
lhb_uring_fd (const struct lhb_uring *uring)
{
  (void) uring;
  return -1;
}

int
lhb_uring_prepare (struct lhb_uring *uring, struct lhb_io *io)
{
  (void) uring;
  (void) io;
  return -EAGAIN;
}

int
lhb_uring_submit (struct lhb_uring *uring)
{
  (void) uring;
  return -ENOSYS;
}

unsigned
lhb_uring_reap (struct lhb_uring *uring)
{
  (void) uring;
  return 0;
}

uint32_t
lhb_uring_in_flight (const struct lhb_uring *uring)
{
  (void) uring;
  return 0;
}

uint32_t
lhb_uring_unsubmitted (const struct lhb_uring *uring)
{
  (void) uring;
  return 0;
}

#endif
