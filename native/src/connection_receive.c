/* Connection: from bytes to calls. */

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "lhb_connection.h"
#include "lhb_fault.h"
#include "lhb_volume.h"

/* Slots are threaded on the free list when they were used once; the others
 * have never been touched and cost no memory. */
static struct lhb_slot *
take_slot (struct lhb_connection *connection)
{
  struct lhb_slot *slot = connection->free_slots;

  if (slot != NULL)
    connection->free_slots = slot->next;
  else if (connection->slots_touched < LHB_CONN_REQUESTS)
    slot = &connection->slots[connection->slots_touched++];
  else
    return NULL;
  slot->connection = connection;
  slot->slab = slot->edges = NULL;
  slot->payload = NULL;
  slot->payload_bytes = 0;
  connection->in_flight++;
  return slot;
}

/* A slot with the buffers that a call needs.  NULL: none free now. */
static struct lhb_slot *
prepare_slot (struct lhb_connection *connection, const struct lhb_call *call)
{
  struct lhb_slot *slot = take_slot (connection);

  if (slot == NULL)
    return NULL;
  slot->call = *call;
  if (call->refusal)
    return slot;
  if (call->slab_blocks > 0)
    slot->slab = lhb_slabs_take (&connection->slabs, call->slab_blocks);
  if (call->needs_edges)
    slot->edges = lhb_slabs_take (&connection->slabs, 2);
  if ((call->slab_blocks > 0 && slot->slab == NULL)
      || (call->needs_edges && slot->edges == NULL))
    {
      lhb_connection_free_slot (slot);
      return NULL;
    }
  return slot;
}

/* Throw a payload away, unless that would take for ever. */
static void
skip_payload (struct lhb_connection *connection, uint32_t payload_bytes)
{
  if (payload_bytes > LHB_SKIP_BYTES_MAX)
    lhb_connection_give_up (connection, LHB_CLOSE_TOO_LARGE);
  else if (payload_bytes > 0)
    {
      connection->state = LHB_RECEIVE_SKIP;
      connection->payload_left = payload_bytes;
      /* All of it passes through the buffer. */
      connection->expect_large = false;
    }
}

static void
start_call (struct lhb_connection *connection, struct lhb_slot *slot)
{
  const struct lhb_call *call = &slot->call;

  connection->expect_large
      = call->payload_bytes > LHB_CONN_RECEIVE_BYTES / 4;
  if (call->refusal)
    {
      skip_payload (connection, call->payload_bytes);
      if (connection->closing)
        lhb_connection_free_slot (slot);
      else
        lhb_connection_reply (slot, call->refusal);
    }
  else if (call->payload_bytes > 0)
    {
      connection->state = LHB_RECEIVE_PAYLOAD;
      connection->receiving = slot;
      connection->payload_left = call->payload_bytes;
    }
  else
    connection->protocol->execute (slot);
}

/* Handle the header at the front of the buffer.  False: no room for the call
 * now. */
static bool
take_header (struct lhb_connection *connection)
{
  const uint8_t *at = (const uint8_t *) connection->receive
                      + connection->receive_first;
  struct lhb_call call = { 0 };
  struct lhb_slot *slot = NULL;

  switch (connection->protocol->parse (connection, at, &call))
    {
    case LHB_CALL_BAD_MAGIC:
      lhb_connection_give_up (connection, LHB_CLOSE_BAD_MAGIC);
      return true;
    case LHB_CALL_END:
      lhb_connection_give_up (connection, LHB_CLOSE_CLIENT);
      return true;
    case LHB_CALL_IGNORE:
      break;
    case LHB_CALL_OK:
      slot = prepare_slot (connection, &call);
      if (slot == NULL)
        return false;
      break;
    }
  connection->receive_first += connection->protocol->header_bytes;
  connection->receive_count -= connection->protocol->header_bytes;
  if (slot == NULL)
    skip_payload (connection, call.payload_bytes);
  else
    start_call (connection, slot);
  return true;
}

static char *
payload_at (const struct lhb_connection *connection)
{
  const struct lhb_slot *slot = connection->receiving;

  return slot->slab + slot->call.payload_at
         + (slot->call.payload_bytes - connection->payload_left);
}

static void
took_payload (struct lhb_connection *connection, uint32_t bytes)
{
  struct lhb_slot *slot = connection->receiving;

  connection->payload_left -= bytes;
  if (connection->payload_left > 0)
    return;
  if (connection->state == LHB_RECEIVE_PAYLOAD)
    {
      connection->receiving = NULL;
      connection->protocol->execute (slot);
    }
  connection->state = LHB_RECEIVE_HEADER;
}

/* Payload that came with the header. */
static void
take_buffered_payload (struct lhb_connection *connection)
{
  uint32_t bytes = connection->receive_count < connection->payload_left
                       ? connection->receive_count
                       : connection->payload_left;

  if (connection->state == LHB_RECEIVE_PAYLOAD)
    memcpy (payload_at (connection),
            connection->receive + connection->receive_first, bytes);
  connection->receive_first += bytes;
  connection->receive_count -= bytes;
  took_payload (connection, bytes);
}

/* Handle all that is complete in the buffer.  False: starved. */
static bool
parse_buffer (struct lhb_connection *connection)
{
  while (!connection->closing)
    {
      if (connection->state != LHB_RECEIVE_HEADER)
        {
          if (connection->receive_count == 0)
            return true;
          take_buffered_payload (connection);
        }
      else if (connection->receive_count < connection->protocol->header_bytes)
        return true;
      else if (!take_header (connection))
        return false;
    }
  return true;
}

/* Where the next bytes go: the rest of a payload straight into its slab, then
 * the buffer. */
static unsigned
plan_receive (struct lhb_connection *connection, struct iovec *iov)
{
  uint32_t room;
  unsigned count = 0;

  if (connection->receive_count == 0)
    connection->receive_first = 0;
  else if (connection->receive_first > 0)
    {
      memmove (connection->receive,
               connection->receive + connection->receive_first,
               connection->receive_count);
      connection->receive_first = 0;
    }
  room = LHB_CONN_RECEIVE_BYTES - connection->receive_count;
  if (connection->state == LHB_RECEIVE_PAYLOAD)
    iov[count++] = (struct iovec){ payload_at (connection),
                                   connection->payload_left };
  /* After a large payload comes another: reading only its header spares the
   * copy of what would follow it into the buffer. */
  if (connection->expect_large && room > connection->protocol->header_bytes)
    room = connection->protocol->header_bytes;
  iov[count++] = (struct iovec){
    connection->receive + connection->receive_count, room
  };
  return count;
}

static int
end_of_stream (const struct lhb_connection *connection)
{
  bool between = connection->state == LHB_RECEIVE_HEADER
                 && connection->receive_count == 0;

  return between ? LHB_CLOSE_EOF : LHB_CLOSE_MID_REQUEST;
}

static void
took_bytes (struct lhb_connection *connection, size_t bytes)
{
  if (connection->state == LHB_RECEIVE_PAYLOAD)
    {
      uint32_t direct = bytes < connection->payload_left
                            ? (uint32_t) bytes
                            : connection->payload_left;

      bytes -= direct;
      connection->receive_count += (uint32_t) bytes;
      took_payload (connection, direct);
    }
  else
    connection->receive_count += (uint32_t) bytes;
}

static void
receive (struct lhb_connection *connection)
{
  struct iovec iov[2];
  struct msghdr message = { .msg_iov = iov };
  size_t asked = 0;
  ssize_t got;
  int err = lhb_fault (LHB_FAULT_SOCKET_RECEIVE, 0);

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
    lhb_connection_give_up (connection, end_of_stream (connection));
  else if (err == 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
    connection->readable = false;
  else if (err || errno != EINTR)
    lhb_connection_give_up (connection, LHB_CLOSE_SOCKET_ERROR);
}

void
lhb_connection_pump (struct lhb_connection *connection)
{
  for (int receives = 0;; receives++)
    {
      if (!parse_buffer (connection))
        {
          connection->starved = true;
          return;
        }
      if (connection->closing || !connection->readable)
        return;
      if (receives == LHB_TURN_RECEIVES_MAX)
        {
          /* The others' turn; the rest in the next one. */
          lhb_queue_at_turn_end (connection->queue, &connection->turn_end);
          return;
        }
      receive (connection);
    }
}
