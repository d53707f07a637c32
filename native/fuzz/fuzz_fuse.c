/* Fuzz target: what the kernel and the server in Python send to the FUSE relay.
 *
 * The input is a row of messages: a byte that says whose it is and what of it
 * is put right (PART_*), two bytes of length, the message.  The target plays
 * both ends and knows what must come: an answer for every request about a file
 * that the relay executes or refuses, once and of the right form; every other
 * request at the server as it was sent; every whole reply of the server at the
 * kernel.  A message that is no request ends the mount; otherwise a read at the
 * end is still answered.
 */

#include <linux/fuse.h>
#include <poll.h>
#include <sys/socket.h>

#include "lhb_fuzz.h"
#include "lhb_fuzz_rig.h"

#define BLOCKS 64
#define SIZE ((uint64_t) BLOCKS * BLOCK)
#define WRITABLE 7
#define READ_ONLY 8

enum {
  PART_SERVER = 1,              /* of the server; otherwise of the kernel */
  PART_LENGTH = 2,              /* the head says how long it is */
  PART_WRITABLE = 4,            /* about a file that may be written */
  PART_READ_ONLY = 8,           /* about one that may not */
  MESSAGES_MAX = 512,
  /* Answers under way; the socket that stands for the kernel has room. */
  UNDER_WAY_BYTES = 64 << 10,
  MESSAGE_BYTES = 512 << 10,
  INPUTS_PER_CHECK = 512,
};

/* The kernel's request, whose unique is its number and one. */
struct request {
  const uint8_t *bytes;
  size_t length;
  bool to_server, awaits_answer;
  uint32_t answer_bytes;        /* at most, without the head */
};

struct talk {
  lhb_fuse *fuse;
  int kernel, server;           /* our ends */
  struct request requests[MESSAGES_MAX];
  uint32_t count;
  uint32_t answers, forwards, replies;  /* that are to come */
  size_t under_way_bytes;
  uint64_t forwarded;           /* unique of the last one, or 0 */
  bool ended;
};

static uint64_t inputs;
static uint8_t message[MESSAGE_BYTES];

static void
open_talk (struct talk *talk)
{
  int kernel[2], server[2];

  memset (talk, 0, sizeof *talk);
  CHECK_EQUAL (socketpair (AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, kernel),
               0);
  CHECK_EQUAL (socketpair (AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, server),
               0);
  talk->kernel = kernel[0];
  talk->server = server[0];
  CHECK_EQUAL (lhb_fuse_open (rig.engine, kernel[1], server[1], &talk->fuse),
               0);
  CHECK_EQUAL (lhb_fuse_add_file (talk->fuse, WRITABLE, rig.volume,
                                  LHB_FUSE_WRITABLE),
               0);
  CHECK_EQUAL (lhb_fuse_add_file (talk->fuse, READ_ONLY, rig.volume, 0), 0);
}

static void
close_talk (struct talk *talk)
{
  lhb_fuse_close (talk->fuse);
  close (talk->kernel);
  close (talk->server);
}

/* ---- What must come back. */

/* A request is as long as its opcode wants, at least. */
static size_t
least_bytes (uint32_t opcode)
{
  size_t head = sizeof (struct fuse_in_header);

  switch (opcode)
    {
    case FUSE_READ:
      return head + sizeof (struct fuse_read_in);
    case FUSE_WRITE:
      return head + sizeof (struct fuse_write_in);
    case FUSE_FSYNC:
      return head + sizeof (struct fuse_fsync_in);
    case FUSE_FALLOCATE:
      return head + sizeof (struct fuse_fallocate_in);
    case FUSE_LSEEK:
      return head + sizeof (struct fuse_lseek_in);
    default:
      return 0;
    }
}

static uint32_t
answer_bytes (uint32_t opcode, const uint8_t *body)
{
  struct fuse_read_in in;

  switch (opcode)
    {
    case FUSE_READ:
      memcpy (&in, body, sizeof in);
      return in.size < SIZE ? in.size : (uint32_t) SIZE;
    case FUSE_WRITE:
      return sizeof (struct fuse_write_out);
    case FUSE_LSEEK:
      return sizeof (struct fuse_lseek_out);
    default:
      return 0;
    }
}

static void
expect (struct talk *talk, struct request *request)
{
  const uint8_t *body = request->bytes + sizeof (struct fuse_in_header);
  struct fuse_in_header in;
  uint64_t handle;
  size_t least;

  if (request->length < sizeof in)
    {
      talk->ended = true;
      return;
    }
  memcpy (&in, request->bytes, sizeof in);
  if (in.len != request->length)
    {
      talk->ended = true;
      return;
    }
  if (in.opcode == FUSE_INTERRUPT)
    return;
  least = least_bytes (in.opcode);
  request->to_server = least == 0;
  if (least != 0 && request->length >= least)
    {
      memcpy (&handle, body, sizeof handle);
      request->to_server = handle != WRITABLE && handle != READ_ONLY
                           && (in.opcode == FUSE_READ
                               || in.opcode == FUSE_FSYNC);
      request->answer_bytes = answer_bytes (in.opcode, body);
    }
  request->awaits_answer = !request->to_server;
  talk->under_way_bytes += request->answer_bytes + request->length;
  if (request->to_server)
    {
      talk->forwards++;
      talk->forwarded = in.unique;
    }
  else
    talk->answers++;
}

/* ---- Both ends. */

static void
take_at_kernel (struct talk *talk)
{
  ssize_t got = recv (talk->kernel, message, sizeof message, MSG_DONTWAIT);
  struct fuse_out_header out;
  struct request *request;

  if (got == -1 && (errno == EAGAIN || errno == EINTR))
    return;
  CHECK (got >= (ssize_t) sizeof out);
  memcpy (&out, message, sizeof out);
  CHECK_EQUAL (out.len, got);
  request = out.unique >= 1 && out.unique <= talk->count
                ? &talk->requests[out.unique - 1]
                : NULL;
  if (request == NULL || request->to_server)
    {
      CHECK (talk->replies > 0);
      talk->replies--;
      return;
    }
  CHECK (request->awaits_answer);
  request->awaits_answer = false;
  CHECK (out.error <= 0 && out.error > -4096);
  CHECK (got - (ssize_t) sizeof out <= (out.error ? 0 : request->answer_bytes));
  CHECK (talk->answers > 0);
  talk->answers--;
}

static void
take_at_server (struct talk *talk)
{
  ssize_t got = recv (talk->server, message, sizeof message, MSG_DONTWAIT);
  struct fuse_in_header in;
  const struct request *request;

  if (got == -1 && (errno == EAGAIN || errno == EINTR))
    return;
  CHECK (got >= (ssize_t) sizeof in);
  memcpy (&in, message, sizeof in);
  CHECK (in.unique >= 1 && in.unique <= talk->count);
  request = &talk->requests[in.unique - 1];
  CHECK (request->to_server);
  CHECK_EQUAL (got, request->length);
  CHECK (memcmp (message, request->bytes, request->length) == 0);
  CHECK (talk->forwards > 0);
  talk->forwards--;
}

static void
drain (struct talk *talk)
{
  while (talk->answers + talk->forwards + talk->replies > 0)
    {
      struct pollfd ready[2] = { { .fd = talk->kernel, .events = POLLIN },
                                 { .fd = talk->server, .events = POLLIN } };

      if (poll (ready, 2, -1) < 1)
        {
          CHECK_EQUAL (errno, EINTR);   /* libFuzzer's alarm */
          continue;
        }
      if (ready[0].revents)
        take_at_kernel (talk);
      if (ready[1].revents)
        take_at_server (talk);
    }
  talk->under_way_bytes = 0;
}

static void
send_whole (int fd, const uint8_t *bytes, size_t length)
{
  ssize_t sent;

  do
    sent = send (fd, bytes, length, MSG_NOSIGNAL);
  while (sent == -1 && errno == EINTR);
  CHECK_EQUAL (sent, length);
}

/* ---- One message. */

/* 'bytes' is changed as 'parts' says. */
static void
say_as_kernel (struct talk *talk, uint8_t parts, uint8_t *bytes, size_t length)
{
  struct request *request = &talk->requests[talk->count++];
  uint64_t handle = parts & PART_WRITABLE ? WRITABLE : READ_ONLY;
  uint64_t unique = talk->count;
  uint32_t whole = (uint32_t) length;

  if (parts & PART_LENGTH && length >= sizeof whole)
    memcpy (bytes + offsetof (struct fuse_in_header, len), &whole,
            sizeof whole);
  if (length >= sizeof (struct fuse_in_header))
    memcpy (bytes + offsetof (struct fuse_in_header, unique), &unique,
            sizeof unique);
  if (parts & (PART_WRITABLE | PART_READ_ONLY)
      && length >= sizeof (struct fuse_in_header) + sizeof handle)
    memcpy (bytes + sizeof (struct fuse_in_header), &handle, sizeof handle);
  *request = (struct request) { .bytes = bytes, .length = length };
  expect (talk, request);
  send_whole (talk->kernel, bytes, length);
}

/* A reply to what the server had last, or to nothing. */
static void
say_as_server (struct talk *talk, uint8_t parts, uint8_t *bytes, size_t length)
{
  uint64_t unique = talk->forwarded ? talk->forwarded : UINT64_MAX;
  struct fuse_out_header out;

  if (length == 0)
    return;
  if (length >= sizeof out)
    {
      memcpy (&out, bytes, sizeof out);
      out.unique = unique;
      if (parts & PART_LENGTH)
        out.len = (uint32_t) length;
      memcpy (bytes, &out, sizeof out);
      if (out.len == length)
        talk->replies++;
    }
  talk->under_way_bytes += length;
  send_whole (talk->server, bytes, length);
}

static void
converse (struct talk *talk, uint8_t *bytes, size_t left)
{
  while (left >= 3 && talk->count < MESSAGES_MAX - 1 && !talk->ended)
    {
      size_t length = bytes[1] | (size_t) bytes[2] << 8;
      uint8_t parts = bytes[0];

      bytes += 3;
      left -= 3;
      length = length < left ? length : left;
      if (parts & PART_SERVER)
        say_as_server (talk, parts, bytes, length);
      else
        say_as_kernel (talk, parts, bytes, length);
      bytes += length;
      left -= length;
      if (talk->under_way_bytes > UNDER_WAY_BYTES)
        drain (talk);
    }
  drain (talk);
}

/* The mount has ended, or goes on. */
static void
check_end (struct talk *talk)
{
  struct pollfd ended = { .fd = lhb_fuse_fd (talk->fuse), .events = POLLIN };
  struct {
    struct fuse_in_header in;
    struct fuse_read_in read;
  } last = { .in = { .len = sizeof last, .opcode = FUSE_READ },
             .read = { .size = 1 } };

  if (talk->ended)
    {
      while (poll (&ended, 1, -1) != 1)
        CHECK_EQUAL (errno, EINTR);
      return;
    }
  say_as_kernel (talk, PART_WRITABLE, (uint8_t *) &last, sizeof last);
  drain (talk);
  CHECK_EQUAL (poll (&ended, 1, 0), 0);
  CHECK_EQUAL (recv (talk->kernel, message, 1, MSG_DONTWAIT), -1);
  CHECK_EQUAL (recv (talk->server, message, 1, MSG_DONTWAIT), -1);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t length)
{
  static struct talk talk;
  uint8_t *bytes = malloc (length + 1);

  CHECK (bytes != NULL);
  memcpy (bytes, data, length);
  open_rig ("fuzz_fuse", BLOCKS);
  open_talk (&talk);
  converse (&talk, bytes, length);
  check_end (&talk);
  close_talk (&talk);
  free (bytes);
  if (++inputs % INPUTS_PER_CHECK == 0)
    rig_check_equal (&rig);
  return 0;
}
