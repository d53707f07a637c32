/* NBD transmission: every command and what is wrong with it, how connections
 * end, and what they do to each other. */

#include <dirent.h>

#include "lhb_client.h"

#define BLOCKS 64
#define SIZE ((uint64_t) BLOCKS * BLOCK)
#define MIB (1u << 20)

/* ---- Nothing is left behind. */

static int
count_fds (void)
{
  DIR *dir = opendir ("/proc/self/fd");
  int count = 0;

  CHECK (dir != NULL);
  while (readdir (dir) != NULL)
    count++;
  closedir (dir);
  return count;
}

static uint64_t
address_space_bytes (void)
{
  FILE *file = fopen ("/proc/self/statm", "r");
  unsigned long long pages;

  CHECK (file != NULL);
  CHECK_EQUAL (fscanf (file, "%llu", &pages), 1);
  fclose (file);
  return pages * (uint64_t) sysconf (_SC_PAGESIZE);
}

static int fds_before;

static void
open_rig (struct rig *rig, uint32_t stores, uint64_t blocks)
{
  fds_before = count_fds ();
  rig_open (rig, LHB_DRIVER_AUTO, 0, stores, blocks);
}

static void
close_rig (struct rig *rig)
{
  rig_close (rig);
  CHECK_EQUAL (count_fds (), fds_before);
}

/* ---- Commands. */

static void
check_commands (uint32_t flags)
{
  struct rig rig;
  struct client client;
  char *model, *data = blocks_alloc (BLOCKS);

  open_rig (&rig, 2, BLOCKS);
  model = rig_model (&rig);
  client = client_open (&rig, flags);
  CHECK_EQUAL (client_read (&client, 0, SIZE, data), 0);
  CHECK (memcmp (data, model, SIZE) == 0);
  memset (data, 'w', SIZE);
  CHECK_EQUAL (client_write (&client, 0, BLOCK, 3 * BLOCK, data), 0);
  CHECK_EQUAL (
      client_write (&client, NBD_CMD_FLAG_FUA, 8 * BLOCK, BLOCK, data), 0);
  CHECK_EQUAL (client_call (&client, 0, NBD_CMD_FLUSH, 0, 0), 0);
  CHECK_EQUAL (client_call (&client, NBD_CMD_FLAG_FUA, NBD_CMD_TRIM, BLOCK,
                            BLOCK),
               0);
  CHECK_EQUAL (client_call (&client, 0, NBD_CMD_CACHE, 0, SIZE), 0);
  CHECK_EQUAL (client_call (&client,
                            NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE,
                            NBD_CMD_WRITE_ZEROES, 12 * BLOCK, 2 * BLOCK),
               0);
  CHECK_EQUAL (client_call (&client, NBD_CMD_FLAG_FAST_ZERO,
                            NBD_CMD_WRITE_ZEROES, 30 * BLOCK, 2 * BLOCK),
               0);
  memset (model + BLOCK, 'w', 3 * BLOCK);
  memset (model + 8 * BLOCK, 'w', BLOCK);
  memset (model + BLOCK, 0, BLOCK);
  memset (model + 12 * BLOCK, 0, 2 * BLOCK);
  CHECK_EQUAL (client_read (&client, 0, SIZE, data), 0);
  CHECK (memcmp (data, model, SIZE) == 0);
  rig_check (&rig, model);
  client_send (&client, 0, NBD_CMD_DISC, 0, 0);
  client_expect_end (&client);
  client_close (&client, LHB_CLOSE_CLIENT);
  free (model);
  free (data);
  close_rig (&rig);
}

static void
every_command_with_simple_replies (void)
{
  check_commands (0);
}

static void
every_command_with_structured_replies (void)
{
  check_commands (LHB_NBD_STRUCTURED);
}

static void
reads_and_writes_of_any_alignment_equal_a_model (void)
{
  struct rig rig;
  struct client client;
  char *model, *data = blocks_alloc (BLOCKS);
  uint64_t state = lhb_test_seed;

  open_rig (&rig, 3, BLOCKS);
  model = rig_model (&rig);
  client = client_open (&rig, LHB_NBD_STRUCTURED);
  for (int step = 0; step < 400; step++)
    {
      static const uint16_t types[] = { NBD_CMD_READ, NBD_CMD_WRITE,
                                        NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES };
      uint16_t type = types[lhb_test_below (&state, 4)];
      uint64_t offset = lhb_test_below (&state, SIZE);
      uint32_t length = 1 + (uint32_t) lhb_test_below (&state, 5 * BLOCK);

      if (length > SIZE - offset)
        length = (uint32_t) (SIZE - offset);
      memset (data, step, length);
      if (type == NBD_CMD_READ)
        {
          CHECK_EQUAL (client_read (&client, offset, length, data), 0);
          CHECK (memcmp (data, model + offset, length) == 0);
        }
      else if (type == NBD_CMD_WRITE)
        {
          CHECK_EQUAL (client_write (&client, 0, offset, length, data), 0);
          memcpy (model + offset, data, length);
        }
      else
        {
          CHECK_EQUAL (client_call (&client, 0, type, offset, length), 0);
          memset (model + offset, 0, length);
        }
    }
  rig_check (&rig, model);
  client_close (&client, LHB_CLOSE_EOF);
  free (model);
  free (data);
  close_rig (&rig);
}

static uint32_t
receive_status (struct client *client, uint32_t *pairs)
{
  struct client_reply reply = client_receive (client);
  uint32_t words[1 + 2 * BLOCKS];

  CHECK_EQUAL (reply.cookie, client->cookie);
  CHECK_EQUAL (reply.error, 0);
  CHECK_EQUAL (reply.type, NBD_REPLY_TYPE_BLOCK_STATUS);
  CHECK (reply.length >= 12 && reply.length <= sizeof words);
  CHECK_EQUAL (reply.length % 8, 4);
  client_receive_bytes (client, words, reply.length);
  CHECK_EQUAL (be32toh (words[0]), CONTEXT_ID);
  for (uint32_t i = 1; i < reply.length / 4; i++)
    pairs[i - 1] = be32toh (words[i]);
  return reply.length / 8;
}

static void
block_status_tells_data_from_holes (void)
{
  const uint32_t third = BLOCKS / 3;
  struct rig rig;
  struct client client;
  uint32_t pairs[2 * BLOCKS];

  open_rig (&rig, 1, BLOCKS);
  client = client_open (&rig, LHB_NBD_STRUCTURED | LHB_NBD_BASE_ALLOCATION);
  CHECK_EQUAL (client_call (&client, 0, NBD_CMD_TRIM, BLOCK, BLOCK), 0);
  client_send (&client, 0, NBD_CMD_BLOCK_STATUS, 100, SIZE - 200);
  CHECK_EQUAL (receive_status (&client, pairs), 4);
  CHECK_EQUAL (pairs[0], BLOCK - 100);
  CHECK_EQUAL (pairs[1], 0);
  CHECK_EQUAL (pairs[2], BLOCK);
  CHECK_EQUAL (pairs[3], NBD_STATE_HOLE | NBD_STATE_ZERO);
  CHECK_EQUAL (pairs[4], (third - 2) * BLOCK);
  CHECK_EQUAL (pairs[5], 0);
  CHECK_EQUAL (pairs[6], SIZE - third * BLOCK - 100);
  CHECK_EQUAL (pairs[7], NBD_STATE_HOLE | NBD_STATE_ZERO);
  client_send (&client, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_BLOCK_STATUS, 0, SIZE);
  CHECK_EQUAL (receive_status (&client, pairs), 1);
  CHECK_EQUAL (pairs[0], BLOCK);
  CHECK_EQUAL (
      client_call (&client, 0, NBD_CMD_BLOCK_STATUS, SIZE - 1, 2), NBD_EINVAL);
  client_close (&client, LHB_CLOSE_EOF);
  client = client_open (&rig, LHB_NBD_STRUCTURED);
  CHECK_EQUAL (client_call (&client, 0, NBD_CMD_BLOCK_STATUS, 0, SIZE),
               NBD_EINVAL);
  client_close (&client, LHB_CLOSE_EOF);
  close_rig (&rig);
}

/* Reply sizes are bounded: the client asks again for the rest. */
static void
block_status_of_many_extents_is_cut_short (void)
{
  const uint64_t blocks = 3 * (2 * LHB_NBD_EXTENTS_MAX + 100);
  struct rig rig;
  struct client client;
  uint64_t covered = 0;
  int replies = 0;

  open_rig (&rig, 1, blocks);
  client = client_open (&rig, LHB_NBD_STRUCTURED | LHB_NBD_BASE_ALLOCATION);
  for (uint64_t block = blocks / 3; block < blocks; block += 2)
    CHECK_EQUAL (rig_io (&rig, LHB_OP_WRITE, 0, block * BLOCK, 1, 'w'), 0);
  while (covered < blocks * BLOCK)
    {
      static uint32_t words[1 + 2 * LHB_NBD_EXTENTS_MAX];
      struct client_reply reply;

      client_send (&client, 0, NBD_CMD_BLOCK_STATUS, covered,
                   (uint32_t) (blocks * BLOCK - covered));
      reply = client_receive (&client);
      CHECK_EQUAL (reply.error, 0);
      CHECK (reply.length <= sizeof words);
      client_receive_bytes (&client, words, reply.length);
      for (uint32_t i = 1; i < reply.length / 4; i += 2)
        covered += be32toh (words[i]);
      replies++;
    }
  CHECK_EQUAL (covered, blocks * BLOCK);
  CHECK (replies >= 4);
  client_close (&client, LHB_CLOSE_EOF);
  close_rig (&rig);
}

/* ---- Wrong requests: answered, and the connection goes on. */

struct wrong {
  uint16_t flags, type;
  uint64_t offset;
  uint32_t length, error;
};

static void
check_refused (struct client *client, const struct wrong *wrong)
{
  static char data[8192];

  client_send (client, wrong->flags, wrong->type, wrong->offset,
               wrong->length);
  if (wrong->type == NBD_CMD_WRITE)
    client_send_bytes (client, data, wrong->length);
  CHECK_EQUAL (client_receive_error (client), wrong->error);
}

static void
wrong_requests_are_answered_with_their_error (void)
{
  static const struct wrong wrongs[] = {
    { 0, NBD_CMD_READ, SIZE, 1, NBD_EINVAL },
    { 0, NBD_CMD_READ, SIZE - 1, 2, NBD_EINVAL },
    { 0, NBD_CMD_READ, UINT64_MAX, 1, NBD_EINVAL },
    { 0, NBD_CMD_READ, UINT64_MAX - 1, UINT32_MAX, NBD_EINVAL },
    { 0, NBD_CMD_READ, 0, 0, NBD_EINVAL },
    { 0, NBD_CMD_READ, 0, UINT32_MAX, NBD_EINVAL },
    { NBD_CMD_FLAG_NO_HOLE, NBD_CMD_READ, 0, 1, NBD_EINVAL },
    { 1 << 15, NBD_CMD_READ, 0, 1, NBD_EINVAL },
    { 0, NBD_CMD_WRITE, SIZE, 1, NBD_ENOSPC },
    { 0, NBD_CMD_WRITE, SIZE - 1, 8192, NBD_ENOSPC },
    { 0, NBD_CMD_WRITE, UINT64_MAX - 10, 8192, NBD_ENOSPC },
    { 0, NBD_CMD_WRITE, 0, 0, NBD_EINVAL },
    { NBD_CMD_FLAG_DF, NBD_CMD_WRITE, 0, 100, NBD_EINVAL },
    { 1 << 15, NBD_CMD_WRITE, 0, 8192, NBD_EINVAL },
    { 0, NBD_CMD_FLUSH, 0, 1, NBD_EINVAL },
    { 0, NBD_CMD_FLUSH, 1, 0, NBD_EINVAL },
    { NBD_CMD_FLAG_REQ_ONE, NBD_CMD_FLUSH, 0, 0, NBD_EINVAL },
    { 0, NBD_CMD_TRIM, SIZE, 1, NBD_EINVAL },
    { 0, NBD_CMD_TRIM, 0, 0, NBD_EINVAL },
    { NBD_CMD_FLAG_FAST_ZERO, NBD_CMD_TRIM, 0, 1, NBD_EINVAL },
    { 0, NBD_CMD_CACHE, 1, SIZE, NBD_EINVAL },
    { 0, NBD_CMD_WRITE_ZEROES, 1, SIZE, NBD_ENOSPC },
    { 0, NBD_CMD_WRITE_ZEROES, 1, 0, NBD_EINVAL },
    { NBD_CMD_FLAG_REQ_ONE, NBD_CMD_WRITE_ZEROES, 0, 1, NBD_EINVAL },
    { 0, NBD_CMD_BLOCK_STATUS, 0, 1, NBD_EINVAL },
    { 0, 8, 0, 1, NBD_EINVAL },
    { 0, UINT16_MAX, 0, UINT32_MAX, NBD_EINVAL },
  };
  struct rig rig;
  char *model;

  open_rig (&rig, 1, BLOCKS);
  model = rig_model (&rig);
  for (uint32_t flags = 0; flags <= LHB_NBD_STRUCTURED; flags++)
    {
      struct client client = client_open (&rig, flags);

      for (size_t i = 0; i < sizeof wrongs / sizeof wrongs[0]; i++)
        check_refused (&client, &wrongs[i]);
      client_close (&client, LHB_CLOSE_EOF);
    }
  rig_check (&rig, model);
  free (model);
  close_rig (&rig);
}

static void
do_not_fragment_needs_structured_replies (void)
{
  struct rig rig;
  struct client client;
  struct client_reply reply;
  char data[10];

  open_rig (&rig, 1, BLOCKS);
  client = client_open (&rig, 0);
  CHECK_EQUAL (client_call (&client, NBD_CMD_FLAG_DF, NBD_CMD_READ, 0, 10),
               NBD_EINVAL);
  client_close (&client, LHB_CLOSE_EOF);
  client = client_open (&rig, LHB_NBD_STRUCTURED);
  client_send (&client, NBD_CMD_FLAG_DF, NBD_CMD_READ, 0, 10);
  reply = client_receive (&client);
  client_receive_data (&client, &reply, 0, 10, data);
  client_close (&client, LHB_CLOSE_EOF);
  close_rig (&rig);
}

static void
fast_zero_is_not_supported_where_it_is_slow (void)
{
  struct rig rig;
  struct client client;

  open_rig (&rig, 2, BLOCKS);
  client = client_open (&rig, 0);
  CHECK_EQUAL (
      lhb_fault_arm ("store.punch", EOPNOTSUPP, 0, 0, UINT64_MAX), 0);
  CHECK_EQUAL (client_call (&client, NBD_CMD_FLAG_FAST_ZERO,
                            NBD_CMD_WRITE_ZEROES, 0, SIZE),
               NBD_ENOTSUP);
  CHECK_EQUAL (client_call (&client, 0, NBD_CMD_WRITE_ZEROES, 0, SIZE), 0);
  client_close (&client, LHB_CLOSE_EOF);
  close_rig (&rig);
}

static void
read_only_connection_changes_nothing (void)
{
  static const struct wrong wrongs[] = {
    { 0, NBD_CMD_WRITE, 0, 8192, NBD_EPERM },
    { NBD_CMD_FLAG_FUA, NBD_CMD_WRITE, SIZE, 1, NBD_EPERM },
    { 0, NBD_CMD_TRIM, 0, BLOCK, NBD_EPERM },
    { 0, NBD_CMD_WRITE_ZEROES, 0, BLOCK, NBD_EPERM },
    { 0, NBD_CMD_FLUSH, 0, 0, 0 },
    { 0, NBD_CMD_CACHE, 0, BLOCK, 0 },
  };
  struct rig rig;
  struct client client;
  char *model, byte = 0;

  open_rig (&rig, 1, BLOCKS);
  model = rig_model (&rig);
  client = client_open (&rig, LHB_NBD_READ_ONLY);
  for (size_t i = 0; i < sizeof wrongs / sizeof wrongs[0]; i++)
    check_refused (&client, &wrongs[i]);
  CHECK_EQUAL (client_read (&client, 1, 1, &byte), 0);
  CHECK_EQUAL (byte, 'b');
  rig_check (&rig, model);
  client_close (&client, LHB_CLOSE_EOF);
  free (model);
  close_rig (&rig);
}

static void
errors_of_the_replicas_reach_the_client (void)
{
  struct rig rig;

  open_rig (&rig, 1, BLOCKS);
  for (uint32_t flags = 0; flags <= LHB_NBD_STRUCTURED; flags++)
    {
      struct client client = client_open (&rig, flags);
      char data[BLOCK] = { 0 };

      CHECK_EQUAL (lhb_fault_arm ("store.read", EIO, 0, 0, 1), 0);
      CHECK_EQUAL (client_read (&client, 0, 100, data), NBD_EIO);
      CHECK_EQUAL (lhb_fault_arm ("store.write", EDQUOT, 0, 0, 1), 0);
      CHECK_EQUAL (client_write (&client, 0, 0, BLOCK, data), NBD_ENOSPC);
      CHECK_EQUAL (client_write (&client, 0, 0, BLOCK, data), 0);
      CHECK_EQUAL (lhb_fault_arm ("store.punch", ENOMEM, 0, 0, 1), 0);
      CHECK_EQUAL (client_call (&client, 0, NBD_CMD_TRIM, 0, BLOCK),
                   NBD_ENOMEM);
      CHECK_EQUAL (client_read (&client, 0, 100, data), 0);
      client_close (&client, LHB_CLOSE_EOF);
    }
  close_rig (&rig);
}

/* ---- Sizes. */

/* A client's send gives the socket 4 KiB or more at a time. */
#define SKIP_RECEIVES_MAX (96 * MIB / 4096 + 1000)

static void
largest_requests_are_served_and_larger_ones_refused (void)
{
  const uint64_t blocks = 80 * MIB / BLOCK;
  struct rig rig;
  struct client client;
  char *data = malloc (65 * MIB), *got = malloc (32 * MIB);

  CHECK (data != NULL && got != NULL);
  open_rig (&rig, 2, blocks);
  client = client_open (&rig, 0);
  for (uint64_t i = 0; i < 65 * MIB / 8; i++)
    memcpy (data + 8 * i, &i, 8);
  CHECK_EQUAL (client_write (&client, 0, 1, 32 * MIB, data), 0);
  CHECK_EQUAL (client_read (&client, 1, 32 * MIB, got), 0);
  CHECK (memcmp (got, data, 32 * MIB) == 0);
  CHECK_EQUAL (client_write (&client, 0, 0, 32 * MIB, data + 8), 0);
  CHECK_EQUAL (client_read (&client, 0, 32 * MIB, got), 0);
  CHECK (memcmp (got, data + 8, 32 * MIB) == 0);
  CHECK_EQUAL (client_read (&client, 0, 32 * MIB + 1, got), NBD_EINVAL);
  /* Refused, with its payload skipped, and not a header's length at a time. */
  CHECK_EQUAL (
      lhb_fault_arm ("socket.receive", ECONNRESET, 0, SKIP_RECEIVES_MAX, 1),
      0);
  CHECK_EQUAL (client_write (&client, 0, 0, 32 * MIB + 1, data), NBD_EINVAL);
  CHECK_EQUAL (client_write (&client, 0, 0, 64 * MIB, data), NBD_EINVAL);
  CHECK_EQUAL (client_read (&client, 0, 32 * MIB, got), 0);
  CHECK (memcmp (got, data + 8, 32 * MIB) == 0);
  lhb_fault_clear ();
  client_send (&client, 0, NBD_CMD_WRITE, 0, 64 * MIB + 1);
  client_expect_end (&client);
  client_close (&client, LHB_CLOSE_TOO_LARGE);
  free (data);
  free (got);
  close_rig (&rig);
}

/* ---- Connections that end. */

static void
garbage_ends_the_connection (void)
{
  struct rig rig;

  open_rig (&rig, 1, BLOCKS);
  for (int byte = 0; byte < 4; byte++)
    {
      struct client client = client_open (&rig, 0);
      struct client_request request
          = client_header (&client, 0, NBD_CMD_READ, 0, 1);

      CHECK_EQUAL (client_call (&client, 0, NBD_CMD_FLUSH, 0, 0), 0);
      ((char *) &request)[byte] ^= 1;
      client_send_bytes (&client, &request, sizeof request);
      client_expect_end (&client);
      client_close (&client, LHB_CLOSE_BAD_MAGIC);
    }
  close_rig (&rig);
}

static void
half_a_request_never_happened (void)
{
  static const uint32_t lengths[] = { 100, 2 * BLOCK, 5 * BLOCK };
  struct rig rig;
  char *model, *data = blocks_alloc (BLOCKS);

  open_rig (&rig, 1, BLOCKS);
  model = rig_model (&rig);
  memset (data, 'x', SIZE);
  for (size_t bytes = 1; bytes < NBD_REQUEST_BYTES; bytes++)
    {
      struct client client = client_open (&rig, 0);
      struct client_request request
          = client_header (&client, 0, NBD_CMD_TRIM, 0, BLOCK);

      client_send_bytes (&client, &request, bytes);
      client_close (&client, LHB_CLOSE_MID_REQUEST);
    }
  for (uint64_t i = 0; i < 3; i++)
    for (uint32_t missing = 1; missing <= lengths[i]; missing += 99)
      {
        struct client client = client_open (&rig, 0);

        client_send (&client, 0, NBD_CMD_WRITE, i, lengths[i]);
        client_send_bytes (&client, data, lengths[i] - missing);
        client_close (&client, LHB_CLOSE_MID_REQUEST);
      }
  /* Also inside the payload of a refused one, but not after an empty one. */
  for (uint32_t length = 0; length <= 100; length += 100)
    {
      struct client client = client_open (&rig, 0);

      client_send (&client, 0, NBD_CMD_WRITE, SIZE, length);
      CHECK_EQUAL (client_receive_error (&client),
                   length ? NBD_ENOSPC : NBD_EINVAL);
      client_close (&client, length ? LHB_CLOSE_MID_REQUEST : LHB_CLOSE_EOF);
    }
  rig_check (&rig, model);
  free (model);
  free (data);
  close_rig (&rig);
}

/* Whole requests that came before the end of the stream are executed. */
static void
requests_before_the_end_of_the_stream_are_done (void)
{
  struct rig rig;
  struct client client;
  char *model, data[BLOCK];

  open_rig (&rig, 2, BLOCKS);
  model = rig_model (&rig);
  memset (data, 'w', BLOCK);
  client = client_open (&rig, 0);
  for (uint64_t block = 0; block < 20; block++)
    {
      client_send (&client, 0, NBD_CMD_WRITE, block * BLOCK, BLOCK);
      client_send_bytes (&client, data, BLOCK);
    }
  CHECK_EQUAL (shutdown (client.fd, SHUT_WR), 0);
  for (int i = 0; i < 20; i++)
    CHECK_EQUAL (client_receive (&client).error, 0);
  client_expect_end (&client);
  client_close (&client, LHB_CLOSE_EOF);
  memset (model, 'w', 20 * BLOCK);
  rig_check (&rig, model);
  free (model);
  close_rig (&rig);
}

static void
requests_may_come_byte_by_byte (void)
{
  struct rig rig;
  struct client client;
  char data[300], got[300];

  open_rig (&rig, 1, BLOCKS);
  client = client_open (&rig, 0);
  for (int round = 0; round < 3; round++)
    {
      struct client_request request
          = client_header (&client, 0, NBD_CMD_WRITE, 4000, sizeof data);

      memset (data, 'a' + round, sizeof data);
      for (size_t i = 0; i < sizeof request; i++)
        client_send_bytes (&client, (char *) &request + i, 1);
      for (size_t i = 0; i < sizeof data; i++)
        client_send_bytes (&client, data + i, 1);
      CHECK_EQUAL (client_receive_error (&client), 0);
      CHECK_EQUAL (client_read (&client, 4000, sizeof got, got), 0);
      CHECK (memcmp (got, data, sizeof got) == 0);
    }
  client_close (&client, LHB_CLOSE_EOF);
  close_rig (&rig);
}

static void
disconnect_waits_for_requests_in_flight (void)
{
  struct rig rig;
  struct client client;
  uint64_t cookies = 0;

  open_rig (&rig, 1, BLOCKS);
  client = client_open (&rig, 0);
  lhb_volume_gate_flushes (rig.volume, 1);
  for (int i = 0; i < 5; i++)
    client_send (&client, 0, NBD_CMD_FLUSH, 0, 0);
  client_send (&client, 0, NBD_CMD_DISC, 0, 0);
  /* What follows the end is not looked at. */
  client_send (&client, 0, NBD_CMD_TRIM, 0, BLOCK);
  AWAIT (rig_gated (&rig) == 5);
  lhb_volume_gate_flushes (rig.volume, 0);
  for (int i = 0; i < 5; i++)
    {
      struct client_reply reply = client_receive (&client);

      CHECK_EQUAL (reply.error, 0);
      cookies |= UINT64_C (1) << reply.cookie;
    }
  CHECK_EQUAL (cookies, 0x3e);
  client_expect_end (&client);
  client_close (&client, LHB_CLOSE_CLIENT);
  close_rig (&rig);
}

static void
peer_that_vanishes_with_requests_in_flight (void)
{
  for (int disc = 0; disc < 2; disc++)
    {
      struct rig rig;
      struct client client;

      open_rig (&rig, 1, BLOCKS);
      client = client_open (&rig, 0);
      lhb_volume_gate_flushes (rig.volume, 1);
      for (int i = 0; i < 5; i++)
        client_send (&client, 0, NBD_CMD_FLUSH, 0, 0);
      AWAIT (rig_gated (&rig) == 5);
      if (disc)
        client_send (&client, 0, NBD_CMD_DISC, 0, 0);
      close (client.fd);
      lhb_volume_gate_flushes (rig.volume, 0);
      client_expect_closed (&client,
                            disc ? LHB_CLOSE_CLIENT : LHB_CLOSE_EOF);
      close_rig (&rig);
    }
}

static void
socket_errors_end_the_connection (void)
{
  struct rig rig;
  struct client client;

  open_rig (&rig, 1, BLOCKS);
  client = client_open (&rig, 0);
  CHECK_EQUAL (lhb_fault_arm ("socket.receive", ECONNRESET, 0, 0, 1), 0);
  client_send (&client, 0, NBD_CMD_FLUSH, 0, 0);
  client_expect_end (&client);
  client_close (&client, LHB_CLOSE_SOCKET_ERROR);
  lhb_fault_clear ();
  client = client_open (&rig, 0);
  CHECK_EQUAL (lhb_fault_arm ("socket.send", EPIPE, 0, 0, 1), 0);
  client_send (&client, 0, NBD_CMD_FLUSH, 0, 0);
  client_expect_end (&client);
  client_close (&client, LHB_CLOSE_SOCKET_ERROR);
  close_rig (&rig);
}

static void
what_is_no_socket_is_refused_or_closed (void)
{
  struct rig rig;
  struct lhb_event event;
  uint64_t id;

  open_rig (&rig, 1, BLOCKS);
  CHECK_EQUAL (lhb_nbd_attach (rig.volume, -1, 0, 0, &id), -EBADF);
  CHECK_EQUAL (lhb_nbd_attach (rig.volume,
                               replica_open_image (&rig.replicas[0], "base"),
                               0, 0, &id),
               0);
  event = engine_wait_event (rig.engine);
  CHECK_EQUAL (event.subject_id, id);
  CHECK_EQUAL (event.error, LHB_CLOSE_SOCKET_ERROR);
  close_rig (&rig);
}

/* ---- lhb_connection_close in every state. */

/* In one piece, so that they fit the socket while nobody reads replies. */
static void
send_reads (struct client *client, uint32_t count, uint32_t length)
{
  struct client_request *requests = calloc (count, sizeof *requests);

  CHECK (requests != NULL);
  for (uint32_t i = 0; i < count; i++)
    requests[i] = client_header (client, 0, NBD_CMD_READ, 0, length);
  client_send_bytes (client, requests, count * sizeof *requests);
  free (requests);
}

/* The reply queue does not fit the socket. */
static void
await_full_socket (struct rig *rig)
{
  struct lhb_statistics s;

  do
    lhb_volume_statistics (rig->volume, &s);
  while (s.reads < 4);
}

static void
ask_to_close (struct client *client, int reason)
{
  lhb_volume *volume = client->rig->volume;
  char bytes[4096];

  CHECK_EQUAL (lhb_connection_close (volume, client->id), 0);
  (void) lhb_connection_close (volume, client->id);     /* asked twice */
  client_expect_closed (client, reason);
  AWAIT (lhb_connection_close (volume, client->id) == -ENOENT);
  while (recv (client->fd, bytes, sizeof bytes, 0) > 0)
    ;
  close (client->fd);
}

enum state {
  IDLE,
  MID_HEADER,
  MID_PAYLOAD,
  MID_SKIP,
  FULL_SOCKET,
  STARVED,
  DISCONNECTED,
  STATES,
};

static void
bring_to (struct client *client, enum state state)
{
  struct client_request request
      = client_header (client, 0, NBD_CMD_WRITE, 0, 4 * BLOCK);

  switch (state)
    {
    case MID_HEADER:
      client_send_bytes (client, &request, 9);
      break;
    case MID_PAYLOAD:
    case MID_SKIP:
      CHECK_EQUAL (client_call (client, 0, NBD_CMD_FLUSH, 0, 0), 0);
      if (state == MID_SKIP)
        request.flags = htobe16 (1 << 9);
      client_send_bytes (client, &request, sizeof request);
      client_send_bytes (client, &request, sizeof request);
      break;
    case FULL_SOCKET:
      send_reads (client, 8, SIZE);
      await_full_socket (client->rig);
      break;
    case STARVED:
      send_reads (client, LHB_CONN_REQUESTS + 20, SIZE);
      await_full_socket (client->rig);
      break;
    case DISCONNECTED:
      send_reads (client, 8, SIZE);
      client_send (client, 0, NBD_CMD_DISC, 0, 0);
      await_full_socket (client->rig);
      break;
    default:
      break;
    }
}

static void
connection_is_closed_on_request_in_every_state (void)
{
  for (enum state state = IDLE; state < STATES; state++)
    {
      struct rig rig;
      struct client client;

      open_rig (&rig, 1, BLOCKS);
      client = client_open (&rig, 0);
      CHECK_EQUAL (lhb_connection_close (rig.volume, client.id + 1), -ENOENT);
      bring_to (&client, state);
      ask_to_close (&client, state == DISCONNECTED ? LHB_CLOSE_CLIENT
                                                   : LHB_CLOSE_ASKED);
      close_rig (&rig);
    }
}

static void
closed_connection_waits_for_its_requests (void)
{
  struct rig rig;
  struct client client;

  open_rig (&rig, 1, BLOCKS);
  client = client_open (&rig, 0);
  lhb_volume_gate_flushes (rig.volume, 1);
  for (int i = 0; i < 7; i++)
    client_send (&client, 0, NBD_CMD_FLUSH, 0, 0);
  AWAIT (rig_gated (&rig) == 7);
  CHECK_EQUAL (lhb_connection_close (rig.volume, client.id), 0);
  CHECK (!rig_has_event (&rig));
  lhb_volume_gate_flushes (rig.volume, 0);
  client_expect_closed (&client, LHB_CLOSE_ASKED);
  client_expect_end (&client);
  close (client.fd);
  close_rig (&rig);
}

static void
closing_the_volume_closes_connections_in_every_state (void)
{
  struct rig rig;
  struct client clients[STATES + 1];
  struct lhb_event event;

  open_rig (&rig, 2, BLOCKS);
  for (enum state state = IDLE; state < STATES; state++)
    {
      clients[state] = client_open (&rig, 0);
      bring_to (&clients[state], state);
    }
  clients[STATES] = client_open (&rig, 0);
  lhb_volume_gate_flushes (rig.volume, 1);
  client_send (&clients[STATES], 0, NBD_CMD_FLUSH, 0, 0);
  AWAIT (rig_gated (&rig) == 1);
  rig_close_volume (&rig);
  for (int i = 0; i <= STATES; i++)
    {
      CHECK_EQUAL (lhb_engine_next_event (rig.engine, &event), 1);
      CHECK_EQUAL (event.type, LHB_EVENT_CONNECTION_CLOSED);
      close (clients[i].fd);
    }
  CHECK (!rig_has_event (&rig));
  close_rig (&rig);
}

static void
closing_the_volume_ends_held_writes_with_an_error (void)
{
  struct rig rig;
  struct client client;
  char data[BLOCK] = { 0 };

  open_rig (&rig, 2, BLOCKS);
  client = client_open (&rig, 0);
  CHECK_EQUAL (lhb_fault_arm ("store.write", EIO,
                              lhb_store_id (rig.stores[0]), 0, 1),
               0);
  client_send (&client, 0, NBD_CMD_WRITE, 0, BLOCK);
  client_send_bytes (&client, data, BLOCK);
  AWAIT (rig_held (&rig) == 1);
  rig_close_volume (&rig);
  client_expect_end (&client);
  close (client.fd);
  close_rig (&rig);
}

/* ---- Many requests, many connections. */

static void
receive_reads (struct client *client, uint64_t first_cookie, uint32_t count,
               uint32_t length, const char *want)
{
  bool *seen = calloc (count, 1);
  char *data = malloc (length);

  CHECK (seen != NULL && data != NULL);
  for (uint32_t i = 0; i < count; i++)
    {
      struct client_reply reply = client_receive (client);

      CHECK (reply.cookie >= first_cookie
             && reply.cookie < first_cookie + count);
      CHECK (!seen[reply.cookie - first_cookie]);
      seen[reply.cookie - first_cookie] = true;
      client_receive_data (client, &reply, 0, length, data);
      CHECK (memcmp (data, want, length) == 0);
    }
  free (seen);
  free (data);
}

/* More than there are slots, and more than there are buffers of each size. */
static void
thousand_pipelined_requests_are_all_answered (void)
{
  static const uint32_t lengths[] = { 1, BLOCK, 100000, SIZE };
  struct rig rig;
  struct client client;
  char *model;

  open_rig (&rig, 1, BLOCKS);
  model = rig_model (&rig);
  client = client_open (&rig, LHB_NBD_STRUCTURED);
  for (int i = 0; i < 4; i++)
    {
      uint64_t first = client.cookie + 1;

      send_reads (&client, 1000, lengths[i]);
      receive_reads (&client, first, 1000, lengths[i], model);
    }
  client_close (&client, LHB_CLOSE_EOF);
  free (model);
  close_rig (&rig);
}

/* The one largest buffer is asked for by every request. */
static void
pipelined_requests_of_the_largest_size_take_turns (void)
{
  struct rig rig;
  struct client client;
  char *model;

  open_rig (&rig, 1, 32 * MIB / BLOCK);
  model = rig_model (&rig);
  client = client_open (&rig, LHB_NBD_STRUCTURED);
  send_reads (&client, 4, 32 * MIB);
  receive_reads (&client, 1, 4, 32 * MIB, model);
  client_close (&client, LHB_CLOSE_EOF);
  free (model);
  close_rig (&rig);
}

static void
slow_reader_holds_up_nobody_else (void)
{
  struct rig rig;
  struct client slow, quick;
  char *model;

  open_rig (&rig, 1, BLOCKS);
  model = rig_model (&rig);
  /* One after the other, so that both are on the same queue for some pair:
   * connections go round the queues. */
  slow = client_open (&rig, LHB_NBD_STRUCTURED);
  send_reads (&slow, LHB_CONN_REQUESTS + 100, SIZE);
  await_full_socket (&rig);
  for (int i = 0; i < 4; i++)
    {
      char *data = blocks_alloc (BLOCKS);

      quick = client_open (&rig, 0);
      for (int request = 0; request < 50; request++)
        {
          CHECK_EQUAL (client_read (&quick, 0, SIZE, data), 0);
          CHECK (memcmp (data, model, SIZE) == 0);
          CHECK_EQUAL (client_write (&quick, 0, 0, SIZE, data), 0);
        }
      client_close (&quick, LHB_CLOSE_EOF);
      free (data);
    }
  receive_reads (&slow, 1, LHB_CONN_REQUESTS + 100, SIZE, model);
  client_close (&slow, LHB_CLOSE_EOF);
  free (model);
  close_rig (&rig);
}

static void
connections_come_and_go_without_leaving_memory (void)
{
  enum { ROUNDS = 4, CONNECTIONS = 40 };
  struct rig rig;
  uint64_t before = 0;

  open_rig (&rig, 1, BLOCKS);
  for (int round = 0; round < ROUNDS; round++)
    {
      struct client clients[CONNECTIONS];
      struct lhb_statistics s;

      for (int i = 0; i < CONNECTIONS; i++)
        clients[i] = client_open (&rig, 0);
      lhb_volume_statistics (rig.volume, &s);
      CHECK_EQUAL (s.connections, CONNECTIONS);
      for (int i = 0; i < CONNECTIONS; i++)
        client_send (&clients[i], 0, NBD_CMD_FLUSH, 0, 0);
      for (int i = 0; i < CONNECTIONS; i++)
        CHECK_EQUAL (client_receive_error (&clients[i]), 0);
      for (int i = 0; i < CONNECTIONS; i++)
        client_close (&clients[i], LHB_CLOSE_EOF);
      lhb_volume_statistics (rig.volume, &s);
      CHECK_EQUAL (s.connections, 0);
      if (round == 0)
        before = address_space_bytes ();
    }
  /* The buffers of one connection are 90 MiB of address space. */
  CHECK (address_space_bytes () < before + 512 * (uint64_t) MIB);
  close_rig (&rig);
}

struct worker {
  struct client client;
  pthread_t thread;
  uint64_t seed;
};

static void *
run_worker (void *argument)
{
  struct worker *worker = argument;
  uint64_t state = worker->seed;
  char *data = blocks_alloc (8);

  for (int i = 0; i < 300; i++)
    {
      uint64_t offset = lhb_test_below (&state, 10 * BLOCK);
      uint32_t length = 1 + (uint32_t) lhb_test_below (&state, 3 * BLOCK);

      memset (data, (int) worker->seed, 8 * BLOCK);
      switch (lhb_test_below (&state, 4))
        {
        case 0:
          CHECK_EQUAL (client_read (&worker->client, offset, length, data),
                       0);
          break;
        case 1:
          CHECK_EQUAL (client_call (&worker->client, 0, NBD_CMD_TRIM, offset,
                                    length),
                       0);
          break;
        default:
          CHECK_EQUAL (client_write (&worker->client, 0, offset, length,
                                     data),
                       0);
        }
    }
  free (data);
  return NULL;
}

/* Connections are on different queues, their requests overlap. */
static void
connections_that_overlap_leave_equal_replicas (void)
{
  enum { WORKERS = 4 };
  struct worker workers[WORKERS];
  struct rig rig;

  open_rig (&rig, 3, BLOCKS);
  for (int i = 0; i < WORKERS; i++)
    {
      workers[i].client = client_open (&rig, LHB_NBD_STRUCTURED);
      workers[i].seed = lhb_test_seed + (uint64_t) i;
      CHECK_EQUAL (pthread_create (&workers[i].thread, NULL, run_worker,
                                   &workers[i]),
                   0);
    }
  for (int i = 0; i < WORKERS; i++)
    CHECK_EQUAL (pthread_join (workers[i].thread, NULL), 0);
  for (int i = 0; i < WORKERS; i++)
    client_close (&workers[i].client, LHB_CLOSE_EOF);
  rig_check_equal (&rig);
  close_rig (&rig);
}

/* ---- Read-only volumes. */

static void
connections_of_a_read_only_volume_are_read_only (void)
{
  struct rig rig;
  struct client client;
  lhb_volume *served;
  char data[BLOCK] = { 0 };

  open_rig (&rig, 1, BLOCKS);
  served = rig.volume;
  CHECK_EQUAL (lhb_volume_open (rig.engine, SIZE, LHB_VOLUME_READ_ONLY,
                                &rig.volume),
               0);
  CHECK_EQUAL (lhb_volume_publish (rig.volume, rig.stores, NULL, 1), 0);
  client = client_open (&rig, 0);
  CHECK_EQUAL (client_write (&client, 0, 0, BLOCK, data), NBD_EPERM);
  CHECK_EQUAL (client_call (&client, 0, NBD_CMD_FLUSH, 0, 0), 0);
  CHECK_EQUAL (client_read (&client, 0, BLOCK, data), 0);
  client_close (&client, LHB_CLOSE_EOF);
  lhb_volume_close (served);
  close_rig (&rig);
}

static const struct lhb_test tests[] = {
  LHB_TEST (every_command_with_simple_replies),
  LHB_TEST (every_command_with_structured_replies),
  LHB_TEST (reads_and_writes_of_any_alignment_equal_a_model),
  LHB_TEST (block_status_tells_data_from_holes),
  LHB_TEST (block_status_of_many_extents_is_cut_short),
  LHB_TEST (wrong_requests_are_answered_with_their_error),
  LHB_TEST (do_not_fragment_needs_structured_replies),
  LHB_TEST (fast_zero_is_not_supported_where_it_is_slow),
  LHB_TEST (read_only_connection_changes_nothing),
  LHB_TEST (errors_of_the_replicas_reach_the_client),
  LHB_TEST (largest_requests_are_served_and_larger_ones_refused),
  LHB_TEST (garbage_ends_the_connection),
  LHB_TEST (half_a_request_never_happened),
  LHB_TEST (requests_before_the_end_of_the_stream_are_done),
  LHB_TEST (requests_may_come_byte_by_byte),
  LHB_TEST (disconnect_waits_for_requests_in_flight),
  LHB_TEST (peer_that_vanishes_with_requests_in_flight),
  LHB_TEST (socket_errors_end_the_connection),
  LHB_TEST (what_is_no_socket_is_refused_or_closed),
  LHB_TEST (connection_is_closed_on_request_in_every_state),
  LHB_TEST (closed_connection_waits_for_its_requests),
  LHB_TEST (closing_the_volume_closes_connections_in_every_state),
  LHB_TEST (closing_the_volume_ends_held_writes_with_an_error),
  LHB_TEST (thousand_pipelined_requests_are_all_answered),
  LHB_TEST (pipelined_requests_of_the_largest_size_take_turns),
  LHB_TEST (slow_reader_holds_up_nobody_else),
  LHB_TEST (connections_come_and_go_without_leaving_memory),
  LHB_TEST (connections_that_overlap_leave_equal_replicas),
  LHB_TEST (connections_of_a_read_only_volume_are_read_only),
};

LHB_TEST_MAIN (tests)
