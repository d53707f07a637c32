/* What this kernel, this container and this file system let us use. */
#include <assert.h>
#include <errno.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "lhb_io.h"
#include "lhb_contract.h"

#define PROBE_ENTRIES 2
#define PROBE_BYTES 512
#define PROBE_TIMEOUT_MS 5000
#define PROBE_WAKES_MAX 16              /* interruptions of one wait */

struct probe {
  struct lhb_io io;                     /* first: 'done' finds the rest */
  bool finished;
  char expected[PROBE_BYTES];
  char got[PROBE_BYTES];
};

int
lhb_built_with_uring (void)
{
#ifdef LHB_HAVE_URING
  return 1;
#else
  return 0;
#endif
}

static void
probe_done (struct lhb_io *io)
{
  ((struct probe *) io)->finished = true;
}

/* A file in memory with something to read in it, or -errno. */
static int
probe_file (struct probe *probe)
{
  int fd = memfd_create ("lhb-probe", MFD_CLOEXEC);

  if (fd == -1)
    return -errno;
  memset (probe->expected, 0xa5, sizeof probe->expected);
  if (pwrite (fd, probe->expected, PROBE_BYTES, 0) != PROBE_BYTES)
    {
      close (fd);
      return -EIO;
    }
  return fd;
}

/* Read through the ring and wait for it as a queue does: by polling. */
static int
probe_read (struct lhb_uring *uring, struct probe *probe)
{
  struct pollfd pollfd = { .fd = lhb_uring_fd (uring), .events = POLLIN };
  int result;

  result = lhb_uring_prepare (uring, &probe->io);
  if (result < 0)
    return result;
  result = lhb_uring_submit (uring);
  if (result < 0)
    return result;
  for (int wakes = 0; !probe->finished && wakes < PROBE_WAKES_MAX; wakes++)
    {
      int ready = poll (&pollfd, 1, PROBE_TIMEOUT_MS);

      if (ready == 0)
        break;
      if (ready == -1 && errno != EINTR)
        return -errno;
      lhb_uring_reap (uring);
    }
  if (!probe->finished)
    return -ETIMEDOUT;
  if (probe->io.result < 0)
    return probe->io.result;
  if (probe->io.result != PROBE_BYTES
      || memcmp (probe->got, probe->expected, PROBE_BYTES) != 0)
    return -EIO;
  return 0;
}

/* That a ring can be made does not say that it works: some sandboxes allow the
 * one and refuse the other.  So a read is done, too.
 */
int
lhb_probe_uring (void)
{
  struct lhb_uring *uring;
  struct probe *probe;
  int result, fd;

  result = lhb_uring_open (PROBE_ENTRIES, &uring);
  if (result < 0)
    return result;
  probe = calloc (1, sizeof *probe);
  fd = probe == NULL ? -ENOMEM : probe_file (probe);
  if (fd < 0)
    {
      free (probe);
      lhb_uring_close (uring);
      return fd;
    }

  probe->io.op = LHB_IO_PREAD;
  probe->io.fd = fd;
  probe->io.buffer = probe->got;
  probe->io.length_bytes = PROBE_BYTES;
  probe->io.done = probe_done;
  result = probe_read (uring, probe);
  close (fd);
  /* A read the kernel took and never finished may still write to the buffer:
   * then ring and buffer are left to it, once in the life of a process. */
  if (lhb_uring_in_flight (uring) == 0)
    {
      lhb_uring_close (uring);
      free (probe);
    }
  return result;
}

/* 0, or -EOPNOTSUPP or -ENOTTY where the file system has no FIEMAP. */
int
lhb_probe_fiemap (int fd)
{
  struct fiemap map = { .fm_length = LHB_BLOCK_BYTES };

  return ioctl (fd, FS_IOC_FIEMAP, &map) == -1 ? -errno : 0;
}
