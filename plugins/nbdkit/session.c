#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "lhb_bytes.h"
#include "lhb_session.h"

#define REP_ERROR 0x80000000u
#define REP_ERR_POLICY 0x80000002u
#define REP_ERR_UNKNOWN 0x80000006u
#define SOCKET_BUFFER_BYTES (1 << 20)
#define CONTEXT "base:allocation"
#define CONTEXT_BYTES 15
/* Name and description of an export, with what is between them. */
#define REPLY_BYTES_MAX (2 * LHB_SESSION_NAME_BYTES_MAX + 64)

struct reply {
  uint32_t option, type, bytes;
  uint8_t data[REPLY_BYTES_MAX + 1];    /* a zero follows */
};

static int
send_all (int fd, const uint8_t *at, size_t bytes)
{
  while (bytes)
    {
      ssize_t n = send (fd, at, bytes, MSG_NOSIGNAL);

      if (n == -1 && errno == EINTR)
        continue;
      if (n == -1)
        return errno == EAGAIN ? -ETIMEDOUT : -errno;
      at += n;
      bytes -= (size_t) n;
    }
  return 0;
}

static int
receive_all (int fd, uint8_t *at, size_t bytes)
{
  while (bytes)
    {
      ssize_t n = recv (fd, at, bytes, 0);

      if (n == -1 && errno == EINTR)
        continue;
      if (n == -1)
        return errno == EAGAIN ? -ETIMEDOUT : -errno;
      if (n == 0)
        return -ECONNRESET;
      at += n;
      bytes -= (size_t) n;
    }
  return 0;
}

/* No time limit is 0 seconds. */
static int
limit_waits (int fd, long seconds)
{
  struct timeval limit = { .tv_sec = seconds };

  if (setsockopt (fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) == -1
      || setsockopt (fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) == -1)
    return -errno;
  return 0;
}

static int
connect_socket (const char *path)
{
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  int size = SOCKET_BUFFER_BYTES;
  int fd, err;

  if (strlen (path) >= sizeof address.sun_path)
    return -ENAMETOOLONG;
  strcpy (address.sun_path, path);
  fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd == -1)
    return -errno;
  /* Fewer turns for large writes; a kernel that grants less is as good. */
  setsockopt (fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
  err = limit_waits (fd, LHB_SESSION_S);
  if (err == 0
      && connect (fd, (struct sockaddr *) &address, sizeof address) == -1)
    err = errno == EAGAIN ? -ETIMEDOUT : -errno;
  if (err == 0)
    return fd;
  close (fd);
  return err;
}

/* Hear what the server is, and say what we are. */
static int
greet (int fd)
{
  uint8_t greeting[NBD_GREETING_BYTES], flags[4];
  int err = receive_all (fd, greeting, sizeof greeting);

  if (err)
    return err;
  if (lhb_get_be64 (greeting) != NBD_MAGIC
      || lhb_get_be64 (greeting + 8) != NBD_IHAVEOPT
      || (lhb_get_be16 (greeting + 16) & NBD_CLIENT_FLAGS) != NBD_CLIENT_FLAGS)
    return -EPROTO;
  lhb_put_be32 (flags, NBD_CLIENT_FLAGS);
  return send_all (fd, flags, sizeof flags);
}

static int
send_option (int fd, uint32_t option, const uint8_t *data, uint32_t bytes)
{
  uint8_t header[NBD_OPTION_BYTES];
  int err;

  lhb_put_be64 (header, NBD_IHAVEOPT);
  lhb_put_be32 (header + 8, option);
  lhb_put_be32 (header + 12, bytes);
  err = send_all (fd, header, sizeof header);
  return err ? err : send_all (fd, data, bytes);
}

/* Receive one reply to an option.  -errno also if it is a refusal. */
static int
receive_reply (int fd, uint32_t option, struct reply *reply)
{
  uint8_t header[NBD_OPTION_REPLY_BYTES];
  int err = receive_all (fd, header, sizeof header);

  reply->bytes = 0;
  if (err)
    return err;
  reply->option = lhb_get_be32 (header + 8);
  reply->type = lhb_get_be32 (header + 12);
  reply->bytes = lhb_get_be32 (header + 16);
  if (lhb_get_be64 (header) != NBD_REP_MAGIC || reply->option != option
      || reply->bytes > REPLY_BYTES_MAX)
    {
      reply->bytes = 0;
      return -EPROTO;
    }
  err = receive_all (fd, reply->data, reply->bytes);
  reply->data[reply->bytes] = 0;
  if (err || !(reply->type & REP_ERROR))
    return err;
  switch (reply->type)
    {
    case REP_ERR_UNKNOWN:
      return -ENOENT;
    case REP_ERR_POLICY:
      return -EBUSY;
    default:
      return -EPROTO;
    }
}

/* ---- The options, one after the other. */

static int
ask_structured (int fd, struct reply *reply)
{
  int err = send_option (fd, NBD_OPT_STRUCTURED_REPLY, NULL, 0);

  if (err == 0)
    err = receive_reply (fd, NBD_OPT_STRUCTURED_REPLY, reply);
  if (err == 0 && reply->type != NBD_REP_ACK)
    err = -EPROTO;
  return err;
}

/* A string with its length before it; returns where it ends. */
static uint8_t *
put_string (uint8_t *at, const char *text)
{
  uint32_t bytes = (uint32_t) strlen (text);

  lhb_put_be32 (at, bytes);
  memcpy (at + 4, text, bytes);
  return at + 4 + bytes;
}

static int
ask_context (int fd, const char *name, struct lhb_export *told,
             struct reply *reply)
{
  uint8_t data[LHB_SESSION_NAME_BYTES_MAX + 64];
  uint8_t *end = put_string (data, name);
  int err;

  lhb_put_be32 (end, 1);
  end = put_string (end + 4, CONTEXT);
  err = send_option (fd, NBD_OPT_SET_META_CONTEXT, data,
                     (uint32_t) (end - data));
  /* Our context, if the server has it, and the end. */
  for (unsigned i = 0; err == 0 && i < 2; i++)
    {
      err = receive_reply (fd, NBD_OPT_SET_META_CONTEXT, reply);
      if (err || reply->type == NBD_REP_ACK)
        return err;
      if (reply->type != NBD_REP_META_CONTEXT
          || reply->bytes != 4 + CONTEXT_BYTES
          || memcmp (reply->data + 4, CONTEXT, CONTEXT_BYTES))
        return -EPROTO;
      told->has_extents = true;
      told->extents_id = lhb_get_be32 (reply->data);
    }
  return err ? err : -EPROTO;
}

/* Look at one piece of information. */
static int
take_info (const struct reply *reply, struct lhb_export *told)
{
  const uint8_t *data = reply->data;

  if (reply->bytes < 2)
    return -EPROTO;
  switch (lhb_get_be16 (data))
    {
    case NBD_INFO_EXPORT:
      if (reply->bytes != NBD_INFO_EXPORT_BYTES)
        return -EPROTO;
      told->size = lhb_get_be64 (data + 2);
      told->flags = lhb_get_be16 (data + 10);
      return told->size && told->size <= INT64_MAX ? 0 : -EPROTO;
    case NBD_INFO_BLOCK_SIZE:
      if (reply->bytes != 14)
        return -EPROTO;
      told->block_min = lhb_get_be32 (data + 2);
      told->block_preferred = lhb_get_be32 (data + 6);
      told->block_max = lhb_get_be32 (data + 10);
      return 0;
    case NBD_INFO_DESCRIPTION:
      if (reply->bytes - 2 > LHB_SESSION_NAME_BYTES_MAX)
        return -EPROTO;
      strcpy (told->description, (const char *) data + 2);
      return 0;
    default:
      return 0;
    }
}

static int
ask_go (int fd, const char *name, struct lhb_export *told,
        struct reply *reply)
{
  uint8_t data[LHB_SESSION_NAME_BYTES_MAX + 64];
  uint8_t *end = put_string (data, name);
  int err;

  lhb_put_be16 (end, 2);
  lhb_put_be16 (end + 2, NBD_INFO_DESCRIPTION);
  lhb_put_be16 (end + 4, NBD_INFO_BLOCK_SIZE);
  err = send_option (fd, NBD_OPT_GO, data, (uint32_t) (end + 6 - data));
  for (unsigned i = 0; err == 0 && i < LHB_SESSION_REPLIES_MAX; i++)
    {
      err = receive_reply (fd, NBD_OPT_GO, reply);
      if (err == 0 && reply->type == NBD_REP_ACK)
        return told->size ? 0 : -EPROTO;
      if (err == 0 && reply->type != NBD_REP_INFO)
        err = -EPROTO;
      if (err == 0)
        err = take_info (reply, told);
    }
  return err ? err : -EPROTO;
}

int
lhb_session_open (const char *path, const char *name, struct lhb_export *told)
{
  struct reply *reply;
  int fd, err;

  memset (told, 0, sizeof *told);
  told->block_min = 1;
  told->block_preferred = 4096;
  told->block_max = 32u << 20;
  if (strlen (name) > LHB_SESSION_NAME_BYTES_MAX)
    return -ENOENT;
  fd = connect_socket (path);
  if (fd < 0)
    return fd;
  reply = malloc (sizeof *reply);
  err = reply ? 0 : -ENOMEM;
  if (err == 0)
    err = greet (fd);
  if (err == 0)
    err = ask_structured (fd, reply);
  if (err == 0)
    err = ask_context (fd, name, told, reply);
  /* What is wrong with the name is said again, and better. */
  if (err == 0 || err == -ENOENT)
    err = ask_go (fd, name, told, reply);
  if (err == 0)
    err = limit_waits (fd, 0);
  if ((err == -ENOENT || err == -EBUSY) && reply)
    snprintf (told->said, sizeof told->said, "%.*s",
              (int) sizeof told->said - 1, (const char *) reply->data);
  free (reply);
  if (err == 0)
    return fd;
  close (fd);
  return err;
}

/* ---- The list. */

static int
take_listed (const struct reply *reply, lhb_listed *listed, void *data)
{
  char name[LHB_SESSION_NAME_BYTES_MAX + 1];
  uint32_t bytes;

  if (reply->type != NBD_REP_SERVER || reply->bytes < 4)
    return -EPROTO;
  bytes = lhb_get_be32 (reply->data);
  if (bytes > reply->bytes - 4 || bytes > LHB_SESSION_NAME_BYTES_MAX)
    return -EPROTO;
  memcpy (name, reply->data + 4, bytes);
  name[bytes] = 0;
  return listed (data, name, (const char *) reply->data + 4 + bytes);
}

int
lhb_session_list (const char *path, lhb_listed *listed, void *data)
{
  struct reply *reply = malloc (sizeof *reply);
  int fd = reply ? connect_socket (path) : -ENOMEM;
  int err = fd < 0 ? fd : greet (fd);

  if (err == 0)
    err = send_option (fd, NBD_OPT_LIST, NULL, 0);
  for (unsigned i = 0; err == 0; i++)
    {
      err = receive_reply (fd, NBD_OPT_LIST, reply);
      if (err == 0 && reply->type == NBD_REP_ACK)
        break;
      if (err == 0)
        err = i < LHB_SESSION_REPLIES_MAX ? take_listed (reply, listed, data)
                                          : -EPROTO;
    }
  if (err == 0)
    send_option (fd, NBD_OPT_ABORT, NULL, 0);   /* politeness alone */
  if (fd >= 0)
    close (fd);
  free (reply);
  return err;
}
