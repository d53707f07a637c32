/* Fuzz target: the bytes that a remote replica sends.
 *
 * Two reads, a write and a flush wait for their replies when the input arrives
 * in place of them; then the stream ends.  Whatever it was, each of the four is
 * answered, the peer ends once, and the next one begins like the first, so that
 * sequence numbers are known: 0, 0x101, 0x202, 0x303.
 */

#include "lhb_fuzz.h"
#include "../tests/lhb_client.h"

#define SIZE ((uint64_t) 1 << 20)

enum { REQUESTS = 4, LARGE_BYTES = 70000 };

static struct rig rig;
static lhb_store *peer;

static void
close_rig (void)
{
  lhb_volume_close (rig.volume);
  lhb_store_close (peer);
  lhb_engine_close (rig.engine);
}

static void
open_rig (void)
{
  if (rig.engine != NULL)
    return;
  lhb_test_name = "fuzz_peer";
  rig.engine = engine_make (LHB_DRIVER_POOL, 1);
  CHECK_EQUAL (lhb_volume_open (rig.engine, SIZE, 0, &rig.volume), 0);
  CHECK_EQUAL (atexit (close_rig), 0);
}

/* In the place of the one before.  Returns the replica's end. */
static int
renew_peer (uint32_t flags)
{
  lhb_store *before = peer;
  int fds[2];

  CHECK_EQUAL (lhb_peer_open (rig.engine, SIZE, flags, 60000, &peer), 0);
  CHECK_EQUAL (socketpair (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  CHECK_EQUAL (lhb_peer_add_connection (peer, 0, fds[0]), 0);
  CHECK_EQUAL (lhb_volume_freeze (rig.volume), 0);
  CHECK_EQUAL (lhb_volume_publish (rig.volume, &peer, NULL, 1), 0);
  lhb_volume_thaw (rig.volume);
  lhb_store_close (before);
  return fds[1];
}

static void
ask (struct client *client)
{
  static const char block[BLOCK];

  client_send (client, 0, NBD_CMD_READ, 0, BLOCK);
  client_send (client, 0, NBD_CMD_READ, 5 * BLOCK + 7, LARGE_BYTES);
  client_send (client, 0, NBD_CMD_WRITE, 100 * BLOCK, BLOCK);
  client_send_bytes (client, block, BLOCK);
  client_send (client, 0, NBD_CMD_FLUSH, 0, 0);
}

/* What was asked is of no interest, but the peer must have asked it. */
static void
take_questions (int fd)
{
  size_t left = REQUESTS * LHB_FRAME_BYTES + BLOCK;
  char bytes[REQUESTS * LHB_FRAME_BYTES + BLOCK];

  while (left > 0)
    {
      ssize_t got = recv (fd, bytes, left, 0);

      if (got == -1 && errno == EINTR)
        continue;
      CHECK (got > 0);
      left -= (size_t) got;
    }
}

/* Until the peer has had enough. */
static void
answer (int fd, const uint8_t *data, size_t length)
{
  while (length > 0)
    {
      ssize_t sent = send (fd, data, length, MSG_NOSIGNAL);

      if (sent == -1 && errno == EINTR)
        continue;
      if (sent == -1)
        return;
      data += sent;
      length -= (size_t) sent;
    }
}

static void
take_answers (struct client *client)
{
  static char data[LARGE_BYTES];

  for (int i = 0; i < REQUESTS; i++)
    {
      struct client_reply reply = client_receive (client);

      CHECK (reply.cookie >= 1 && reply.cookie <= REQUESTS);
      if (reply.error == 0 && reply.cookie <= 2)
        client_receive_bytes (client, data,
                              reply.cookie == 1 ? BLOCK : LARGE_BYTES);
    }
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t length)
{
  struct lhb_peer_statistics statistics;
  struct lhb_event event;
  struct client client;
  int fd;

  if (length < 1)
    return 0;
  open_rig ();
  /* A flush needs a frame only where the peer is ours. */
  fd = renew_peer (LHB_PEER_OURS);
  client = client_open (&rig, 0);
  ask (&client);
  take_questions (fd);
  answer (fd, data, length);
  CHECK (shutdown (fd, SHUT_WR) == 0 || errno == ENOTCONN);
  take_answers (&client);
  do
    event = engine_wait_event (rig.engine);
  while (event.type == LHB_EVENT_OUT_OF_SPACE);
  CHECK_EQUAL (event.type, LHB_EVENT_LAST_PEER_LOST);
  lhb_peer_statistics (peer, &statistics);
  CHECK (statistics.ended != 0);
  CHECK (statistics.end_reason > LHB_PEER_END_CLOSED
         && statistics.end_reason != LHB_PEER_END_TIMEOUT);
  CHECK_EQUAL (statistics.in_flight + statistics.waiting, 0);
  close (fd);
  client_close (&client, LHB_CLOSE_EOF);
  return 0;
}
