#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <nbdkit-plugin.h>

#include "lhb_bytes.h"
#include "lhb_link.h"
#include "lhb_util.h"

#define CHUNK_ERROR 0x8000u
#define EXTENT_BYTES 8

int
lhb_link_open (struct lhb_link *link, const char *path, const char *name,
               unsigned retry_s)
{
  memset (link, 0, offsetof (struct lhb_link, received));
  link->path = path;
  link->name = name;
  link->retry_s = retry_s;
  link->sent_end = &link->sent;
  link->fd = lhb_session_open (path, name, &link->export);
  if (link->fd < 0)
    return link->fd;
  lhb_mutex_init (&link->sending);
  lhb_mutex_init (&link->lock);
  return 0;
}

static void
put_header (uint8_t *at, const struct lhb_request *request)
{
  lhb_put_be32 (at, NBD_REQUEST_MAGIC);
  lhb_put_be16 (at + 4, request->flags);
  lhb_put_be16 (at + 6, request->type);
  lhb_put_be64 (at + 8, request->cookie);
  lhb_put_be64 (at + 16, request->offset);
  lhb_put_be32 (at + 24, request->bytes);
}

void
lhb_link_close (struct lhb_link *link)
{
  const struct lhb_request last = { .type = NBD_CMD_DISC };
  uint8_t header[NBD_REQUEST_BYTES];

  assert (link->sent == NULL);
  if (link->fd != -1)
    {
      put_header (header, &last);
      /* Politeness alone: the end of the socket says the same. */
      send (link->fd, header, sizeof header, MSG_NOSIGNAL | MSG_DONTWAIT);
      close (link->fd);
    }
  pthread_mutex_destroy (&link->lock);
  pthread_mutex_destroy (&link->sending);
}

/* ---- Requests that have an end.  Called with 'lock'. */

static void
finish (struct lhb_link *link, struct lhb_request *request)
{
  struct lhb_request **place = &link->sent;

  while (*place != request)
    place = &(*place)->next;
  *place = request->next;
  if (link->sent_end == &request->next)
    link->sent_end = place;
  request->done = true;
  sem_post (&request->wake);    /* from here on it is its thread's */
}

/* The connection is of no use any more. */
static void
lose (struct lhb_link *link)
{
  link->down = true;
  shutdown (link->fd, SHUT_RDWR);       /* whoever is sending stops */
  while (link->sent)
    {
      link->sent->lost = true;
      link->sent->err = -EIO;
      finish (link, link->sent);
    }
}

/* ---- Receiving: 0, or -errno when the server talks nonsense. */

static struct lhb_request *
find (struct lhb_link *link, uint64_t cookie)
{
  struct lhb_request *request;

  pthread_mutex_lock (&link->lock);
  for (request = link->sent; request; request = request->next)
    if (request->cookie == cookie)
      break;
  pthread_mutex_unlock (&link->lock);
  return request;
}

/* The last that is said of a request. */
static int
answered (struct lhb_link *link, struct lhb_request *request)
{
  if (request->err == 0 && request->type == NBD_CMD_READ
      && request->got != request->bytes)
    return -EPROTO;
  if (request->err == 0 && request->type == NBD_CMD_BLOCK_STATUS
      && request->got == 0)
    return -EPROTO;
  pthread_mutex_lock (&link->lock);
  finish (link, request);
  pthread_mutex_unlock (&link->lock);
  return 0;
}

/* An error of the protocol as one of ours; -ECONNRESET means to ask the next
 * server. */
static int
errno_of (uint32_t error)
{
  switch (error)
    {
    case NBD_EPERM:
    case NBD_ENOMEM:
    case NBD_EINVAL:
    case NBD_ENOSPC:
    case NBD_ENOTSUP:
      return -(int) error;      /* Linux has the same numbers */
    case NBD_ESHUTDOWN:
      return -ECONNRESET;
    default:
      return -EIO;
    }
}

static int
take_error (struct lhb_request *request, uint32_t error)
{
  request->err = errno_of (error);
  return error == 0 ? -EPROTO : request->err == -ECONNRESET ? -ECONNRESET : 0;
}

static int
take_extents (const struct lhb_link *link, struct lhb_request *request,
              const uint8_t *data, uint32_t bytes)
{
  if (request->type != NBD_CMD_BLOCK_STATUS || bytes < 4 + EXTENT_BYTES
      || (bytes - 4) % EXTENT_BYTES
      || lhb_get_be32 (data) != link->export.extents_id)
    return -EPROTO;
  request->got = 0;
  for (uint32_t at = 4; at < bytes && request->got < LHB_LINK_EXTENTS_MAX;
       at += EXTENT_BYTES)
    request->extents[request->got++] = (struct lhb_extent) {
      .bytes = lhb_get_be32 (data + at),
      .state = lhb_get_be32 (data + at + 4),
    };
  return 0;
}

/* Data follows; it goes where it belongs as it comes in. */
static int
begin_payload (struct lhb_link *link, struct lhb_request *request,
               uint64_t offset, uint32_t bytes, bool last)
{
  uint64_t at = offset - request->offset;

  if (request->type != NBD_CMD_READ || offset < request->offset
      || at > request->bytes || bytes > request->bytes - at)
    return -EPROTO;
  request->got += bytes;
  if (request->got > request->bytes)
    return -EPROTO;
  link->reading = request;
  link->reading_at = request->in + at;
  link->reading_rest = bytes;
  link->reading_last = last;
  return 0;
}

static int
end_payload (struct lhb_link *link)
{
  struct lhb_request *request = link->reading;

  link->reading = NULL;
  return link->reading_last ? answered (link, request) : 0;
}

/* Take a simple reply or a chunk at 'at', if all but its payload is there.
 * Returns its bytes, 0 for more being needed, or -errno. */
static int
take_simple (struct lhb_link *link, const uint8_t *at)
{
  uint32_t error = lhb_get_be32 (at + 4);
  struct lhb_request *request = find (link, lhb_get_be64 (at + 8));
  int err = 0;

  /* With structured replies, a read has no other, and status cannot. */
  if (request == NULL || request->type == NBD_CMD_READ
      || request->type == NBD_CMD_BLOCK_STATUS)
    return -EPROTO;
  if (error)
    err = take_error (request, error);
  if (err == 0)
    err = answered (link, request);
  return err ? err : NBD_SIMPLE_REPLY_BYTES;
}

static int
take_chunk (struct lhb_link *link, const uint8_t *at, uint32_t have)
{
  bool last = lhb_get_be16 (at + 4) & NBD_REPLY_FLAG_DONE;
  uint16_t type = lhb_get_be16 (at + 6);
  uint32_t bytes = lhb_get_be32 (at + 16);
  uint32_t now = type == NBD_REPLY_TYPE_OFFSET_DATA ? 8 : bytes;
  const uint8_t *data = at + NBD_STRUCTURED_REPLY_BYTES;
  struct lhb_request *request;
  int err = -EPROTO;

  if (now > bytes || now > LHB_LINK_RECEIVE_BYTES - NBD_STRUCTURED_REPLY_BYTES)
    return -EPROTO;
  if (have < NBD_STRUCTURED_REPLY_BYTES + now)
    return 0;
  request = find (link, lhb_get_be64 (at + 8));
  if (request == NULL)
    return -EPROTO;
  if (type == NBD_REPLY_TYPE_OFFSET_DATA)
    {
      err = begin_payload (link, request, lhb_get_be64 (data), bytes - 8,
                           last);
      last = false;             /* end_payload answers */
    }
  else if (type == NBD_REPLY_TYPE_NONE)
    err = bytes == 0 && last ? 0 : -EPROTO;
  else if (type == NBD_REPLY_TYPE_BLOCK_STATUS)
    err = take_extents (link, request, data, bytes);
  else if ((type & CHUNK_ERROR) && bytes >= 6)
    err = take_error (request, lhb_get_be32 (data));
  if (err == 0 && last)
    err = answered (link, request);
  return err ? err : (int) (NBD_STRUCTURED_REPLY_BYTES + now);
}

static int
take_header (struct lhb_link *link)
{
  const uint8_t *at = link->received + link->head;
  uint32_t have = link->tail - link->head;

  if (have < NBD_SIMPLE_REPLY_BYTES)
    return 0;
  if (lhb_get_be32 (at) == NBD_SIMPLE_REPLY_MAGIC)
    return take_simple (link, at);
  if (lhb_get_be32 (at) != NBD_STRUCTURED_REPLY_MAGIC)
    return -EPROTO;
  return have < NBD_STRUCTURED_REPLY_BYTES ? 0 : take_chunk (link, at, have);
}

/* Take all that was received. */
static int
take_received (struct lhb_link *link)
{
  for (;;)
    {
      uint32_t have = link->tail - link->head;
      int n;

      if (link->reading)
        {
          uint32_t now
              = have < link->reading_rest ? have : link->reading_rest;

          memcpy (link->reading_at, link->received + link->head, now);
          link->head += now;
          link->reading_at += now;
          link->reading_rest -= now;
          if (link->reading_rest)
            return 0;
          n = end_payload (link);
          if (n < 0)
            return n;
          continue;
        }
      n = take_header (link);
      if (n <= 0)
        return n;
      link->head += (uint32_t) n;
    }
}

/* Wait for something, into the payload that is coming in and then into the
 * buffer. */
static int
receive (struct lhb_link *link)
{
  struct iovec iov[2];
  struct msghdr message = { .msg_iov = iov };
  size_t direct = 0;
  ssize_t n;

  memmove (link->received, link->received + link->head,
           link->tail - link->head);
  link->tail -= link->head;
  link->head = 0;
  if (link->reading)            /* then the buffer is empty */
    {
      direct = link->reading_rest;
      iov[message.msg_iovlen++] = (struct iovec) {
        .iov_base = link->reading_at,
        .iov_len = direct,
      };
    }
  iov[message.msg_iovlen++] = (struct iovec) {
    .iov_base = link->received + link->tail,
    .iov_len = LHB_LINK_RECEIVE_BYTES - link->tail,
  };
  do
    n = recvmsg (link->fd, &message, 0);
  while (n == -1 && errno == EINTR);
  if (n <= 0)
    return n ? -errno : -ECONNRESET;
  if ((size_t) n < direct)
    direct = (size_t) n;
  link->reading_at += direct;
  link->reading_rest -= (uint32_t) direct;
  link->tail += (uint32_t) ((size_t) n - direct);
  return take_received (link);
}

/* Receive for everybody until 'mine' is answered, then let another. */
static void
lead (struct lhb_link *link, const struct lhb_request *mine)
{
  int err = 0;

  while (err == 0 && !mine->done)
    err = receive (link);
  pthread_mutex_lock (&link->lock);
  if (err)
    lose (link);
  link->led = false;
  for (struct lhb_request *next = link->sent; next; next = next->next)
    if (next->waits)
      {
        next->waits = false;
        link->led = true;
        sem_post (&next->wake);
        break;
      }
  pthread_mutex_unlock (&link->lock);
}

/* ---- Sending. */

/* Connect again.  Called with 'sending' when the link is down, so nobody
 * receives. */
static int
come_up (struct lhb_link *link)
{
  struct lhb_export *told = malloc (sizeof *told);
  int fd;

  if (told == NULL)
    return -ENOMEM;
  if (link->fd != -1)
    close (link->fd);
  link->fd = -1;
  fd = lhb_session_open (link->path, link->name, told);
  if (fd >= 0 && told->size < link->export.size)
    {
      nbdkit_error ("lhblock: %s has become smaller, so it is another volume",
                    link->name);
      close (fd);
      fd = -EIO;
    }
  if (fd >= 0)
    {
      link->fd = fd;
      link->export.extents_id = told->extents_id;
      link->reading = NULL;
      link->head = link->tail = 0;
    }
  free (told);
  return fd < 0 ? fd : 0;
}

static void
send_request (int fd, const struct lhb_request *request)
{
  uint8_t header[NBD_REQUEST_BYTES];
  struct iovec iov[2] = { { .iov_base = header, .iov_len = sizeof header } };
  struct msghdr message = { .msg_iov = iov, .msg_iovlen = 1 };

  put_header (header, request);
  if (request->type == NBD_CMD_WRITE)
    iov[message.msg_iovlen++] = (struct iovec) {
      .iov_base = (void *) request->out,
      .iov_len = request->bytes,
    };
  while (message.msg_iovlen)
    {
      ssize_t n = sendmsg (fd, &message, MSG_NOSIGNAL);

      if (n == -1 && errno == EINTR)
        continue;
      if (n == -1)
        {
          shutdown (fd, SHUT_RDWR);     /* whoever receives will notice */
          return;
        }
      while (message.msg_iovlen && (size_t) n >= message.msg_iov->iov_len)
        {
          n -= (ssize_t) message.msg_iov->iov_len;
          message.msg_iov++;
          message.msg_iovlen--;
        }
      if (message.msg_iovlen)
        {
          message.msg_iov->iov_base = (char *) message.msg_iov->iov_base + n;
          message.msg_iov->iov_len -= (size_t) n;
        }
    }
}

/* Send a request, connecting first if need be.  -errno: there is no server. */
static int
start (struct lhb_link *link, struct lhb_request *request)
{
  int err = 0;

  request->got = 0;
  request->err = 0;
  request->done = request->lost = request->waits = false;
  request->next = NULL;
  pthread_mutex_lock (&link->sending);
  pthread_mutex_lock (&link->lock);
  if (link->down)
    {
      pthread_mutex_unlock (&link->lock);
      err = come_up (link);
      pthread_mutex_lock (&link->lock);
      link->down = err != 0;
    }
  if (err == 0)
    {
      request->cookie = ++link->cookie;
      *link->sent_end = request;
      link->sent_end = &request->next;
    }
  pthread_mutex_unlock (&link->lock);
  if (err == 0)
    send_request (link->fd, request);
  pthread_mutex_unlock (&link->sending);
  return err;
}

/* Whether the caller is the one who receives; else it is noted that it waits. */
static bool
take_lead (struct lhb_link *link, struct lhb_request *request)
{
  bool leads;

  pthread_mutex_lock (&link->lock);
  leads = !request->done && !link->led;
  if (leads)
    link->led = true;
  else
    request->waits = !request->done;
  pthread_mutex_unlock (&link->lock);
  return leads;
}

static void
wait_woken (struct lhb_request *request)
{
  while (sem_wait (&request->wake) == -1)
    assert (errno == EINTR);
}

/* Send it and wait until it is done.  -errno: there is no server. */
static int
exchange (struct lhb_link *link, struct lhb_request *request)
{
  int err = start (link, request);

  if (err)
    return err;
  if (take_lead (link, request))
    lead (link, request);
  wait_woken (request);
  if (!request->done)           /* receiving was passed on to us */
    {
      lead (link, request);
      wait_woken (request);
    }
  return 0;
}

int
lhb_link_call (struct lhb_link *link, struct lhb_request *request)
{
  uint64_t deadline_ns = 0;
  int err;

  if (sem_init (&request->wake, 0, 0) == -1)
    return -errno;
  for (;;)
    {
      uint64_t now_ns;

      err = exchange (link, request);
      if (err == 0 && !request->lost)
        {
          err = request->err;
          break;
        }
      err = -EIO;
      now_ns = lhb_now_ns ();
      if (deadline_ns == 0)
        deadline_ns = now_ns + link->retry_s * 1000000000ull;
      if (now_ns >= deadline_ns)
        break;
      if (nbdkit_nanosleep (0, LHB_LINK_RETRY_NS) == -1)
        {
          err = -ESHUTDOWN;
          break;
        }
    }
  sem_destroy (&request->wake);
  return err;
}
