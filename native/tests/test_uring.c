/* io_uring of one queue.  Where this kernel or container has none, the test
 * checks that opening says so in the same words as the probe.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <unistd.h>

#include "lhb_io.h"
#include "lhb_contract.h"
#include "lhb_test.h"

static unsigned ios_done;

static void
count_done (struct lhb_io *io)
{
  (void) io;
  ios_done++;
}

static struct lhb_io
make_io (enum lhb_io_op op, int fd, void *buffer, uint32_t length_bytes,
         uint64_t offset_bytes)
{
  return (struct lhb_io) {
    .op = op, .fd = fd, .buffer = buffer, .length_bytes = length_bytes,
    .offset_bytes = offset_bytes, .done = count_done, .result = 12345,
  };
}

/* Wait as a queue does: epoll on the ring, then reap. */
static void
wait_until_done (struct lhb_uring *uring, unsigned count)
{
  struct epoll_event event = { .events = EPOLLIN };
  int epoll_fd = epoll_create1 (EPOLL_CLOEXEC);

  CHECK (epoll_fd >= 0);
  CHECK_EQUAL (epoll_ctl (epoll_fd, EPOLL_CTL_ADD, lhb_uring_fd (uring),
                          &event), 0);
  while (ios_done < count)
    {
      int ready = epoll_wait (epoll_fd, &event, 1, -1);

      CHECK (ready >= 0 || errno == EINTR);
      lhb_uring_reap (uring);
    }
  close (epoll_fd);
}

static int32_t
run_one (struct lhb_uring *uring, struct lhb_io io)
{
  ios_done = 0;
  CHECK_EQUAL (lhb_uring_prepare (uring, &io), 0);
  CHECK_EQUAL (lhb_uring_submit (uring), 0);
  wait_until_done (uring, 1);
  CHECK_EQUAL (lhb_uring_in_flight (uring), 0);
  return io.result;
}

static struct lhb_uring *
open_ring (uint32_t entries)
{
  struct lhb_uring *uring;

  CHECK_EQUAL (lhb_uring_open (entries, &uring), 0);
  return uring;
}

#define IOS 64
#define IO_BYTES 10000                  /* no multiple of anything */

static void
many_writes_and_reads_find_their_places (void)
{
  struct lhb_uring *uring = open_ring (IOS);
  unsigned char *out = malloc (IOS * IO_BYTES), *in = malloc (IOS * IO_BYTES);
  struct lhb_io ios[IOS];
  int fd = memfd_create ("x", MFD_CLOEXEC);

  CHECK (out != NULL && in != NULL);
  for (size_t i = 0; i < IOS * IO_BYTES; i++)
    out[i] = (unsigned char) (i % 251);
  for (int pass = 0; pass < 2; pass++)
    {
      ios_done = 0;
      for (size_t i = 0; i < IOS; i++)
        {
          ios[i] = make_io (pass ? LHB_IO_PREAD : LHB_IO_PWRITE, fd,
                            (pass ? in : out) + i * IO_BYTES, IO_BYTES,
                            (IOS - 1 - i) * IO_BYTES);
          CHECK_EQUAL (lhb_uring_prepare (uring, &ios[i]), 0);
        }
      CHECK_EQUAL (lhb_uring_in_flight (uring), IOS);
      CHECK_EQUAL (lhb_uring_submit (uring), 0);
      wait_until_done (uring, IOS);
      for (size_t i = 0; i < IOS; i++)
        CHECK_EQUAL (ios[i].result, IO_BYTES);
    }
  CHECK_EQUAL (memcmp (out, in, IOS * IO_BYTES), 0);
  lhb_uring_close (uring);
  close (fd);
  free (out);
  free (in);
}

static void
full_ring_says_so_and_takes_more_after_a_reap (void)
{
  struct lhb_uring *uring = open_ring (3);
  int fd = memfd_create ("x", MFD_CLOEXEC);
  struct lhb_io ios[4];
  char bytes[4] = { 0 };

  ios_done = 0;
  for (int i = 0; i < 4; i++)
    ios[i] = make_io (LHB_IO_PWRITE, fd, &bytes[i], 1, (uint64_t) i);
  for (int i = 0; i < 3; i++)
    CHECK_EQUAL (lhb_uring_prepare (uring, &ios[i]), 0);
  CHECK_EQUAL (lhb_uring_prepare (uring, &ios[3]), -EAGAIN);
  CHECK_EQUAL (lhb_uring_submit (uring), 0);
  CHECK_EQUAL (lhb_uring_submit (uring), 0);
  wait_until_done (uring, 3);
  CHECK_EQUAL (lhb_uring_prepare (uring, &ios[3]), 0);
  CHECK_EQUAL (lhb_uring_submit (uring), 0);
  wait_until_done (uring, 4);
  lhb_uring_close (uring);
  close (fd);
}

static void
end_of_file_and_errors_are_results (void)
{
  struct lhb_uring *uring = open_ring (4);
  int fd = memfd_create ("x", MFD_CLOEXEC);
  static char bytes[16384];

  CHECK_EQUAL (ftruncate (fd, 10000), 0);
  CHECK_EQUAL (run_one (uring, make_io (LHB_IO_PREAD, fd, bytes, 16384, 0)),
               10000);
  CHECK_EQUAL (run_one (uring, make_io (LHB_IO_PREAD, fd, bytes, 100, 10000)),
               0);
  CHECK_EQUAL (run_one (uring, make_io (LHB_IO_PREAD, -1, bytes, 100, 0)),
               -EBADF);
  lhb_uring_close (uring);
  close (fd);
}

/* A limit on file sizes cuts the write short; the rest is tried again, fails
 * and leaves the bytes that were written as the result.
 */
static void
short_write_is_continued_until_it_fails (void)
{
  struct lhb_uring *uring = open_ring (4);
  int fd = memfd_create ("x", MFD_CLOEXEC);
  struct rlimit before, limit;
  static char bytes[16384];

  signal (SIGXFSZ, SIG_IGN);
  CHECK_EQUAL (getrlimit (RLIMIT_FSIZE, &before), 0);
  limit = before;
  limit.rlim_cur = 10000;
  CHECK_EQUAL (setrlimit (RLIMIT_FSIZE, &limit), 0);
  CHECK_EQUAL (run_one (uring, make_io (LHB_IO_PWRITE, fd, bytes, 16384, 0)),
               10000);
  CHECK_EQUAL (run_one (uring, make_io (LHB_IO_PWRITE, fd, bytes, 100, 10000)),
               -EFBIG);
  CHECK_EQUAL (setrlimit (RLIMIT_FSIZE, &before), 0);
  lhb_uring_close (uring);
  close (fd);
}

static void
nowait_gets_its_eagain_or_its_bytes (void)
{
  struct lhb_uring *uring = open_ring (4);
  int fd = memfd_create ("x", MFD_CLOEXEC);
  char bytes[100];
  struct lhb_io io = make_io (LHB_IO_PREAD, fd, bytes, 100, 0);
  int32_t result;

  CHECK_EQUAL (ftruncate (fd, 100), 0);
  io.rw_flags = RWF_NOWAIT;
  result = run_one (uring, io);
  CHECK (result == 100 || result == -EAGAIN || result == -EOPNOTSUPP);
  io = make_io (LHB_IO_PWRITE, fd, bytes, 100, 0);
  io.rw_flags = RWF_DSYNC;
  CHECK_EQUAL (run_one (uring, io), 100);
  lhb_uring_close (uring);
  close (fd);
}

struct chain {
  struct lhb_io io;                     /* first */
  struct lhb_uring *uring;
  unsigned left;
};

/* 'done' may start the next io, even of the same struct. */
static void
chain_done (struct lhb_io *io)
{
  struct chain *chain = (struct chain *) io;

  CHECK_EQUAL (io->result, (int32_t) io->length_bytes);
  ios_done++;
  if (--chain->left > 0)
    {
      CHECK_EQUAL (lhb_uring_prepare (chain->uring, io), 0);
      CHECK_EQUAL (lhb_uring_submit (chain->uring), 0);
    }
}

#define CHAINS 16
#define CHAIN_LENGTH 500

static void
done_may_start_the_next_io (void)
{
  struct lhb_uring *uring = open_ring (CHAINS);
  int fd = memfd_create ("x", MFD_CLOEXEC);
  struct chain chains[CHAINS];
  char bytes[CHAINS] = { 0 };

  ios_done = 0;
  for (unsigned i = 0; i < CHAINS; i++)
    {
      chains[i] = (struct chain) { .uring = uring, .left = CHAIN_LENGTH };
      chains[i].io = make_io (LHB_IO_PWRITE, fd, &bytes[i], 1, i);
      chains[i].io.done = chain_done;
      CHECK_EQUAL (lhb_uring_prepare (uring, &chains[i].io), 0);
    }
  CHECK_EQUAL (lhb_uring_submit (uring), 0);
  wait_until_done (uring, CHAINS * CHAIN_LENGTH);
  lhb_uring_close (uring);
  close (fd);
}

static void *
use_ring (void *argument)
{
  int fd = memfd_create ("x", MFD_CLOEXEC);
  char bytes[100] = { 0 };

  CHECK_EQUAL (run_one (argument, make_io (LHB_IO_PWRITE, fd, bytes, 100, 0)),
               100);
  close (fd);
  return NULL;
}

/* The engine opens the ring, the queue's thread uses it, and the engine's
 * closes it again.
 */
static void
ring_belongs_to_the_thread_that_submits_first (void)
{
  struct lhb_uring *uring = open_ring (4);
  pthread_t thread;

  CHECK (fcntl (lhb_uring_fd (uring), F_GETFD) & FD_CLOEXEC);
  CHECK_EQUAL (pthread_create (&thread, NULL, use_ring, uring), 0);
  CHECK_EQUAL (pthread_join (thread, NULL), 0);
  lhb_uring_close (uring);
}

static void *
write_to_pipe (void *argument)
{
  CHECK_EQUAL (write (*(int *) argument, "y", 1), 1);
  return NULL;
}

/* Epoll watches the ring before its first submission enables it.  The pipe has
 * one byte of two, so the read comes back short; the rest comes from another
 * thread while this one sleeps in epoll_wait.
 */
static void
rest_of_a_short_read_wakes_a_sleeping_epoll (void)
{
  struct lhb_uring *uring = open_ring (4);
  struct epoll_event event = { .events = EPOLLIN };
  int epoll_fd = epoll_create1 (EPOLL_CLOEXEC);
  pthread_t thread;
  struct lhb_io io;
  int pipe_fds[2];
  char bytes[3] = "--";

  CHECK_EQUAL (pipe (pipe_fds), 0);
  CHECK_EQUAL (write (pipe_fds[1], "x", 1), 1);
  CHECK_EQUAL (epoll_ctl (epoll_fd, EPOLL_CTL_ADD, lhb_uring_fd (uring),
                          &event), 0);
  CHECK_EQUAL (epoll_wait (epoll_fd, &event, 1, 0), 0);
  io = make_io (LHB_IO_PREAD, pipe_fds[0], bytes, 2, 0);
  ios_done = 0;
  CHECK_EQUAL (lhb_uring_prepare (uring, &io), 0);
  CHECK_EQUAL (lhb_uring_unsubmitted (uring), 1);
  CHECK_EQUAL (lhb_uring_submit (uring), 0);
  CHECK_EQUAL (lhb_uring_unsubmitted (uring), 0);
  CHECK_EQUAL (lhb_uring_reap (uring), 0);
  CHECK_EQUAL (lhb_uring_in_flight (uring), 1);
  CHECK_EQUAL (pthread_create (&thread, NULL, write_to_pipe, &pipe_fds[1]), 0);
  while (ios_done == 0)
    {
      int ready = epoll_wait (epoll_fd, &event, 1, -1);

      CHECK (ready == 1 || (ready == -1 && errno == EINTR));
      lhb_uring_reap (uring);
    }
  CHECK_EQUAL (io.result, 2);
  CHECK_EQUAL (strcmp (bytes, "xy"), 0);
  CHECK_EQUAL (pthread_join (thread, NULL), 0);
  lhb_uring_close (uring);
  close (epoll_fd);
  close (pipe_fds[0]);
  close (pipe_fds[1]);
}

static void
probe_agrees_with_opening (void)
{
  struct lhb_uring *uring;
  int probed = lhb_probe_uring ();
  int opened = lhb_uring_open (4, &uring);

  if (!lhb_built_with_uring ())
    CHECK_EQUAL (opened, -ENOSYS);
  if (opened == 0)
    lhb_uring_close (uring);
  else
    CHECK_EQUAL (probed, opened);
}

static const struct lhb_test tests[] = {
  LHB_TEST (probe_agrees_with_opening),
  LHB_TEST (many_writes_and_reads_find_their_places),
  LHB_TEST (full_ring_says_so_and_takes_more_after_a_reap),
  LHB_TEST (end_of_file_and_errors_are_results),
  LHB_TEST (short_write_is_continued_until_it_fails),
  LHB_TEST (nowait_gets_its_eagain_or_its_bytes),
  LHB_TEST (done_may_start_the_next_io),
  LHB_TEST (ring_belongs_to_the_thread_that_submits_first),
  LHB_TEST (rest_of_a_short_read_wakes_a_sleeping_epoll),
};

/* Without a working ring only the first test has a subject. */
int
main (int argc, char **argv)
{
  size_t count = sizeof tests / sizeof tests[0];

  return lhb_test_main (argc, argv, tests, lhb_probe_uring () == 0 ? count : 1);
}
