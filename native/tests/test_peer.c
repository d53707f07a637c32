/* Peer: what it sends, and what it makes of replies, against a replica that a
 * test plays byte by byte. */

#include <sys/socket.h>

#include "lhb_bytes.h"
#include "lhb_client.h"
#include "lhb_peer.h"
#include "lhb_rig.h"

#define SIZE ((uint64_t) 64 << 20)

enum { FAKES_MAX = 3, PATIENT_MS = 60000 };

/* A volume on peers whose other ends are in the test's hands. */
struct fake {
  struct rig rig;
  uint32_t count;
  lhb_store *peers[FAKES_MAX];
  int fds[FAKES_MAX];
};

struct frame {
  uint32_t sequence, type, size, payload;
  uint64_t offset;
};

/* ---- Playing the replica. */

static void
fake_open_peer (struct fake *fake, uint32_t index, uint32_t flags,
                uint32_t timeout_ms)
{
  int fds[2];

  CHECK_EQUAL (lhb_peer_open (fake->rig.engine, SIZE, flags, timeout_ms,
                              &fake->peers[index]),
               0);
  CHECK_EQUAL (socketpair (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  CHECK_EQUAL (lhb_peer_add_connection (fake->peers[index], 0, fds[0]), 0);
  fake->fds[index] = fds[1];
}

static void
fake_open (struct fake *fake, uint32_t count, uint32_t flags,
           uint32_t timeout_ms)
{
  *fake = (struct fake){ .count = count };
  fake->rig.engine = engine_make (LHB_DRIVER_POOL, 1);
  CHECK_EQUAL (lhb_volume_open (fake->rig.engine, SIZE, 0, &fake->rig.volume),
               0);
  for (uint32_t i = 0; i < count; i++)
    fake_open_peer (fake, i, flags, timeout_ms);
  CHECK_EQUAL (lhb_volume_publish (fake->rig.volume, fake->peers, NULL, count),
               0);
}

static void
fake_close (struct fake *fake)
{
  lhb_fault_clear ();
  lhb_volume_close (fake->rig.volume);
  for (uint32_t i = 0; i < fake->count; i++)
    {
      lhb_store_close (fake->peers[i]);
      if (fake->fds[i] >= 0)
        close (fake->fds[i]);
    }
  lhb_engine_close (fake->rig.engine);
}

static void
fake_hang_up (struct fake *fake, uint32_t index)
{
  close (fake->fds[index]);
  fake->fds[index] = -1;
}

static void
take (int fd, void *data, size_t length)
{
  char *at = data;

  while (length > 0)
    {
      ssize_t got = recv (fd, at, length, 0);

      if (got == -1 && errno == EINTR)
        continue;
      CHECK (got > 0);
      at += got;
      length -= (size_t) got;
    }
}

static void
put (int fd, const void *data, size_t length)
{
  while (length > 0)
    {
      ssize_t sent = send (fd, data, length, MSG_NOSIGNAL);

      if (sent == -1 && errno == EINTR)
        continue;
      CHECK (sent > 0);
      data = (const char *) data + sent;
      length -= (size_t) sent;
    }
}

static struct frame
take_frame (struct fake *fake, uint32_t index)
{
  uint8_t bytes[LHB_FRAME_BYTES];

  take (fake->fds[index], bytes, sizeof bytes);
  CHECK_EQUAL (lhb_get_le16 (bytes), LHB_FRAME_MAGIC);
  return (struct frame){ .sequence = lhb_get_le32 (bytes + 2),
                         .type = lhb_get_le32 (bytes + 6),
                         .offset = lhb_get_le64 (bytes + 10),
                         .size = lhb_get_le32 (bytes + 18),
                         .payload = lhb_get_le32 (bytes + 22) };
}

/* A frame of this type and range; its payload, if any, is all 'byte'. */
static struct frame
expect_frame (struct fake *fake, uint32_t index, uint32_t type,
              uint64_t offset, uint64_t size, int byte)
{
  struct frame frame = take_frame (fake, index);
  char *payload = malloc (frame.payload + 1);

  CHECK (payload != NULL);
  CHECK_EQUAL (frame.type, type);
  CHECK_EQUAL (frame.offset, offset);
  CHECK_EQUAL (frame.size, size);
  CHECK_EQUAL (frame.payload, byte < 0 ? 0 : size);
  take (fake->fds[index], payload, frame.payload);
  for (uint32_t i = 0; i < frame.payload; i++)
    CHECK_EQUAL (payload[i], byte);
  free (payload);
  return frame;
}

static void
put_header (uint8_t *at, uint16_t magic, const struct frame *frame)
{
  lhb_put_le16 (at, magic);
  lhb_put_le32 (at + 2, frame->sequence);
  lhb_put_le32 (at + 6, frame->type);
  lhb_put_le64 (at + 10, frame->offset);
  lhb_put_le32 (at + 18, frame->size);
  lhb_put_le32 (at + 22, frame->payload);
}

static void
reply_raw (struct fake *fake, uint32_t index, uint16_t magic,
           struct frame frame, uint32_t payload, int byte)
{
  uint8_t *bytes = malloc (LHB_FRAME_BYTES + payload);

  CHECK (bytes != NULL);
  put_header (bytes, magic, &frame);
  memset (bytes + LHB_FRAME_BYTES, byte, payload);
  put (fake->fds[index], bytes, LHB_FRAME_BYTES + payload);
  free (bytes);
}

/* The reply that a good replica would give. */
static void
reply (struct fake *fake, uint32_t index, struct frame frame, int byte)
{
  uint32_t payload = frame.type == LHB_FRAME_READ ? frame.size : 0;

  frame.type = LHB_FRAME_RESPONSE;
  frame.payload = payload;
  reply_raw (fake, index, LHB_FRAME_MAGIC, frame, payload, byte);
}

static void
reply_error (struct fake *fake, uint32_t index, struct frame frame,
             const char *text, uint32_t size)
{
  uint8_t bytes[LHB_FRAME_BYTES];

  frame.type = LHB_FRAME_ERROR;
  frame.size = size;
  frame.payload = (uint32_t) strlen (text);
  put_header (bytes, LHB_FRAME_MAGIC, &frame);
  put (fake->fds[index], bytes, sizeof bytes);
  put (fake->fds[index], text, frame.payload);
}

static struct lhb_peer_statistics
statistics (struct fake *fake, uint32_t index)
{
  struct lhb_peer_statistics s;

  lhb_peer_statistics (fake->peers[index], &s);
  return s;
}

/* The last peer is lost for this reason. */
static void
expect_end (struct fake *fake, uint32_t reason)
{
  struct lhb_event event = engine_wait_event (fake->rig.engine);
  struct lhb_peer_statistics s = statistics (fake, 0);

  CHECK_EQUAL (event.type, LHB_EVENT_LAST_PEER_LOST);
  CHECK_EQUAL (event.subject_id, lhb_store_id (fake->peers[0]));
  CHECK_EQUAL (s.end_reason, reason);
  CHECK_EQUAL (s.ended, event.error);
  CHECK_EQUAL (rig_io (&fake->rig, LHB_OP_READ, 0, 0, 1, 0) < 0, 1);
}

/* ---- Frames. */

static void
check_change (struct fake *fake, uint32_t op, uint32_t flags, uint64_t offset,
              uint64_t length, const struct frame *want, int byte)
{
  struct rig_call call;

  rig_start (&fake->rig, &call, op, flags, offset, length, byte);
  for (; want->size > 0 || want->type == LHB_FRAME_FLUSH; want++)
    reply (fake, 0,
           expect_frame (fake, 0, want->type, want->offset, want->size,
                         want->payload > 0 ? byte : -1),
           0);
  CHECK_EQUAL (rig_finish (&call), 0);
}

#define FRAME(a, b, c, d)                                                     \
  { .type = LHB_FRAME_##a, .offset = (b), .size = (c), .payload = (d) }
#define FRAMES(...) ((const struct frame[]){ __VA_ARGS__, { 0 } })

static void
ours_is_asked_in_our_own_frames (void)
{
  struct fake fake;

  fake_open (&fake, 1, LHB_PEER_OURS, PATIENT_MS);
  check_change (&fake, LHB_OP_WRITE, 0, BLOCK, 2 * BLOCK,
                FRAMES (FRAME (WRITE, BLOCK, 2 * BLOCK, 1)), 'w');
  check_change (&fake, LHB_OP_WRITE, LHB_IO_FUA, 0, BLOCK,
                FRAMES (FRAME (WRITE_FUA, 0, BLOCK, 1)), 'f');
  check_change (&fake, LHB_OP_FLUSH, 0, 0, 0, FRAMES (FRAME (FLUSH, 0, 0, 0)),
                0);
  check_change (&fake, LHB_OP_TRIM, LHB_IO_FUA, 0, 2 * BLOCK,
                FRAMES (FRAME (TRIM, 0, 2 * BLOCK, 0), FRAME (FLUSH, 0, 0, 0)),
                0);
  check_change (&fake, LHB_OP_ZERO, 0, 0, BLOCK,
                FRAMES (FRAME (ZERO, 0, BLOCK, 0)), 0);
  check_change (&fake, LHB_OP_ZERO, LHB_IO_NO_HOLE, 0, BLOCK,
                FRAMES (FRAME (ZERO_NO_HOLE, 0, BLOCK, 0)), 0);
  check_change (&fake, LHB_OP_ZERO, LHB_IO_FAST_ZERO, 0, BLOCK,
                FRAMES (FRAME (ZERO_FAST, 0, BLOCK, 0)), 0);
  check_change (&fake, LHB_OP_ZERO, LHB_IO_FAST_ZERO | LHB_IO_NO_HOLE, 0,
                BLOCK, FRAMES (FRAME (ZERO_FAST_NO_HOLE, 0, BLOCK, 0)), 0);
  fake_close (&fake);
}

static void
longhorn_is_asked_to_read_and_write (void)
{
  const uint64_t most = LHB_PEER_ZERO_BYTES;
  struct fake fake;

  fake_open (&fake, 1, 0, PATIENT_MS);
  check_change (&fake, LHB_OP_WRITE, LHB_IO_FUA, 0, BLOCK,
                FRAMES (FRAME (WRITE, 0, BLOCK, 1)), 'f');
  CHECK_EQUAL (rig_io (&fake.rig, LHB_OP_FLUSH, 0, 0, 0, 0), 0);
  check_change (&fake, LHB_OP_TRIM, LHB_IO_FUA, BLOCK, most + BLOCK,
                FRAMES (FRAME (WRITE, BLOCK, most, 1),
                        FRAME (WRITE, BLOCK + most, BLOCK, 1)),
                0);
  CHECK_EQUAL (rig_io (&fake.rig, LHB_OP_ZERO, LHB_IO_FAST_ZERO, 0, BLOCK, 0),
               -EOPNOTSUPP);
  CHECK_EQUAL (statistics (&fake, 0).waiting, 0);
  CHECK_EQUAL (statistics (&fake, 0).in_flight, 0);
  fake_close (&fake);
}

/* What follows the step that failed is not asked for. */
static void
error_of_a_step_ends_the_call (void)
{
  struct rig_call call;
  struct fake fake;

  fake_open (&fake, 1, LHB_PEER_OURS, PATIENT_MS);
  rig_start (&fake.rig, &call, LHB_OP_TRIM, LHB_IO_FUA, 0, 2 * BLOCK + 1, 0);
  reply (&fake, 0,
         expect_frame (&fake, 0, LHB_FRAME_TRIM, 0, 2 * BLOCK, -1), 0);
  reply_error (&fake, 0,
               expect_frame (&fake, 0, LHB_FRAME_TRIM, 2 * BLOCK, 1, -1),
               "input/output error", 0);
  CHECK_EQUAL (rig_finish (&call), -EIO);
  check_change (&fake, LHB_OP_FLUSH, 0, 0, 0, FRAMES (FRAME (FLUSH, 0, 0, 0)),
                0);
  fake_close (&fake);
}

/* ---- Replies. */

static void
replies_may_come_in_any_order (void)
{
  enum { READS = 5 };
  struct rig_call calls[READS];
  struct frame frames[READS];
  struct fake fake;

  fake_open (&fake, 1, LHB_PEER_OURS, PATIENT_MS);
  for (uint32_t i = 0; i < READS; i++)
    {
      /* 1 byte to many blocks, at odd places. */
      uint64_t offset = i * (1 << 20) + 3 * i, length = 1 + 99999 * i;

      rig_start (&fake.rig, &calls[i], LHB_OP_READ, 0, offset, length, 0);
      frames[i] = expect_frame (&fake, 0, LHB_FRAME_READ, offset, length, -1);
    }
  for (int i = READS - 1; i >= 0; i--)
    reply (&fake, 0, frames[i], 'a' + i);
  for (int i = 0; i < READS; i++)
    {
      AWAIT (atomic_load (&calls[i].done));
      for (uint64_t at = 0; at < calls[i].length; at++)
        CHECK_EQUAL (calls[i].data[at], 'a' + i);
      CHECK_EQUAL (rig_finish (&calls[i]), 0);
    }
  CHECK_EQUAL (statistics (&fake, 0).frames_received, READS);
  fake_close (&fake);
}

static void
peer_that_closes_at_any_byte_ends (void)
{
  enum { LENGTH = 40 };

  for (uint32_t sent = 0; sent <= LHB_FRAME_BYTES + LENGTH; sent++)
    {
      uint8_t bytes[LHB_FRAME_BYTES + LENGTH];
      bool complete = sent == sizeof bytes;
      struct rig_call call;
      struct frame frame;
      struct fake fake;

      fake_open (&fake, 1, 0, PATIENT_MS);
      rig_start (&fake.rig, &call, LHB_OP_READ, 0, 7, LENGTH, 0);
      frame = expect_frame (&fake, 0, LHB_FRAME_READ, 7, LENGTH, -1);
      frame.type = LHB_FRAME_RESPONSE;
      frame.payload = LENGTH;
      put_header (bytes, LHB_FRAME_MAGIC, &frame);
      memset (bytes + LHB_FRAME_BYTES, 'x', LENGTH);
      put (fake.fds[0], bytes, sent);
      fake_hang_up (&fake, 0);
      CHECK_EQUAL (rig_finish (&call), complete ? 0 : -ECONNRESET);
      expect_end (&fake, sent == 0 || complete ? LHB_PEER_END_EOF
                                               : LHB_PEER_END_MID_REPLY);
      fake_close (&fake);
    }
}

/* Byte by byte, so that every state is met with half of what it needs. */
static void
replies_may_come_in_any_pieces (void)
{
  const char text[] = "no space left on device";
  uint8_t bytes[LHB_FRAME_BYTES];
  struct rig_call call;
  struct frame frame;
  struct fake fake;

  fake_open (&fake, 1, LHB_PEER_OURS, PATIENT_MS);
  rig_start (&fake.rig, &call, LHB_OP_WRITE, 0, 0, BLOCK, 'w');
  frame = expect_frame (&fake, 0, LHB_FRAME_WRITE, 0, BLOCK, 'w');
  frame.type = LHB_FRAME_ERROR;
  frame.size = 0;
  frame.payload = sizeof text - 1;
  put_header (bytes, LHB_FRAME_MAGIC, &frame);
  for (uint32_t i = 0; i < sizeof bytes; i++)
    {
      put (fake.fds[0], bytes + i, 1);
      AWAIT (statistics (&fake, 0).bytes_received == i + 1);
    }
  for (uint32_t i = 0; i < frame.payload; i++)
    {
      CHECK (!atomic_load (&call.done));
      put (fake.fds[0], text + i, 1);
      AWAIT (statistics (&fake, 0).bytes_received == sizeof bytes + i + 1);
    }
  CHECK_EQUAL (rig_finish (&call), -ENOSPC);
  fake_close (&fake);
}

static void
reply_that_makes_no_sense_ends_the_peer (void)
{
  static const struct {
    uint32_t op, reason;
    uint16_t magic;
    uint32_t type, sequence_add, size_add, payload;
  } cases[] = {
    { LHB_OP_READ, LHB_PEER_END_BAD_MAGIC, 0x1b02, 2, 0, 0, BLOCK },
    { LHB_OP_READ, LHB_PEER_END_BAD_MAGIC, 0, 2, 0, 0, BLOCK },
    { LHB_OP_READ, LHB_PEER_END_BAD_SEQUENCE, 0x1b01, 2, 1, 0, BLOCK },
    { LHB_OP_READ, LHB_PEER_END_BAD_SEQUENCE, 0x1b01, 2, 0xff, 0, BLOCK },
    { LHB_OP_READ, LHB_PEER_END_BAD_SEQUENCE, 0x1b01, 3, 256, 0, 0 },
    { LHB_OP_READ, LHB_PEER_END_BAD_TYPE, 0x1b01, 0, 0, 0, BLOCK },
    { LHB_OP_READ, LHB_PEER_END_BAD_TYPE, 0x1b01, 8, 0, 0, BLOCK },
    { LHB_OP_READ, LHB_PEER_END_BAD_TYPE, 0x1b01, 0xffffffff, 0, 0, 0 },
    { LHB_OP_READ, LHB_PEER_END_BAD_LENGTH, 0x1b01, 2, 0, 0, BLOCK - 1 },
    { LHB_OP_READ, LHB_PEER_END_BAD_LENGTH, 0x1b01, 2, 0, 0, BLOCK + 1 },
    { LHB_OP_READ, LHB_PEER_END_BAD_LENGTH, 0x1b01, 2, 0, 0, 0 },
    { LHB_OP_READ, LHB_PEER_END_BAD_LENGTH, 0x1b01, 3, 0, 0, 4097 },
    { LHB_OP_READ, LHB_PEER_END_BAD_LENGTH, 0x1b01, 4, 0, 0, 4097 },
    { LHB_OP_WRITE, LHB_PEER_END_BAD_LENGTH, 0x1b01, 2, 0, 0, 1 },
    { LHB_OP_WRITE, LHB_PEER_END_BAD_LENGTH, 0x1b01, 2, 0, 1, 0 },
    { LHB_OP_WRITE, LHB_PEER_END_BAD_LENGTH, 0x1b01, 2, 0, 4096, 0 },
    { LHB_OP_FLUSH, LHB_PEER_END_BAD_LENGTH, 0x1b01, 2, 0, 0, 0x7fffffff },
    { LHB_OP_READ, LHB_PEER_END_GOODBYE, 0, 5, 0, 0, 0 },
    { LHB_OP_READ, LHB_PEER_END_GOODBYE, 0x1b01, 5, 0, 0, 0 },
  };

  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
    {
      uint64_t length = cases[i].op == LHB_OP_FLUSH ? 0 : BLOCK;
      struct rig_call call;
      struct frame frame;
      struct fake fake;

      fake_open (&fake, 1, LHB_PEER_OURS, PATIENT_MS);
      rig_start (&fake.rig, &call, cases[i].op, 0, 0, length, 'w');
      frame = take_frame (&fake, 0);
      if (cases[i].op == LHB_OP_WRITE)
        take (fake.fds[0], (char[BLOCK]){ 0 }, BLOCK);
      frame.sequence += cases[i].sequence_add;
      frame.type = cases[i].type;
      frame.size += cases[i].size_add;
      frame.payload = cases[i].payload;
      reply_raw (&fake, 0, cases[i].magic, frame,
                 cases[i].payload > BLOCK ? 0 : cases[i].payload, 0);
      CHECK (rig_finish (&call) < 0);
      expect_end (&fake, cases[i].reason);
      fake_close (&fake);
    }
}

static void
second_reply_ends_the_peer (void)
{
  struct rig_call call;
  struct frame frame;
  struct fake fake;

  fake_open (&fake, 1, 0, PATIENT_MS);
  rig_start (&fake.rig, &call, LHB_OP_READ, 0, 0, 9, 0);
  frame = take_frame (&fake, 0);
  reply (&fake, 0, frame, 'r');
  CHECK_EQUAL (rig_finish (&call), 0);
  reply (&fake, 0, frame, 'r');
  expect_end (&fake, LHB_PEER_END_BAD_SEQUENCE);
  fake_close (&fake);
}

static void
error_texts_are_understood (void)
{
  static const struct {
    const char *text;
    int error;
  } cases[] = {
    { "write /data/volume-head-000.img: no space left on device", ENOSPC },
    { "unexpected EOF", EOVERFLOW },
    { "read-only file system", EROFS },
    { "operation not supported", EOPNOTSUPP },
    { "replica no longer exist", EIO },
    { "", EIO },
  };
  struct fake fake;

  fake_open (&fake, 1, LHB_PEER_OURS, PATIENT_MS);
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
    {
      struct rig_call call;

      rig_start (&fake.rig, &call, LHB_OP_WRITE, 0, 0, BLOCK, 'w');
      reply_error (&fake, 0,
                   expect_frame (&fake, 0, LHB_FRAME_WRITE, 0, BLOCK, 'w'),
                   cases[i].text, 0);
      CHECK_EQUAL (rig_finish (&call), -cases[i].error);
    }
  CHECK_EQUAL (statistics (&fake, 0).errors,
               sizeof cases / sizeof cases[0]);
  CHECK_EQUAL (statistics (&fake, 0).ended, 0);
  fake_close (&fake);
}

/* The replica's refusal comes before it has read the payload: the slab is in
 * use until it has. */
static void
early_error_waits_for_the_rest_of_its_frame (void)
{
  const uint64_t length = 4 << 20;
  char *rest = malloc (length);
  struct rig_call call;
  struct frame frame;
  struct fake fake;

  CHECK (rest != NULL);
  fake_open (&fake, 1, LHB_PEER_OURS, PATIENT_MS);
  rig_start (&fake.rig, &call, LHB_OP_WRITE, 0, 0, length, 'w');
  frame = take_frame (&fake, 0);
  reply_error (&fake, 0, frame, "no space left on device", 0);
  AWAIT (statistics (&fake, 0).errors == 1);
  CHECK_EQUAL (statistics (&fake, 0).frames_sent, 0);
  CHECK (!atomic_load (&call.done));
  take (fake.fds[0], rest, length);
  CHECK_EQUAL (rest[length - 1], 'w');
  CHECK_EQUAL (rig_finish (&call), -ENOSPC);
  /* The connection is still good. */
  rig_start (&fake.rig, &call, LHB_OP_READ, 0, 0, 1, 0);
  reply (&fake, 0, take_frame (&fake, 0), 'r');
  CHECK_EQUAL (rig_finish (&call), 0);
  fake_close (&fake);
  free (rest);
}

static void
early_success_ends_the_peer (void)
{
  struct rig_call call;
  struct frame frame;
  struct fake fake;

  fake_open (&fake, 1, LHB_PEER_OURS, PATIENT_MS);
  rig_start (&fake.rig, &call, LHB_OP_WRITE, 0, 0, 4 << 20, 'w');
  frame = take_frame (&fake, 0);
  reply (&fake, 0, frame, 0);
  CHECK (rig_finish (&call) < 0);
  expect_end (&fake, LHB_PEER_END_BAD_SEQUENCE);
  fake_close (&fake);
}

/* ---- Time. */

static void
request_without_a_reply_ends_the_peer_though_others_progress (void)
{
  struct rig_call silent, call;
  uint64_t answered = 0;
  struct fake fake;

  fake_open (&fake, 1, 0, 50);
  rig_start (&fake.rig, &silent, LHB_OP_WRITE, 0, 0, BLOCK, 'w');
  (void) expect_frame (&fake, 0, LHB_FRAME_WRITE, 0, BLOCK, 'w');
  /* Each of these is answered at once, until there is nobody to answer. */
  for (;; answered++)
    {
      uint8_t bytes[LHB_FRAME_BYTES + 1] = { 0 };
      struct frame frame;

      rig_start (&fake.rig, &call, LHB_OP_READ, 0, 2 * BLOCK, 1, 0);
      if (recv (fake.fds[0], bytes, 1, MSG_PEEK) <= 0)
        break;
      frame = take_frame (&fake, 0);
      frame.type = LHB_FRAME_RESPONSE;
      frame.payload = 1;
      put_header (bytes, LHB_FRAME_MAGIC, &frame);
      if (send (fake.fds[0], bytes, sizeof bytes, MSG_NOSIGNAL) < 0)
        break;
      if (rig_finish (&call) != 0)
        {
          rig_start (&fake.rig, &call, LHB_OP_READ, 0, 2 * BLOCK, 1, 0);
          break;
        }
    }
  CHECK (rig_finish (&call) < 0);
  CHECK_EQUAL (rig_finish (&silent), -ETIMEDOUT);
  CHECK (answered > 0);
  CHECK_EQUAL (statistics (&fake, 0).timeouts, 1);
  expect_end (&fake, LHB_PEER_END_TIMEOUT);
  fake_close (&fake);
}

static void
frame_that_cannot_be_sent_times_out (void)
{
  struct rig_call call;
  struct fake fake;

  fake_open (&fake, 1, 0, 50);
  rig_start (&fake.rig, &call, LHB_OP_WRITE, 0, 0, 4 << 20, 'w');
  CHECK_EQUAL (rig_finish (&call), -ETIMEDOUT);
  expect_end (&fake, LHB_PEER_END_TIMEOUT);
  fake_close (&fake);
}

/* ---- Bounds. */

static void
frames_that_do_not_fit_wait (void)
{
  enum { READS = 200 };
  const uint32_t most = LHB_PEER_IN_FLIGHT_MAX;
  struct client client;
  struct fake fake;
  char byte;

  fake_open (&fake, 1, 0, PATIENT_MS);
  client = client_open (&fake.rig, 0);
  for (uint32_t i = 0; i < READS; i++)
    client_send (&client, 0, NBD_CMD_READ, i * BLOCK, 1);
  AWAIT (statistics (&fake, 0).in_flight + statistics (&fake, 0).waiting
         == READS);
  CHECK_EQUAL (statistics (&fake, 0).in_flight, most);
  for (uint32_t i = 0; i < READS; i++)
    {
      reply (&fake, 0,
             expect_frame (&fake, 0, LHB_FRAME_READ, i * BLOCK, 1, -1),
             (int) i);
      CHECK_EQUAL (client_receive (&client).error, 0);
      client_receive_bytes (&client, &byte, 1);
      CHECK_EQUAL (byte, (char) i);
    }
  CHECK_EQUAL (statistics (&fake, 0).waiting, 0);
  close (client.fd);
  fake_close (&fake);
}

static void
waiting_frames_end_with_the_peer (void)
{
  enum { READS = 200 };
  struct client client;
  struct fake fake;

  fake_open (&fake, 1, 0, PATIENT_MS);
  client = client_open (&fake.rig, 0);
  for (uint32_t i = 0; i < READS; i++)
    client_send (&client, 0, NBD_CMD_READ, i * BLOCK, 1);
  AWAIT (statistics (&fake, 0).waiting == READS - LHB_PEER_IN_FLIGHT_MAX);
  fake_hang_up (&fake, 0);
  for (uint32_t i = 0; i < READS; i++)
    CHECK_EQUAL (client_receive (&client).error, NBD_EIO);
  close (client.fd);
  fake_close (&fake);
}

/* ---- The replica set. */

static void
idle_peer_that_hangs_up_is_dropped (void)
{
  struct lhb_event event;
  struct rig_call call;
  struct fake fake;

  fake_open (&fake, 2, LHB_PEER_OURS, PATIENT_MS);
  fake_hang_up (&fake, 1);
  event = engine_wait_event (fake.rig.engine);
  CHECK_EQUAL (event.type, LHB_EVENT_STORE_FAILED);
  CHECK_EQUAL (event.subject_id, lhb_store_id (fake.peers[1]));
  CHECK_EQUAL (event.error, ECONNRESET);
  CHECK_EQUAL (statistics (&fake, 1).end_reason, LHB_PEER_END_EOF);
  /* What it misses is not acknowledged before the fence. */
  rig_start (&fake.rig, &call, LHB_OP_WRITE, 0, 0, BLOCK, 'w');
  reply (&fake, 0, expect_frame (&fake, 0, LHB_FRAME_WRITE, 0, BLOCK, 'w'),
         0);
  AWAIT (rig_held (&fake.rig) == 1);
  CHECK_EQUAL (lhb_volume_fenced (fake.rig.volume, event.subject_id), 0);
  CHECK_EQUAL (rig_finish (&call), 0);
  CHECK (!rig_has_event (&fake.rig));
  fake_close (&fake);
}

static void
read_that_fails_is_tried_elsewhere (void)
{
  struct lhb_event event;
  struct rig_call call;
  struct fake fake;

  fake_open (&fake, 2, LHB_PEER_OURS, PATIENT_MS);
  rig_start (&fake.rig, &call, LHB_OP_READ, 0, 0, 9, 0);
  reply_error (&fake, 0, expect_frame (&fake, 0, LHB_FRAME_READ, 0, 9, -1),
               "input/output error", 18);
  reply (&fake, 1, expect_frame (&fake, 1, LHB_FRAME_READ, 0, 9, -1), 'r');
  CHECK_EQUAL (rig_finish (&call), 0);
  event = engine_wait_event (fake.rig.engine);
  CHECK_EQUAL (event.type, LHB_EVENT_STORE_FAILED);
  CHECK_EQUAL (event.subject_id, lhb_store_id (fake.peers[0]));
  fake_close (&fake);
}

/* The edges of a write are read from one peer, then from the other. */
static void
edges_come_from_a_peer_that_can_be_read (void)
{
  struct rig_call call;
  struct frame frames[2];
  char block[BLOCK];
  struct fake fake;

  fake_open (&fake, 2, LHB_PEER_OURS, PATIENT_MS);
  rig_start (&fake.rig, &call, LHB_OP_WRITE, 0, BLOCK - 1, 2, 'w');
  for (int i = 0; i < 2; i++)
    frames[i] = expect_frame (&fake, 0, LHB_FRAME_READ, (uint64_t) i * BLOCK,
                              BLOCK, -1);
  reply (&fake, 0, frames[0], '?');
  reply_error (&fake, 0, frames[1], "input/output error", 18);
  for (int i = 0; i < 2; i++)
    reply (&fake, 1,
           expect_frame (&fake, 1, LHB_FRAME_READ, (uint64_t) i * BLOCK,
                         BLOCK, -1),
           'a' + i);
  for (uint32_t i = 0; i < 2; i++)
    {
      struct frame frame = take_frame (&fake, i);

      CHECK_EQUAL (frame.type, LHB_FRAME_WRITE);
      CHECK_EQUAL (frame.payload, 2 * BLOCK);
      take (fake.fds[i], block, BLOCK);
      CHECK_EQUAL (block[0], 'a');
      CHECK_EQUAL (block[BLOCK - 2], 'a');
      CHECK_EQUAL (block[BLOCK - 1], 'w');
      take (fake.fds[i], block, BLOCK);
      CHECK_EQUAL (block[0], 'w');
      CHECK_EQUAL (block[1], 'b');
      reply (&fake, i, frame, 0);
    }
  CHECK_EQUAL (rig_finish (&call), 0);
  CHECK (!rig_has_event (&fake.rig));
  fake_close (&fake);
}

static void
full_peers_that_did_the_same_all_stay (void)
{
  static const struct {
    uint32_t done[FAKES_MAX];
    int dropped;
  } cases[] = {
    { { 0, 0, 0 }, 0 },
    { { BLOCK, BLOCK, BLOCK }, 0 },
    { { 0, BLOCK, BLOCK }, 1 },
    { { BLOCK, LHB_FRAME_UNSURE, 0 }, 2 },
    { { 3 * BLOCK, BLOCK, BLOCK }, 1 },       /* more than was asked for */
  };

  for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++)
    {
      struct lhb_event event;
      struct rig_call call;
      struct fake fake;
      int dropped = 0;

      fake_open (&fake, FAKES_MAX, LHB_PEER_OURS, PATIENT_MS);
      rig_start (&fake.rig, &call, LHB_OP_WRITE, 0, 0, 2 * BLOCK, 'w');
      for (uint32_t i = 0; i < FAKES_MAX; i++)
        reply_error (
            &fake, i,
            expect_frame (&fake, i, LHB_FRAME_WRITE, 0, 2 * BLOCK, 'w'),
            "no space left on device", cases[c].done[i]);
      do
        {
          event = engine_wait_event (fake.rig.engine);
          if (event.type == LHB_EVENT_STORE_FAILED)
            {
              dropped++;
              CHECK_EQUAL (
                  lhb_volume_fenced (fake.rig.volume, event.subject_id), 0);
            }
        }
      while (event.type != LHB_EVENT_OUT_OF_SPACE);
      CHECK_EQUAL (rig_finish (&call), -ENOSPC);
      CHECK_EQUAL (dropped, cases[c].dropped);
      fake_close (&fake);
    }
}

/* ---- Opening. */

static void
wrong_peers_are_refused (void)
{
  struct fake fake = { .count = 1 };
  int fds[2];

  fake.rig.engine = engine_make (LHB_DRIVER_POOL, 2);
  CHECK_EQUAL (lhb_engine_queues (fake.rig.engine), 2);
  CHECK_EQUAL (lhb_peer_open (fake.rig.engine, SIZE + 1, 0, 1, &fake.peers[0]),
               -EINVAL);
  CHECK_EQUAL (lhb_peer_open (fake.rig.engine, SIZE, 2, 1, &fake.peers[0]),
               -EINVAL);
  CHECK_EQUAL (lhb_peer_open (fake.rig.engine, SIZE, 0, 0, &fake.peers[0]),
               -EINVAL);
  CHECK_EQUAL (lhb_volume_open (fake.rig.engine, SIZE, 0, &fake.rig.volume),
               0);
  fake_open_peer (&fake, 0, 0, 1);
  CHECK_EQUAL (socketpair (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  CHECK_EQUAL (lhb_peer_add_connection (fake.peers[0], 2, fds[0]), -EINVAL);
  CHECK_EQUAL (lhb_peer_add_connection (fake.peers[0], 1, -1), -EBADF);
  /* The second queue could not reach it. */
  CHECK_EQUAL (
      lhb_volume_publish (fake.rig.volume, fake.peers, NULL, 1), -ENOTCONN);
  for (int i = 1; i < LHB_PEER_CONNECTIONS_MAX; i++)
    CHECK_EQUAL (lhb_peer_add_connection (fake.peers[0], 0, dup (fds[0])), 0);
  CHECK_EQUAL (lhb_peer_add_connection (fake.peers[0], 0, fds[0]), -EMFILE);
  CHECK_EQUAL (lhb_peer_add_connection (fake.peers[0], 1, dup (fds[0])), 0);
  CHECK_EQUAL (lhb_volume_publish (fake.rig.volume, fake.peers,
                                   (uint32_t[]){ LHB_MODE_WO }, 1),
               -EINVAL);
  CHECK_EQUAL (lhb_volume_publish (fake.rig.volume, fake.peers,
                                   (uint32_t[]){ LHB_MODE_WO + 1 }, 1),
               -EINVAL);
  CHECK_EQUAL (lhb_volume_publish (fake.rig.volume, fake.peers, NULL, 1), 0);
  CHECK_EQUAL (lhb_peer_add_connection (fake.peers[0], 1, fds[0]), -EBUSY);
  CHECK_EQUAL (lhb_peer_resize (fake.peers[0], SIZE - BLOCK), -EINVAL);
  close (fds[0]);
  close (fds[1]);
  expect_end (&fake, LHB_PEER_END_EOF);
  CHECK_EQUAL (lhb_volume_publish (fake.rig.volume, fake.peers, NULL, 1),
               -ENOTCONN);
  fake_close (&fake);
}

static void
resized_peer_is_reached_up_to_its_new_end (void)
{
  struct rig_call call;
  struct fake fake;

  fake_open (&fake, 1, LHB_PEER_OURS, PATIENT_MS);
  CHECK_EQUAL (rig_io (&fake.rig, LHB_OP_READ, 0, SIZE, 1, 0), -EINVAL);
  CHECK_EQUAL (lhb_volume_freeze (fake.rig.volume), 0);
  CHECK_EQUAL (lhb_peer_resize (fake.peers[0], 2 * SIZE), 0);
  CHECK_EQUAL (lhb_volume_resize (fake.rig.volume, 2 * SIZE), 0);
  CHECK_EQUAL (lhb_volume_publish (fake.rig.volume, fake.peers, NULL, 1), 0);
  lhb_volume_thaw (fake.rig.volume);
  rig_start (&fake.rig, &call, LHB_OP_READ, 0, 2 * SIZE - 1, 1, 0);
  reply (&fake, 0,
         expect_frame (&fake, 0, LHB_FRAME_READ, 2 * SIZE - 1, 1, -1), 'r');
  CHECK_EQUAL (rig_finish (&call), 0);
  fake_close (&fake);
}

static void
failed_calls_end_the_peer_or_are_reported (void)
{
  static const struct {
    const char *point;
    int error;
  } points[] = { { "peer.send", EPIPE }, { "peer.receive", ECONNRESET } };
  lhb_engine *engine;
  lhb_store *peer;
  int fds[2];

  for (size_t i = 0; i < 2; i++)
    {
      struct rig_call call;
      struct fake fake;

      fake_open (&fake, 1, LHB_PEER_OURS, PATIENT_MS);
      CHECK_EQUAL (lhb_fault_arm (points[i].point, points[i].error,
                                  lhb_store_id (fake.peers[0]), 0, 1),
                   0);
      rig_start (&fake.rig, &call, LHB_OP_READ, 0, 0, 1, 0);
      if (i == 1)
        reply (&fake, 0, take_frame (&fake, 0), 'r');
      CHECK_EQUAL (rig_finish (&call), -points[i].error);
      expect_end (&fake, LHB_PEER_END_SOCKET_ERROR);
      fake_close (&fake);
    }
  engine = engine_make (LHB_DRIVER_POOL, 1);
  CHECK_EQUAL (lhb_fault_arm ("peer.alloc", ENOMEM, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_peer_open (engine, SIZE, 0, 1, &peer), -ENOMEM);
  CHECK_EQUAL (lhb_peer_open (engine, SIZE, 0, 1, &peer), 0);
  CHECK_EQUAL (socketpair (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  CHECK_EQUAL (lhb_fault_arm ("peer.alloc", ENOMEM, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_peer_add_connection (peer, 0, fds[0]), -ENOMEM);
  CHECK_EQUAL (lhb_fault_arm ("peer.watch", ENOSPC, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_peer_add_connection (peer, 0, fds[0]), 0);
  AWAIT (recv (fds[1], (char[1]){ 0 }, 1, 0) == 0);
  CHECK_EQUAL (lhb_peer_add_connection (peer, 0, fds[1]), -ENOTCONN);
  close (fds[1]);
  lhb_store_close (peer);
  lhb_engine_close (engine);
}

static const struct lhb_test tests[] = {
  LHB_TEST (ours_is_asked_in_our_own_frames),
  LHB_TEST (longhorn_is_asked_to_read_and_write),
  LHB_TEST (error_of_a_step_ends_the_call),
  LHB_TEST (replies_may_come_in_any_order),
  LHB_TEST (peer_that_closes_at_any_byte_ends),
  LHB_TEST (replies_may_come_in_any_pieces),
  LHB_TEST (reply_that_makes_no_sense_ends_the_peer),
  LHB_TEST (second_reply_ends_the_peer),
  LHB_TEST (error_texts_are_understood),
  LHB_TEST (early_error_waits_for_the_rest_of_its_frame),
  LHB_TEST (early_success_ends_the_peer),
  LHB_TEST (request_without_a_reply_ends_the_peer_though_others_progress),
  LHB_TEST (frame_that_cannot_be_sent_times_out),
  LHB_TEST (frames_that_do_not_fit_wait),
  LHB_TEST (waiting_frames_end_with_the_peer),
  LHB_TEST (idle_peer_that_hangs_up_is_dropped),
  LHB_TEST (read_that_fails_is_tried_elsewhere),
  LHB_TEST (edges_come_from_a_peer_that_can_be_read),
  LHB_TEST (full_peers_that_did_the_same_all_stay),
  LHB_TEST (wrong_peers_are_refused),
  LHB_TEST (resized_peer_is_reached_up_to_its_new_end),
  LHB_TEST (failed_calls_end_the_peer_or_are_reported),
};

LHB_TEST_MAIN (tests)
