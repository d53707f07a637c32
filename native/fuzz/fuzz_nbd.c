/* Fuzz target: the bytes of one NBD connection.
 *
 * The first byte of the input chooses what was negotiated, the rest is what
 * the client sends.  The target reads it, too, to know what must come back: a
 * reply of the right form for every whole request before the one that ends the
 * connection, then the end, for the right reason.  So that replies can be told
 * apart, each request gets its number as its cookie.
 */

#include "lhb_fuzz.h"
#include "../tests/lhb_client.h"
/* After that one, which has parameters of this name. */
#include "lhb_fuzz_rig.h"

#define BLOCKS 257
#define SIZE ((uint64_t) BLOCKS * BLOCK)
#define REQUESTS_MAX 4096
/* Inputs between two looks at what the files hold. */
#define INPUTS_PER_CHECK 512

struct expected {
  struct client_request request;        /* in host order */
  bool answered;
};

struct stream {
  uint8_t *bytes;
  size_t length, sent;
  struct expected expected[REQUESTS_MAX];
  uint32_t count;
  int reason;                   /* LHB_CLOSE_* */
};

static uint64_t inputs;

/* ---- What must come back. */

static bool
is_whole (const struct stream *stream, size_t at, size_t length)
{
  return length <= stream->length - at;
}

/* Number the requests and find what ends the connection. */
static void
walk (struct stream *stream)
{
  size_t at = 0;

  for (;;)
    {
      struct expected *expected = &stream->expected[stream->count];
      struct client_request *request = &expected->request;
      bool is_write;

      stream->reason
          = at == stream->length ? LHB_CLOSE_EOF : LHB_CLOSE_MID_REQUEST;
      if (!is_whole (stream, at, sizeof *request)
          || stream->count == REQUESTS_MAX - 1)
        break;
      memcpy (request, stream->bytes + at, sizeof *request);
      request->cookie = htobe64 (stream->count);
      memcpy (stream->bytes + at, request, sizeof *request);
      request->magic = be32toh (request->magic);
      request->flags = be16toh (request->flags);
      request->type = be16toh (request->type);
      request->offset = be64toh (request->offset);
      request->length = be32toh (request->length);
      at += sizeof *request;
      is_write = request->type == NBD_CMD_WRITE;
      stream->reason = LHB_CLOSE_BAD_MAGIC;
      if (request->magic != NBD_REQUEST_MAGIC)
        break;
      stream->reason = LHB_CLOSE_CLIENT;
      if (request->type == NBD_CMD_DISC)
        break;
      stream->reason = LHB_CLOSE_TOO_LARGE;
      if (is_write && request->length > LHB_SKIP_BYTES_MAX)
        break;
      stream->reason = LHB_CLOSE_MID_REQUEST;
      if (is_write && !is_whole (stream, at, request->length))
        {
          /* Refused and answered before its payload is there.  It may be
           * refused for other reasons, too; check_reply allows for that. */
          if (request->offset > SIZE
              || request->length > SIZE - request->offset)
            stream->count++;
          break;
        }
      at += is_write ? request->length : 0;
      stream->count++;
    }
  if (stream->count == REQUESTS_MAX - 1)
    {
      stream->length = at;      /* so many are enough */
      stream->reason = LHB_CLOSE_EOF;
    }
}

static bool
must_fail (const struct client_request *request, uint32_t flags)
{
  bool changes = request->type == NBD_CMD_WRITE
                 || request->type == NBD_CMD_TRIM
                 || request->type == NBD_CMD_WRITE_ZEROES;

  return request->type > NBD_CMD_BLOCK_STATUS || request->flags > 31
         || request->offset > SIZE || request->length > SIZE - request->offset
         || (request->type != NBD_CMD_FLUSH && request->length == 0)
         || (changes && flags & LHB_NBD_READ_ONLY)
         || (request->flags & NBD_CMD_FLAG_DF && !(flags & LHB_NBD_STRUCTURED))
         || (request->type == NBD_CMD_BLOCK_STATUS
             && !(flags & LHB_NBD_BASE_ALLOCATION));
}

/* Of the commands, not of the flags they may have. */
static bool
may_fail (const struct client_request *request, uint32_t flags)
{
  return must_fail (request, flags) || request->flags != 0
         || request->type == NBD_CMD_FLUSH;
}

static void
check_status (struct client *client, const struct client_request *request,
              const struct client_reply *reply)
{
  static uint32_t words[1 + 2 * LHB_NBD_EXTENTS_MAX];
  uint64_t covered = 0;

  CHECK_EQUAL (reply->type, NBD_REPLY_TYPE_BLOCK_STATUS);
  CHECK (reply->length >= 12 && reply->length <= sizeof words);
  CHECK_EQUAL (reply->length % 8, 4);
  client_receive_bytes (client, words, reply->length);
  CHECK_EQUAL (be32toh (words[0]), CONTEXT_ID);
  if (request->flags & NBD_CMD_FLAG_REQ_ONE)
    CHECK_EQUAL (reply->length, 12);
  for (uint32_t i = 1; i < reply->length / 4; i += 2)
    {
      CHECK (words[i] != 0);
      CHECK (be32toh (words[i + 1]) <= (NBD_STATE_HOLE | NBD_STATE_ZERO));
      covered += be32toh (words[i]);
    }
  CHECK (covered > 0 && covered <= request->length);
}

static void
check_reply (struct client *client, struct stream *stream)
{
  static char data[SIZE];
  struct client_reply reply = client_receive (client);
  const struct client_request *request;

  /* One more: a write may be refused before its payload is there. */
  CHECK (reply.cookie <= stream->count);
  CHECK (reply.cookie < stream->count || reply.error != 0);
  CHECK (!stream->expected[reply.cookie].answered);
  stream->expected[reply.cookie].answered = true;
  request = &stream->expected[reply.cookie].request;
  CHECK (reply.error != 0 || !must_fail (request, client->flags));
  CHECK (reply.error == 0 || may_fail (request, client->flags));
  if (reply.error)
    return;
  if (request->type == NBD_CMD_READ)
    client_receive_data (client, &reply, request->offset, request->length,
                         data);
  else if (request->type == NBD_CMD_BLOCK_STATUS)
    check_status (client, request, &reply);
  else
    CHECK_EQUAL (reply.length, 0);
}

/* ---- The connection. */

/* False: the server ended the connection. */
static bool
send_some (struct client *client, struct stream *stream)
{
  ssize_t sent = send (client->fd, stream->bytes + stream->sent,
                       stream->length - stream->sent,
                       MSG_NOSIGNAL | MSG_DONTWAIT);

  if (sent > 0)
    stream->sent += (size_t) sent;
  return sent >= 0 || errno == EAGAIN;
}

/* Both directions at once: a server that can not send stops reading. */
static void
converse (struct client *client, struct stream *stream)
{
  struct pollfd ready = { .fd = client->fd, .events = POLLIN | POLLOUT };
  char byte;

  for (;;)
    {
      if (stream->sent == stream->length && ready.events & POLLOUT)
        {
          ready.events = POLLIN;
          CHECK_EQUAL (shutdown (client->fd, SHUT_WR), 0);
        }
      if (poll (&ready, 1, -1) != 1)
        {
          CHECK_EQUAL (errno, EINTR);   /* libFuzzer's alarm */
          continue;
        }
      if (ready.revents & POLLOUT && stream->sent < stream->length
          && !send_some (client, stream))
        ready.events = POLLIN;
      if (ready.revents & (POLLIN | POLLHUP | POLLERR))
        {
          if (recv (client->fd, &byte, 1, MSG_PEEK) <= 0)
            return;
          check_reply (client, stream);
        }
    }
}

static void
check_end (struct client *client, const struct stream *stream)
{
  for (uint32_t i = 0; i < stream->count; i++)
    CHECK (stream->expected[i].answered);
  client_close (client, stream->reason);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t length)
{
  static struct stream stream;
  struct client client;
  uint32_t flags;

  if (length < 1)
    return 0;
  open_rig ("fuzz_nbd", BLOCKS);
  flags = data[0] & (LHB_NBD_STRUCTURED | LHB_NBD_BASE_ALLOCATION
                     | LHB_NBD_READ_ONLY);
  if (flags & LHB_NBD_BASE_ALLOCATION)
    flags |= LHB_NBD_STRUCTURED;
  memset (&stream, 0, sizeof stream);
  stream.length = length - 1;
  stream.bytes = malloc (length);
  CHECK (stream.bytes != NULL);
  memcpy (stream.bytes, data + 1, length - 1);
  walk (&stream);
  client = client_open (&rig, flags);
  converse (&client, &stream);
  check_end (&client, &stream);
  free (stream.bytes);
  if (++inputs % INPUTS_PER_CHECK == 0)
    rig_check_equal (&rig);
  return 0;
}
