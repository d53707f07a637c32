/* An NBD client that speaks raw bytes over a socket pair. */
#ifndef LHB_CLIENT_H
#define LHB_CLIENT_H

#include <endian.h>
#include <sys/socket.h>

#include "lhb_nbd.h"
#include "lhb_rig.h"

#define CONTEXT_ID 0x01020304u

struct client {
  struct rig *rig;
  int fd;
  uint64_t id;
  uint32_t flags;               /* LHB_NBD_* */
  uint64_t cookie;              /* of the last request */
};

struct __attribute__ ((packed)) client_request {
  uint32_t magic;
  uint16_t flags, type;
  uint64_t cookie, offset;
  uint32_t length;
};

_Static_assert (sizeof (struct client_request) == NBD_REQUEST_BYTES, "wire");

/* A reply, simple or structured, without its payload. */
struct client_reply {
  uint64_t cookie;
  uint32_t error;
  uint16_t type;                /* of a structured one, else 0 */
  uint32_t length;              /* of the payload that follows */
};

static inline struct client
client_open (struct rig *rig, uint32_t flags)
{
  struct client client = { .rig = rig, .flags = flags };
  int fds[2];

  CHECK_EQUAL (socketpair (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  CHECK_EQUAL (
      lhb_nbd_attach (rig->volume, fds[0], flags, CONTEXT_ID, &client.id), 0);
  client.fd = fds[1];
  return client;
}

static inline void
client_send_bytes (struct client *client, const void *data, size_t length)
{
  const char *at = data;

  while (length > 0)
    {
      ssize_t sent = send (client->fd, at, length, MSG_NOSIGNAL);

      if (sent == -1 && errno == EINTR)
        continue;
      CHECK (sent > 0);
      at += sent;
      length -= (size_t) sent;
    }
}

static inline void
client_receive_bytes (struct client *client, void *data, size_t length)
{
  char *at = data;

  while (length > 0)
    {
      ssize_t got = recv (client->fd, at, length, 0);

      if (got == -1 && errno == EINTR)
        continue;
      CHECK (got > 0);
      at += got;
      length -= (size_t) got;
    }
}

/* The server is gone. */
static inline void
client_expect_end (struct client *client)
{
  char byte;
  ssize_t got = recv (client->fd, &byte, 1, 0);

  CHECK (got == 0 || (got == -1 && errno == ECONNRESET));
}

static inline struct client_request
client_header (struct client *client, uint16_t flags, uint16_t type,
               uint64_t offset, uint32_t length)
{
  return (struct client_request){ .magic = htobe32 (NBD_REQUEST_MAGIC),
                                  .flags = htobe16 (flags),
                                  .type = htobe16 (type),
                                  .cookie = htobe64 (++client->cookie),
                                  .offset = htobe64 (offset),
                                  .length = htobe32 (length) };
}

static inline void
client_send (struct client *client, uint16_t flags, uint16_t type,
             uint64_t offset, uint32_t length)
{
  struct client_request request
      = client_header (client, flags, type, offset, length);

  client_send_bytes (client, &request, sizeof request);
}

static inline struct client_reply
client_receive (struct client *client)
{
  struct client_reply reply = { 0 };
  uint8_t bytes[28];
  uint32_t word;
  uint64_t wide;

  client_receive_bytes (client, bytes, 16);
  memcpy (&word, bytes, 4);
  memcpy (&wide, bytes + 8, 8);
  reply.cookie = be64toh (wide);
  if (be32toh (word) == NBD_SIMPLE_REPLY_MAGIC)
    {
      memcpy (&word, bytes + 4, 4);
      reply.error = be32toh (word);
      return reply;
    }
  CHECK_EQUAL (be32toh (word), NBD_STRUCTURED_REPLY_MAGIC);
  CHECK (client->flags & LHB_NBD_STRUCTURED);
  CHECK_EQUAL (bytes[4] << 8 | bytes[5], NBD_REPLY_FLAG_DONE);
  reply.type = (uint16_t) (bytes[6] << 8 | bytes[7]);
  client_receive_bytes (client, &word, 4);
  reply.length = be32toh (word);
  if (reply.type == NBD_REPLY_TYPE_ERROR)
    {
      CHECK_EQUAL (reply.length, 6);
      client_receive_bytes (client, bytes, 6);
      memcpy (&word, bytes, 4);
      reply.error = be32toh (word);
      CHECK (reply.error != 0);
      CHECK_EQUAL (bytes[4] | bytes[5], 0);
      reply.length = 0;
    }
  return reply;
}

/* The reply to the last request, without payload.  Returns its error. */
static inline uint32_t
client_receive_error (struct client *client)
{
  struct client_reply reply = client_receive (client);

  CHECK_EQUAL (reply.cookie, client->cookie);
  CHECK_EQUAL (reply.length, 0);
  return reply.error;
}

/* The payload of a reply without error to a read. */
static inline void
client_receive_data (struct client *client, const struct client_reply *reply,
                     uint64_t offset, uint32_t length, void *data)
{
  uint64_t where;

  CHECK_EQUAL (reply->error, 0);
  if (client->flags & LHB_NBD_STRUCTURED)
    {
      CHECK_EQUAL (reply->type, NBD_REPLY_TYPE_OFFSET_DATA);
      CHECK_EQUAL (reply->length, length + 8);
      client_receive_bytes (client, &where, sizeof where);
      CHECK_EQUAL (be64toh (where), offset);
    }
  client_receive_bytes (client, data, length);
}

static inline uint32_t
client_read (struct client *client, uint64_t offset, uint32_t length,
             void *data)
{
  struct client_reply reply;

  client_send (client, 0, NBD_CMD_READ, offset, length);
  reply = client_receive (client);
  CHECK_EQUAL (reply.cookie, client->cookie);
  if (reply.error == 0)
    client_receive_data (client, &reply, offset, length, data);
  return reply.error;
}

static inline uint32_t
client_write (struct client *client, uint16_t flags, uint64_t offset,
              uint32_t length, const void *data)
{
  client_send (client, flags, NBD_CMD_WRITE, offset, length);
  client_send_bytes (client, data, length);
  return client_receive_error (client);
}

/* A command without data in either direction. */
static inline uint32_t
client_call (struct client *client, uint16_t flags, uint16_t type,
             uint64_t offset, uint32_t length)
{
  client_send (client, flags, type, offset, length);
  return client_receive_error (client);
}

/* The next event says how the connection ended. */
static inline void
client_expect_closed (struct client *client, int reason)
{
  struct lhb_event event = engine_wait_event (client->rig->engine);

  CHECK_EQUAL (event.type, LHB_EVENT_CONNECTION_CLOSED);
  CHECK_EQUAL (event.volume_id, lhb_volume_id (client->rig->volume));
  CHECK_EQUAL (event.subject_id, client->id);
  CHECK_EQUAL (event.error, reason);
}

static inline void
client_close (struct client *client, int reason)
{
  close (client->fd);
  client_expect_closed (client, reason);
  AWAIT (lhb_connection_close (client->rig->volume, client->id) == -ENOENT);
}

#endif
