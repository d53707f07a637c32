/* NBD connection: from bytes to requests. */

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "lhb_fault.h"
#include "lhb_nbd_receive.h"
#include "lhb_volume.h"

static uint64_t
get_be (const char *at, unsigned bytes)
{
  uint64_t value = 0;

  for (unsigned i = 0; i < bytes; i++)
    value = value << 8 | (uint8_t) at[i];
  return value;
}

static struct lhb_nbd_header
parse_header (const char *at)
{
  return (struct lhb_nbd_header){
    .flags = (uint16_t) get_be (at + 4, 2),
    .type = (uint16_t) get_be (at + 6, 2),
    .cookie = get_be (at + 8, 8),
    .offset_bytes = get_be (at + 16, 8),
    .length_bytes = (uint32_t) get_be (at + 24, 4),
  };
}

/* Slots are threaded on the free list when they were used once; the others
 * have never been touched and cost no memory. */
static struct lhb_nbd_slot *
take_slot (struct lhb_nbd_connection *connection)
{
  struct lhb_nbd_slot *slot = connection->free_slots;

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

static bool
needs_slab (uint16_t type)
{
  return type == NBD_CMD_READ || type == NBD_CMD_WRITE
         || type == NBD_CMD_BLOCK_STATUS;
}

/* A slot with the buffers that a good request needs.  NULL: none free now. */
static struct lhb_nbd_slot *
prepare_slot (struct lhb_nbd_connection *connection,
              const struct lhb_nbd_header *header, bool good)
{
  struct lhb_nbd_slot *slot = take_slot (connection);
  bool partial_write
      = header->type == NBD_CMD_WRITE
        && lhb_request_is_partial (header->offset_bytes, header->length_bytes);

  if (slot == NULL)
    return NULL;
  slot->header = *header;
  if (!good || !needs_slab (header->type))
    return slot;
  slot->slab = lhb_slabs_take (&connection->slabs,
                               lhb_nbd_span_blocks (header));
  if (slot->slab != NULL && partial_write)
    slot->edges = lhb_slabs_take (&connection->slabs, 2);
  if (slot->slab == NULL || (partial_write && slot->edges == NULL))
    {
      lhb_nbd_free_slot (slot);
      return NULL;
    }
  return slot;
}

/* A refused request: answer it, and throw the data of a WRITE away. */
static void
refuse (struct lhb_nbd_slot *slot, uint32_t error)
{
  struct lhb_nbd_connection *connection = slot->connection;

  if (slot->header.type == NBD_CMD_WRITE && slot->header.length_bytes > 0)
    {
      if (slot->header.length_bytes > LHB_NBD_SKIP_MAX)
        {
          lhb_nbd_free_slot (slot);
          lhb_nbd_give_up (connection, LHB_CLOSE_TOO_LARGE);
          return;
        }
      connection->state = LHB_NBD_SKIP;
      connection->payload_left = slot->header.length_bytes;
    }
  lhb_nbd_reply (slot, error);
}

/* Start the request whose header is at the front of the buffer.  False: no
 * room for it now. */
static bool
start_request (struct lhb_nbd_connection *connection)
{
  const char *at = connection->receive + connection->receive_first;
  struct lhb_nbd_header header = parse_header (at);
  struct lhb_nbd_slot *slot;
  uint32_t error;

  if (get_be (at, 4) != NBD_REQUEST_MAGIC)
    {
      lhb_nbd_give_up (connection, LHB_CLOSE_BAD_MAGIC);
      return true;
    }
  if (header.type == NBD_CMD_DISC)
    {
      lhb_nbd_give_up (connection, LHB_CLOSE_CLIENT);
      return true;
    }
  error = lhb_nbd_check (connection, &header);
  slot = prepare_slot (connection, &header, error == 0);
  if (slot == NULL)
    return false;
  connection->receive_first += NBD_REQUEST_BYTES;
  connection->receive_count -= NBD_REQUEST_BYTES;
  connection->expect_large = header.type == NBD_CMD_WRITE
                             && header.length_bytes > LHB_CONN_RECEIVE_BYTES / 4;
  if (error)
    refuse (slot, error);
  else if (header.type == NBD_CMD_WRITE)
    {
      connection->state = LHB_NBD_PAYLOAD;
      connection->receiving = slot;
      connection->payload_left = header.length_bytes;
    }
  else
    lhb_nbd_execute (slot);
  return true;
}

static char *
payload_at (const struct lhb_nbd_connection *connection)
{
  const struct lhb_nbd_slot *slot = connection->receiving;

  return slot->slab + slot->header.offset_bytes % LHB_BLOCK_BYTES
         + (slot->header.length_bytes - connection->payload_left);
}

static void
took_payload (struct lhb_nbd_connection *connection, uint32_t bytes)
{
  struct lhb_nbd_slot *slot = connection->receiving;

  connection->payload_left -= bytes;
  if (connection->payload_left > 0)
    return;
  if (connection->state == LHB_NBD_PAYLOAD)
    {
      connection->receiving = NULL;
      lhb_nbd_execute (slot);
    }
  connection->state = LHB_NBD_HEADER;
}

/* Payload that came with the header. */
static void
take_buffered_payload (struct lhb_nbd_connection *connection)
{
  uint32_t bytes = connection->receive_count < connection->payload_left
                       ? connection->receive_count
                       : connection->payload_left;

  if (connection->state == LHB_NBD_PAYLOAD)
    memcpy (payload_at (connection),
            connection->receive + connection->receive_first, bytes);
  connection->receive_first += bytes;
  connection->receive_count -= bytes;
  took_payload (connection, bytes);
}

/* Handle all that is complete in the buffer.  False: starved. */
static bool
parse_buffer (struct lhb_nbd_connection *connection)
{
  while (!connection->closing)
    {
      if (connection->state != LHB_NBD_HEADER)
        {
          if (connection->receive_count == 0)
            return true;
          take_buffered_payload (connection);
        }
      else if (connection->receive_count < NBD_REQUEST_BYTES)
        return true;
      else if (!start_request (connection))
        return false;
    }
  return true;
}

/* Where the next bytes go: the rest of a payload straight into its slab, then
 * the buffer. */
static unsigned
plan_receive (struct lhb_nbd_connection *connection, struct iovec *iov)
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
  if (connection->state == LHB_NBD_PAYLOAD)
    iov[count++] = (struct iovec){ payload_at (connection),
                                   connection->payload_left };
  /* After a large write comes another: reading only its header spares the
   * copy of what would follow it into the buffer. */
  if (connection->expect_large && room > NBD_REQUEST_BYTES)
    room = NBD_REQUEST_BYTES;
  iov[count++] = (struct iovec){
    connection->receive + connection->receive_count, room
  };
  return count;
}

static int
end_of_stream (const struct lhb_nbd_connection *connection)
{
  bool between = connection->state == LHB_NBD_HEADER
                 && connection->receive_count == 0;

  return between ? LHB_CLOSE_EOF : LHB_CLOSE_MID_REQUEST;
}

static void
took_bytes (struct lhb_nbd_connection *connection, size_t bytes)
{
  if (connection->state == LHB_NBD_PAYLOAD)
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
receive (struct lhb_nbd_connection *connection)
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
    lhb_nbd_give_up (connection, end_of_stream (connection));
  else if (err == 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
    connection->readable = false;
  else if (err || errno != EINTR)
    lhb_nbd_give_up (connection, LHB_CLOSE_SOCKET_ERROR);
}

void
lhb_nbd_pump (struct lhb_nbd_connection *connection)
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
