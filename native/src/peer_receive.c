/* Receiving from a peer: bytes to replies.  Nothing is believed: a reply that
 * makes no sense ends the peer. */

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "lhb_bytes.h"
#include "lhb_fault.h"
#include "lhb_peer_parts.h"

struct reply {
  uint32_t sequence, type, size_bytes, payload_bytes;
};

static bool
has_ended (const struct lhb_peer_connection *connection)
{
  return lhb_peer_has_ended (connection->owner->peer);
}

static void
refuse (struct lhb_peer_connection *connection, uint32_t reason)
{
  lhb_peer_end (connection->owner->peer, EPROTO, reason);
}

/* The call that a reply is for, or NULL: there is none.  A frame of which the
 * peer cannot have seen a header, or all of it if it is content with it, has
 * no reply yet. */
static struct lhb_peer_call *
find_call (const struct lhb_peer_connection *connection,
           const struct reply *reply)
{
  uint32_t slot = reply->sequence & 0xff;
  struct lhb_peer_call *call
      = slot < LHB_PEER_IN_FLIGHT_MAX ? connection->calls[slot] : NULL;

  if (call == NULL || call->sequence != reply->sequence || call->replied)
    return NULL;
  if (call->sent)
    return call;
  return reply->type == LHB_FRAME_ERROR && call == connection->send
                 && connection->sent_bytes >= LHB_FRAME_BYTES
             ? call
             : NULL;
}

/* Drop what was parsed. */
static void
consume (struct lhb_peer_connection *connection, uint32_t bytes)
{
  connection->receive_first += bytes;
  connection->receive_count -= bytes;
}

/* 0, or why the reply ends the peer. */
static uint32_t
judge_response (const struct lhb_peer_call *call, const struct reply *reply)
{
  bool is_write
      = call->type == LHB_FRAME_WRITE || call->type == LHB_FRAME_WRITE_FUA;
  uint32_t payload = call->type == LHB_FRAME_READ ? call->size_bytes : 0;

  if (reply->payload_bytes != payload
      || (is_write && reply->size_bytes != call->size_bytes))
    return LHB_PEER_END_BAD_LENGTH;
  return 0;
}

static void
take_response (struct lhb_peer_connection *connection,
               struct lhb_peer_call *call, const struct reply *reply)
{
  uint32_t reason = judge_response (call, reply);

  if (reason)
    {
      refuse (connection, reason);
      return;
    }
  consume (connection, LHB_FRAME_BYTES);
  connection->expect_large
      = reply->payload_bytes > LHB_PEER_RECEIVE_BYTES / 4;
  if (reply->payload_bytes == 0)
    {
      lhb_peer_count (&connection->owner->counters.frames_received, 1);
      lhb_peer_replied (call, 0, reply->size_bytes);
      return;
    }
  connection->receiving = call;
  connection->payload_left = reply->payload_bytes;
}

/* False: the text is not complete yet.  It fits the buffer. */
static bool
take_error (struct lhb_peer_connection *connection,
            struct lhb_peer_call *call, const struct reply *reply)
{
  const char *text = connection->receive + connection->receive_first
                     + LHB_FRAME_BYTES;
  int error = EIO;

  if (reply->payload_bytes > LHB_PEER_TEXT_BYTES_MAX)
    {
      refuse (connection, LHB_PEER_END_BAD_LENGTH);
      return true;
    }
  if (connection->receive_count < LHB_FRAME_BYTES + reply->payload_bytes)
    return false;
  if (reply->type == LHB_FRAME_ERROR)
    error = lhb_frame_error_of (text, reply->payload_bytes);
  consume (connection, LHB_FRAME_BYTES + reply->payload_bytes);
  lhb_peer_count (&connection->owner->counters.frames_received, 1);
  lhb_peer_replied (call, -error, reply->size_bytes);
  return true;
}

/* Handle the header at the front of the buffer.  False: more bytes are needed
 * first. */
static bool
take_header (struct lhb_peer_connection *connection)
{
  const uint8_t *at = (const uint8_t *) connection->receive
                      + connection->receive_first;
  struct reply reply = {
    .sequence = lhb_get_le32 (at + 2),
    .type = lhb_get_le32 (at + 6),
    .size_bytes = lhb_get_le32 (at + 18),
    .payload_bytes = lhb_get_le32 (at + 22),
  };
  uint16_t magic = lhb_get_le16 (at);
  struct lhb_peer_call *call;

  /* Longhorn says goodbye with a magic number of 0. */
  if (reply.type == LHB_FRAME_CLOSE && (magic == 0 || magic == LHB_FRAME_MAGIC))
    lhb_peer_end (connection->owner->peer, ECONNRESET, LHB_PEER_END_GOODBYE);
  else if (magic != LHB_FRAME_MAGIC)
    refuse (connection, LHB_PEER_END_BAD_MAGIC);
  else if (reply.type != LHB_FRAME_RESPONSE && reply.type != LHB_FRAME_ERROR
           && reply.type != LHB_FRAME_EOF)
    refuse (connection, LHB_PEER_END_BAD_TYPE);
  else if ((call = find_call (connection, &reply)) == NULL)
    refuse (connection, LHB_PEER_END_BAD_SEQUENCE);
  else if (reply.type == LHB_FRAME_RESPONSE)
    take_response (connection, call, &reply);
  else
    return take_error (connection, call, &reply);
  return true;
}

static char *
payload_at (const struct lhb_peer_connection *connection)
{
  const struct lhb_peer_call *call = connection->receiving;

  return call->buffer + (call->size_bytes - connection->payload_left);
}

static void
took_payload (struct lhb_peer_connection *connection, uint32_t bytes)
{
  struct lhb_peer_call *call = connection->receiving;

  connection->payload_left -= bytes;
  if (connection->payload_left > 0)
    return;
  connection->receiving = NULL;
  lhb_peer_count (&connection->owner->counters.frames_received, 1);
  lhb_peer_replied (call, 0, call->size_bytes);
}

static void
take_buffered_payload (struct lhb_peer_connection *connection)
{
  uint32_t bytes = connection->receive_count < connection->payload_left
                       ? connection->receive_count
                       : connection->payload_left;

  memcpy (payload_at (connection),
          connection->receive + connection->receive_first, bytes);
  consume (connection, bytes);
  took_payload (connection, bytes);
}

/* Handle all that is complete in the buffer. */
static void
parse_buffer (struct lhb_peer_connection *connection)
{
  while (!has_ended (connection) && connection->receive_count > 0)
    if (connection->receiving != NULL)
      take_buffered_payload (connection);
    else if (connection->receive_count < LHB_FRAME_BYTES
             || !take_header (connection))
      return;
}

/* Where the next bytes go: the rest of a payload straight to its request, then
 * the buffer. */
static unsigned
plan_receive (struct lhb_peer_connection *connection, struct iovec *iov)
{
  uint32_t room;
  unsigned count = 0;

  if (connection->receive_first > 0 && connection->receive_count > 0)
    memmove (connection->receive,
             connection->receive + connection->receive_first,
             connection->receive_count);
  connection->receive_first = 0;
  room = LHB_PEER_RECEIVE_BYTES - connection->receive_count;
  assert (room > LHB_FRAME_BYTES);
  if (connection->receiving != NULL)
    iov[count++] = (struct iovec){ payload_at (connection),
                                   connection->payload_left };
  /* After a large payload comes another: reading only its header spares the
   * copy of what would follow it into the buffer. */
  if (connection->expect_large)
    room = LHB_FRAME_BYTES;
  iov[count++] = (struct iovec){
    connection->receive + connection->receive_count, room
  };
  return count;
}

static void
took_bytes (struct lhb_peer_connection *connection, size_t bytes)
{
  lhb_peer_count (&connection->owner->counters.bytes_received, bytes);
  if (connection->receiving != NULL)
    {
      uint32_t direct = bytes < connection->payload_left
                            ? (uint32_t) bytes
                            : connection->payload_left;

      connection->receive_count += (uint32_t) (bytes - direct);
      took_payload (connection, direct);
    }
  else
    connection->receive_count += (uint32_t) bytes;
}

static void
end_of_stream (struct lhb_peer_connection *connection)
{
  bool between
      = connection->receiving == NULL && connection->receive_count == 0;

  lhb_peer_end (connection->owner->peer, ECONNRESET,
                between ? LHB_PEER_END_EOF : LHB_PEER_END_MID_REPLY);
}

static void
receive (struct lhb_peer_connection *connection)
{
  struct lhb_peer *peer = connection->owner->peer;
  struct iovec iov[2];
  struct msghdr message = { .msg_iov = iov };
  size_t asked = 0;
  ssize_t got;
  int err = lhb_fault (LHB_FAULT_PEER_RECEIVE, peer->store->id);

  message.msg_iovlen = plan_receive (connection, iov);
  for (size_t i = 0; i < message.msg_iovlen; i++)
    asked += iov[i].iov_len;
  got = err ? -1 : recvmsg (connection->socket.fd, &message, MSG_DONTWAIT);
  if (got > 0)
    {
      /* A stream socket gives all it has: less than asked means empty. */
      if ((size_t) got < asked)
        connection->readable = connection->hung_up;
      took_bytes (connection, (size_t) got);
    }
  else if (got == 0)
    end_of_stream (connection);
  else if (err)
    lhb_peer_end (peer, -err, LHB_PEER_END_SOCKET_ERROR);
  else if (errno == EAGAIN || errno == EWOULDBLOCK)
    connection->readable = false;
  else if (errno != EINTR)
    lhb_peer_end (peer, errno, LHB_PEER_END_SOCKET_ERROR);
}

void
lhb_peer_receive (struct lhb_peer_connection *connection)
{
  for (int receives = 0;; receives++)
    {
      parse_buffer (connection);
      if (has_ended (connection) || !connection->readable)
        return;
      if (receives == LHB_TURN_RECEIVES_MAX)
        {
          /* The others' turn; the rest in the next one. */
          lhb_queue_at_turn_end (connection->owner->queue,
                                 &connection->turn_end);
          return;
        }
      receive (connection);
    }
}
