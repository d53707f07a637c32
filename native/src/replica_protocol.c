/* The replica's side of the data protocol: frames to requests and back.
 *
 * The volume behind it has the replica's store and nothing else.  What is
 * refused is answered with an Error frame, whose text engines match.
 */

#include <errno.h>
#include <string.h>

#include "lhb_bytes.h"
#include "lhb_connection.h"
#include "lhb_replica_wire.h"
#include "lhb_util.h"
#include "lhb_volume.h"

/* Errors of this protocol are errno values; EOVERFLOW stands for a range
 * beyond the end. */

static bool
is_write (uint16_t type)
{
  return type == LHB_FRAME_WRITE || type == LHB_FRAME_WRITE_FUA;
}

/* What it is about comes with it. */
static bool
brings_payload (uint16_t type)
{
  return is_write (type) || type == LHB_FRAME_PING
         || type == LHB_FRAME_ACTIVITY;
}

/* Longhorn ignores what it does not know, and so do we. */
static bool
is_request (uint32_t type)
{
  return type == LHB_FRAME_READ || type == LHB_FRAME_WRITE
         || type == LHB_FRAME_PING || type == LHB_FRAME_UNMAP
         || (type >= LHB_FRAME_FLUSH && type <= LHB_FRAME_ZERO_NO_HOLE)
         || (type >= LHB_FRAME_ZERO_FAST && type <= LHB_FRAME_ACTIVITY);
}

static uint32_t
judge (const struct lhb_connection *connection, const struct lhb_call *call)
{
  uint64_t size = atomic_load (&connection->volume->size_bytes);

  if (call->type == LHB_FRAME_ACTIVITY)
    return call->payload_bytes
                   <= LHB_ACTIVITY_PAGES_MAX * LHB_ACTIVITY_PAGE_BYTES
               ? 0
               : EMSGSIZE;
  if (!is_write (call->type) && call->payload_bytes > LHB_BLOCK_BYTES)
    return EMSGSIZE;            /* nothing else has a payload worth reading */
  if (call->type == LHB_FRAME_PING)
    return 0;
  if (call->type == LHB_FRAME_FLUSH)
    return 0;
  /* A negative offset is a huge one here. */
  if (call->offset_bytes > size
      || call->length_bytes > size - call->offset_bytes)
    return EOVERFLOW;
  /* The largest slab, so one block more where an engine widened a write. */
  if ((call->type == LHB_FRAME_READ || is_write (call->type))
      && (call->length_bytes > LHB_PAYLOAD_BYTES_MAX + LHB_BLOCK_BYTES
          || lhb_request_span_blocks (call->offset_bytes, call->length_bytes)
                 > LHB_SPAN_BLOCKS_MAX))
    return EMSGSIZE;
  return 0;
}

static enum lhb_verdict
parse (const struct lhb_connection *connection, const uint8_t *header,
       struct lhb_call *call)
{
  uint32_t type = lhb_get_le32 (header + 6);

  if (lhb_get_le16 (header) != LHB_FRAME_MAGIC)
    return LHB_CALL_BAD_MAGIC;
  call->payload_bytes = lhb_get_le32 (header + 22);
  if (!is_request (type))
    return LHB_CALL_IGNORE;
  call->type = (uint16_t) type;
  call->cookie = lhb_get_le32 (header + 2);
  call->offset_bytes = lhb_get_le64 (header + 10);
  call->length_bytes = brings_payload (call->type)
                           ? call->payload_bytes
                           : lhb_get_le32 (header + 18);
  call->refusal = judge (connection, call);
  if (call->refusal)
    return LHB_CALL_OK;
  if (type == LHB_FRAME_READ || is_write (call->type))
    call->slab_blocks
        = lhb_request_span_blocks (call->offset_bytes, call->length_bytes);
  /* Whatever comes is received: into a buffer. */
  if (call->payload_bytes > 0 && call->slab_blocks == 0)
    call->slab_blocks = lhb_request_span_blocks (0, call->payload_bytes);
  if (is_write (call->type))
    {
      call->payload_at = (uint32_t) (call->offset_bytes % LHB_BLOCK_BYTES);
      call->needs_edges
          = lhb_request_is_partial (call->offset_bytes, call->length_bytes);
    }
  return LHB_CALL_OK;
}

static void
complete (struct lhb_request *request)
{
  struct lhb_slot *slot
      = lhb_container_of (request, struct lhb_slot, request);

  if (slot->call.type == LHB_FRAME_READ)
    {
      slot->payload = slot->slab + slot->call.offset_bytes % LHB_BLOCK_BYTES;
      slot->payload_bytes = slot->call.length_bytes;
    }
  lhb_connection_reply (slot, (uint32_t) -request->error);
}

/* Whole blocks inside an Unmap; false: there are none. */
static bool
round_inwards (struct lhb_request *request)
{
  const uint64_t mask = LHB_BLOCK_BYTES - 1;
  uint64_t first = (request->offset_bytes + mask) & ~mask;
  uint64_t end = (request->offset_bytes + request->length_bytes) & ~mask;

  if (end <= first)
    return false;
  request->offset_bytes = first;
  request->length_bytes = end - first;
  return true;
}

static bool
prepare (struct lhb_request *request, uint16_t type)
{
  switch (type)
    {
    case LHB_FRAME_READ:
      request->op = LHB_OP_READ;
      return request->length_bytes > 0;
    case LHB_FRAME_WRITE_FUA:
      request->flags = LHB_IO_FUA;
      /* fall through */
    case LHB_FRAME_WRITE:
      request->op = LHB_OP_WRITE;
      return request->length_bytes > 0;
    case LHB_FRAME_FLUSH:
      request->op = LHB_OP_FLUSH;
      request->length_bytes = 0;
      return true;
    case LHB_FRAME_UNMAP:
      request->op = LHB_OP_TRIM;
      return round_inwards (request);
    case LHB_FRAME_TRIM:
      request->op = LHB_OP_TRIM;
      return request->length_bytes > 0;
    case LHB_FRAME_ACTIVITY:
      request->op = LHB_OP_ACTIVITY;
      request->offset_bytes = 0;
      return request->length_bytes > 0;
    default:
      request->op = LHB_OP_ZERO;
      if (type == LHB_FRAME_ZERO_NO_HOLE || type == LHB_FRAME_ZERO_FAST_NO_HOLE)
        request->flags |= LHB_IO_NO_HOLE;
      if (type == LHB_FRAME_ZERO_FAST || type == LHB_FRAME_ZERO_FAST_NO_HOLE)
        request->flags |= LHB_IO_FAST_ZERO;
      return request->length_bytes > 0;
    }
}

static void
execute (struct lhb_slot *slot)
{
  struct lhb_connection *connection = slot->connection;
  struct lhb_request *request = &slot->request;

  if (slot->call.type == LHB_FRAME_PING)
    {
      slot->payload = slot->slab;
      slot->payload_bytes = slot->call.payload_bytes;
      lhb_connection_reply (slot, 0);
      return;
    }
  request->volume = connection->volume;
  request->queue = connection->queue;
  request->flags = 0;
  request->offset_bytes = slot->call.offset_bytes;
  request->length_bytes = slot->call.length_bytes;
  request->buffer = slot->slab;
  request->edges = slot->edges;
  request->complete = complete;
  if (prepare (request, slot->call.type))
    lhb_request_start (request);
  else
    lhb_connection_reply (slot, 0);     /* nothing to do is done */
}

static bool
is_change (uint16_t type)
{
  return is_write (type) || type == LHB_FRAME_UNMAP
         || (type >= LHB_FRAME_TRIM && type < LHB_FRAME_ACTIVITY);
}

/* What an Error reply says of a change: how much of it is done. */
static uint32_t
done_bytes (const struct lhb_slot *slot)
{
  if (slot->call.refusal)
    return 0;
  return slot->request.unsure ? LHB_FRAME_UNSURE
                              : (uint32_t) slot->request.done_bytes;
}

static void
format_reply (struct lhb_slot *slot, uint32_t error)
{
  const struct lhb_call *call = &slot->call;
  uint32_t type = LHB_FRAME_RESPONSE;
  uint32_t size = slot->payload_bytes > 0 ? slot->payload_bytes
                                          : call->length_bytes;
  uint32_t payload = slot->payload_bytes;

  slot->reply_bytes = LHB_FRAME_BYTES;
  if (error)
    {
      const char *text = lhb_frame_error_text (error);

      type = LHB_FRAME_ERROR;
      payload = size = (uint32_t) strlen (text);
      if (is_change (call->type))
        size = done_bytes (slot);
      memcpy (slot->reply + LHB_FRAME_BYTES, text, payload);
      slot->reply_bytes += payload;
      slot->payload_bytes = 0;
    }
  else if (call->type == LHB_FRAME_UNMAP)
    size = 0;                   /* bytes freed: not counted */
  lhb_put_le16 (slot->reply, LHB_FRAME_MAGIC);
  lhb_put_le32 (slot->reply + 2, (uint32_t) call->cookie);
  lhb_put_le32 (slot->reply + 6, type);
  lhb_put_le64 (slot->reply + 10, call->offset_bytes);
  lhb_put_le32 (slot->reply + 18, size);
  lhb_put_le32 (slot->reply + 22, payload);
}

static const struct lhb_protocol replica = {
  .header_bytes = LHB_FRAME_BYTES,
  .parse = parse,
  .execute = execute,
  .format_reply = format_reply,
};

int
lhb_replica_attach (lhb_volume *volume, int socket_fd,
                    uint64_t *connection_id_out)
{
  return lhb_connection_attach (volume, &replica, socket_fd, 0, 0,
                                connection_id_out);
}
