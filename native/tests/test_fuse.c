/* FUSE: the relay between a kernel that this test plays and a server that it
 * plays, too. */

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "lhb_rig.h"

#define BLOCKS 64
#define SIZE ((uint64_t) BLOCKS * BLOCK)
#define HANDLE 7
#define WAIT_MS 20000
#define MESSAGE_BYTES (256u << 10)

struct mount {
  struct rig rig;
  int kernel, server;           /* our ends */
  lhb_fuse *fuse;
  uint64_t unique;
  char message[MESSAGE_BYTES];  /* the last one */
};

static struct mount mount;

static void
mount_open (uint32_t stores)
{
  int kernel[2], server[2], bytes = MESSAGE_BYTES;

  rig_open (&mount.rig, LHB_DRIVER_AUTO, 0, stores, BLOCKS);
  CHECK (socketpair (AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, kernel) == 0);
  CHECK (socketpair (AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, server) == 0);
  for (int i = 0; i < 2; i++)
    CHECK (setsockopt (kernel[i], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes)
           == 0);
  mount.kernel = kernel[0];
  mount.server = server[0];
  CHECK_EQUAL (
      lhb_fuse_open (mount.rig.engine, kernel[1], server[1], &mount.fuse), 0);
  CHECK_EQUAL (lhb_fuse_add_file (mount.fuse, HANDLE, mount.rig.volume,
                                  LHB_FUSE_WRITABLE),
               0);
}

static void
mount_close (void)
{
  lhb_fuse_close (mount.fuse);
  close (mount.kernel);
  close (mount.server);
  rig_close (&mount.rig);
}

static size_t
receive (int fd)
{
  struct pollfd wait = { .fd = fd, .events = POLLIN };
  ssize_t got;

  CHECK_EQUAL (poll (&wait, 1, WAIT_MS), 1);
  got = recv (fd, mount.message, sizeof mount.message, 0);
  CHECK (got >= 0);
  return (size_t) got;
}

static void
ask (uint32_t opcode, const void *body, size_t body_bytes,
     const void *payload, size_t payload_bytes)
{
  struct fuse_in_header in
      = { .opcode = opcode, .unique = ++mount.unique, .nodeid = 2 };
  struct iovec iov[3] = { { &in, sizeof in },
                          { (void *) (uintptr_t) body, body_bytes },
                          { (void *) (uintptr_t) payload, payload_bytes } };

  in.len = (uint32_t) (sizeof in + body_bytes + payload_bytes);
  CHECK_EQUAL (writev (mount.kernel, iov, 3), in.len);
}

/* The error of the answer; its body is behind the header of 'message'. */
static int
answer (size_t body_bytes)
{
  size_t got = receive (mount.kernel);
  struct fuse_out_header out;

  CHECK (got >= sizeof out);
  memcpy (&out, mount.message, sizeof out);
  CHECK_EQUAL (out.len, got);
  CHECK_EQUAL (out.unique, mount.unique);
  CHECK_EQUAL (got, sizeof out + (out.error ? 0 : body_bytes));
  return out.error;
}

static const char *
body (void)
{
  return mount.message + sizeof (struct fuse_out_header);
}

static int
ask_write (uint64_t offset, const void *data, uint32_t length)
{
  struct fuse_write_in in
      = { .fh = HANDLE, .offset = offset, .size = length };

  ask (FUSE_WRITE, &in, sizeof in, data, length);
  return answer (sizeof (struct fuse_write_out));
}

static int
ask_read (uint64_t offset, uint32_t length, size_t want)
{
  struct fuse_read_in in
      = { .fh = HANDLE, .offset = offset, .size = length };

  ask (FUSE_READ, &in, sizeof in, NULL, 0);
  return answer (want);
}

static int
ask_fallocate (uint32_t mode, uint64_t offset, uint64_t length)
{
  struct fuse_fallocate_in in
      = { .fh = HANDLE, .offset = offset, .length = length, .mode = mode };

  ask (FUSE_FALLOCATE, &in, sizeof in, NULL, 0);
  return answer (0);
}

/* The answer, or -errno. */
static int64_t
ask_lseek (uint64_t offset, uint32_t whence)
{
  struct fuse_lseek_in in
      = { .fh = HANDLE, .offset = offset, .whence = whence };
  struct fuse_lseek_out out;
  int error;

  ask (FUSE_LSEEK, &in, sizeof in, NULL, 0);
  error = answer (sizeof out);
  memcpy (&out, body (), sizeof out);
  return error ? error : (int64_t) out.offset;
}

/* ---- I/O. */

static void
any_alignment_agrees_with_a_model (void)
{
  static char data[SIZE];
  uint64_t random = lhb_test_seed;
  char *model;

  mount_open (3);
  model = rig_model (&mount.rig);
  for (int i = 0; i < 500; i++)
    {
      uint64_t offset = lhb_test_random (&random) % SIZE;
      uint64_t most = SIZE - offset < 3 * BLOCK ? SIZE - offset : 3 * BLOCK;
      uint32_t length = 1 + (uint32_t) (lhb_test_random (&random) % most);

      switch (lhb_test_random (&random) % 4)
        {
        case 0:
          CHECK_EQUAL (ask_read (offset, length, length), 0);
          CHECK (memcmp (body (), model + offset, length) == 0);
          break;
        case 1:
          CHECK_EQUAL (ask_fallocate (FALLOC_FL_PUNCH_HOLE
                                          | FALLOC_FL_KEEP_SIZE,
                                      offset, length),
                       0);
          memset (model + offset, 0, length);
          break;
        case 2:
          CHECK_EQUAL (ask_fallocate (FALLOC_FL_ZERO_RANGE, offset, length),
                       0);
          memset (model + offset, 0, length);
          break;
        default:
          memset (data, (int) (1 + i % 255), length);
          CHECK_EQUAL (ask_write (offset, data, length), 0);
          memset (model + offset, 1 + i % 255, length);
        }
    }
  rig_check (&mount.rig, model);
  free (model);
  mount_close ();
}

static void
the_end_of_the_volume (void)
{
  char data[2 * BLOCK] = { 1 };
  struct fuse_write_out out;

  mount_open (1);
  CHECK_EQUAL (ask_write (SIZE, data, 1), -ENOSPC);
  CHECK_EQUAL (ask_write (SIZE - BLOCK, data, sizeof data), 0);
  memcpy (&out, body (), sizeof out);
  CHECK_EQUAL (out.size, BLOCK);
  CHECK_EQUAL (ask_read (SIZE - 1, 100, 1), 0);
  CHECK_EQUAL (ask_read (SIZE, 100, 0), 0);
  CHECK_EQUAL (ask_read (UINT64_MAX, 100, 0), 0);
  CHECK_EQUAL (ask_fallocate (FALLOC_FL_ZERO_RANGE, SIZE - 1, 2), -EFBIG);
  CHECK_EQUAL (ask_fallocate (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                              SIZE - BLOCK, UINT64_MAX),
               -EINVAL);
  CHECK_EQUAL (ask_fallocate (0, 0, BLOCK), -EOPNOTSUPP);
  mount_close ();
}

static void
holes_are_found (void)
{
  char data[BLOCK] = { 1 };

  mount_open (1);
  /* The lower third has data from the beginning. */
  CHECK_EQUAL (ask_lseek (5, SEEK_DATA), 5);
  CHECK_EQUAL (ask_lseek (5, SEEK_HOLE), BLOCKS / 3 * BLOCK);
  CHECK_EQUAL (ask_lseek (30 * BLOCK, SEEK_DATA), -ENXIO);
  CHECK_EQUAL (ask_lseek (30 * BLOCK + 5, SEEK_HOLE), 30 * BLOCK + 5);
  CHECK_EQUAL (ask_write (40 * BLOCK, data, BLOCK), 0);
  CHECK_EQUAL (ask_lseek (30 * BLOCK, SEEK_DATA), 40 * BLOCK);
  CHECK_EQUAL (ask_lseek (40 * BLOCK + 5, SEEK_HOLE), 41 * BLOCK);
  CHECK_EQUAL (ask_write (SIZE - BLOCK, data, BLOCK), 0);
  CHECK_EQUAL (ask_lseek (SIZE - 1, SEEK_HOLE), SIZE);
  CHECK_EQUAL (ask_lseek (SIZE, SEEK_HOLE), -ENXIO);
  CHECK_EQUAL (ask_lseek (0, SEEK_CUR), -EINVAL);
  mount_close ();
}

/* ---- What is refused. */

static void
requests_that_make_no_sense (void)
{
  struct fuse_write_in in = { .fh = HANDLE, .size = 100 };
  char data[BLOCK] = { 0 };

  mount_open (1);
  ask (FUSE_WRITE, &in, sizeof in, data, 99);
  CHECK_EQUAL (answer (0), -EINVAL);
  in.size = UINT32_MAX;
  ask (FUSE_WRITE, &in, sizeof in, data, 99);
  CHECK_EQUAL (answer (0), -EINVAL);
  in.fh = HANDLE + 1;
  ask (FUSE_WRITE, &in, sizeof in, data, 99);
  CHECK_EQUAL (answer (0), -EBADF);
  ask (FUSE_READ, &in, 8, NULL, 0);
  CHECK_EQUAL (answer (0), -EINVAL);
  CHECK_EQUAL (ask_read (0, LHB_FUSE_BYTES_MAX + 1, 0), -EINVAL);
  lhb_fuse_remove_file (mount.fuse, HANDLE);
  CHECK_EQUAL (ask_write (0, data, 1), -EBADF);
  CHECK_EQUAL (ask_fallocate (FALLOC_FL_ZERO_RANGE, 0, 1), -EOPNOTSUPP);
  CHECK_EQUAL (ask_lseek (0, SEEK_DATA), -EOPNOTSUPP);
  CHECK_EQUAL (
      lhb_fuse_add_file (mount.fuse, HANDLE, mount.rig.volume, 0), 0);
  CHECK_EQUAL (
      lhb_fuse_add_file (mount.fuse, HANDLE, mount.rig.volume, 0), -EEXIST);
  CHECK_EQUAL (ask_write (0, data, 1), -EROFS);
  CHECK_EQUAL (ask_read (0, 1, 1), 0);
  mount_close ();
}

static void
a_message_that_is_no_request_ends_the_mount (void)
{
  struct pollfd wait = { .events = POLLIN };

  mount_open (1);
  wait.fd = lhb_fuse_fd (mount.fuse);
  CHECK_EQUAL (poll (&wait, 1, 0), 0);
  CHECK_EQUAL (send (mount.kernel, "garbage", 7, 0), 7);
  CHECK_EQUAL (poll (&wait, 1, WAIT_MS), 1);
  mount_close ();
}

static void
a_volume_that_closes_ends_its_files (void)
{
  mount_open (1);
  rig_close_volume (&mount.rig);
  CHECK_EQUAL (ask_read (0, 1, 1), -EIO);
  mount_close ();
}

/* Any numbers in any request about the file: each has an answer, and the volume
 * is as large as before. */
static void
numbers_without_sense_have_answers (void)
{
  static const uint32_t opcodes[]
      = { FUSE_READ, FUSE_WRITE, FUSE_FSYNC, FUSE_FALLOCATE, FUSE_LSEEK };
  static const uint64_t edges[]
      = { 0, 1, BLOCK - 1, BLOCK, SIZE - 1, SIZE, SIZE + 1, INT64_MAX,
          UINT64_MAX, UINT32_MAX, LHB_FUSE_BYTES_MAX };
  static char payload[4 * BLOCK];
  uint64_t random = lhb_test_seed;

  mount_open (2);
  for (int i = 0; i < 3000; i++)
    {
      uint64_t words[5] = { HANDLE };
      uint32_t opcode = opcodes[lhb_test_below (&random, 5)];
      size_t bytes = 8 * (1 + lhb_test_below (&random, 5));
      size_t more = bytes == sizeof words && opcode == FUSE_WRITE
                        ? lhb_test_below (&random, sizeof payload)
                        : 0;
      struct fuse_out_header out;

      for (int word = 1; word < 5; word++)
        words[word] = edges[lhb_test_below (&random, 11)];
      if (lhb_test_below (&random, 2) != 0)
        words[2] = more;
      ask (opcode, words, bytes, payload, more);
      /* A READ or an FSYNC that is cut off is answered here, too. */
      CHECK (receive (mount.kernel) >= sizeof out);
      memcpy (&out, mount.message, sizeof out);
      CHECK_EQUAL (out.unique, mount.unique);
    }
  rig_check_equal (&mount.rig);
  mount_close ();
}

/* ---- The server. */

static void
serve (int error, const void *reply, size_t reply_bytes)
{
  struct fuse_in_header in;
  struct fuse_out_header out = { .error = error };
  struct iovec iov[2] = { { &out, sizeof out },
                          { (void *) (uintptr_t) reply, reply_bytes } };

  CHECK (receive (mount.server) >= sizeof in);
  memcpy (&in, mount.message, sizeof in);
  CHECK_EQUAL (in.unique, mount.unique);
  out.unique = in.unique;
  out.len = (uint32_t) (sizeof out + reply_bytes);
  CHECK_EQUAL (writev (mount.server, iov, 2), out.len);
}

static void
the_rest_is_the_servers (void)
{
  struct fuse_init_out init = { .major = 7, .max_write = 8u << 20,
                                .flags = FUSE_WRITEBACK_CACHE };
  struct fuse_open_out opened
      = { .fh = 9, .open_flags = FOPEN_DIRECT_IO };
  struct fuse_read_in read_in = { .fh = 9, .size = 10 };

  mount_open (1);
  ask (FUSE_INIT, "1234567", 8, NULL, 0);
  serve (0, &init, sizeof init);
  CHECK_EQUAL (answer (sizeof init), 0);
  memcpy (&init, body (), sizeof init);
  CHECK_EQUAL (init.max_write, LHB_FUSE_BYTES_MAX);
  CHECK_EQUAL (init.flags, 0);
  CHECK_EQUAL (init.max_background, LHB_FUSE_BACKGROUND_MAX);
  ask (FUSE_OPEN, "1234567", 8, NULL, 0);
  serve (0, &opened, sizeof opened);
  CHECK_EQUAL (answer (sizeof opened), 0);
  memcpy (&opened, body (), sizeof opened);
  CHECK_EQUAL (opened.open_flags,
               FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES);
  ask (FUSE_READ, &read_in, sizeof read_in, NULL, 0);
  serve (0, "0123456789", 10);
  CHECK_EQUAL (answer (10), 0);
  ask (FUSE_LOOKUP, "name", 5, NULL, 0);
  serve (-ENOENT, NULL, 0);
  CHECK_EQUAL (answer (0), -ENOENT);
  ask (FUSE_INTERRUPT, "1234567", 8, NULL, 0);  /* nobody's */
  CHECK_EQUAL (ask_read (0, 1, 1), 0);
  mount_close ();
}

/* Its socket is full: requests wait in the kernel, and none is lost. */
static void
a_server_that_stalls_loses_nothing (void)
{
  enum { COUNT = 3000 };
  struct fuse_in_header in;
  int sent = 0, got = 0;

  mount_open (1);
  while (got < COUNT)
    {
      struct fuse_in_header one
          = { .opcode = FUSE_FORGET, .unique = (uint64_t) sent + 1 };

      one.len = sizeof one;
      if (sent < COUNT
          && send (mount.kernel, &one, sizeof one, MSG_DONTWAIT) == sizeof one)
        sent++;
      else
        {
          CHECK_EQUAL (receive (mount.server), sizeof in);
          got++;
        }
    }
  mount_close ();
}

static void
a_server_that_is_gone_costs_an_error (void)
{
  mount_open (1);
  CHECK (shutdown (mount.server, SHUT_RDWR) == 0);
  ask (FUSE_LOOKUP, "name", 5, NULL, 0);
  CHECK_EQUAL (answer (0), -EIO);
  CHECK_EQUAL (ask_read (0, 1, 1), 0);
  mount_close ();
}

static void
there_is_one_relay (void)
{
  int pair[2];
  lhb_fuse *second;

  mount_open (1);
  CHECK (socketpair (AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0);
  CHECK_EQUAL (lhb_fuse_open (mount.rig.engine, pair[0], pair[1], &second),
               -EBUSY);
  close (pair[0]);
  close (pair[1]);
  mount_close ();
}

static const struct lhb_test tests[] = {
  LHB_TEST (any_alignment_agrees_with_a_model),
  LHB_TEST (the_end_of_the_volume),
  LHB_TEST (holes_are_found),
  LHB_TEST (requests_that_make_no_sense),
  LHB_TEST (a_message_that_is_no_request_ends_the_mount),
  LHB_TEST (a_volume_that_closes_ends_its_files),
  LHB_TEST (numbers_without_sense_have_answers),
  LHB_TEST (the_rest_is_the_servers),
  LHB_TEST (a_server_that_stalls_loses_nothing),
  LHB_TEST (a_server_that_is_gone_costs_an_error),
  LHB_TEST (there_is_one_relay),
};

LHB_TEST_MAIN (tests)
