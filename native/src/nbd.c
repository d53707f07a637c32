/* NBD: what is refused, what is executed, and what is answered. */

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "lhb_bytes.h"
#include "lhb_connection.h"
#include "lhb_nbd.h"
#include "lhb_util.h"
#include "lhb_volume.h"

/* Lookups that one block status may cost; it may then cover less than asked,
 * which the specification allows. */
#define STATUS_RUNS_MAX 65536

static uint32_t
error_to_nbd (int error)
{
  switch (-error)
    {
    case 0:
      return 0;
    case EPERM:
    case EROFS:
      return NBD_EPERM;
    case ENOMEM:
      return NBD_ENOMEM;
    case EINVAL:
      return NBD_EINVAL;
    case ENOSPC:
    case EFBIG:
    case EDQUOT:
      return NBD_ENOSPC;
    case EOPNOTSUPP:
      return NBD_ENOTSUP;
    case ESHUTDOWN:
      return NBD_ESHUTDOWN;
    default:
      return NBD_EIO;
    }
}

/* FUA is legal on every command and means nothing where nothing is written. */
static uint16_t
legal_flags (uint16_t type)
{
  switch (type)
    {
    case NBD_CMD_READ:
      return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF;
    case NBD_CMD_WRITE_ZEROES:
      return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
    case NBD_CMD_BLOCK_STATUS:
      return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE;
    default:
      return NBD_CMD_FLAG_FUA;
    }
}

static bool
changes_data (uint16_t type)
{
  return type == NBD_CMD_WRITE || type == NBD_CMD_TRIM
         || type == NBD_CMD_WRITE_ZEROES;
}

/* 0, or the error that the specification names. */
static uint32_t
judge (const struct lhb_connection *connection, const struct lhb_call *call)
{
  uint64_t size = atomic_load (&connection->volume->size_bytes);
  bool beyond = call->offset_bytes > size
                || call->length_bytes > size - call->offset_bytes;

  if (call->type > NBD_CMD_BLOCK_STATUS
      || call->flags & ~legal_flags (call->type))
    return NBD_EINVAL;
  if (call->flags & NBD_CMD_FLAG_DF
      && !(connection->flags & LHB_NBD_STRUCTURED))
    return NBD_EINVAL;
  if (call->type == NBD_CMD_FLUSH)
    return call->offset_bytes || call->length_bytes ? NBD_EINVAL : 0;
  if (call->length_bytes == 0)
    return NBD_EINVAL;
  if (changes_data (call->type) && connection->flags & LHB_NBD_READ_ONLY)
    return NBD_EPERM;
  if (beyond)
    return call->type == NBD_CMD_WRITE || call->type == NBD_CMD_WRITE_ZEROES
               ? NBD_ENOSPC
               : NBD_EINVAL;
  if (call->type <= NBD_CMD_WRITE && call->length_bytes > LHB_PAYLOAD_BYTES_MAX)
    return NBD_EINVAL;
  if (call->type == NBD_CMD_BLOCK_STATUS
      && !(connection->flags & LHB_NBD_BASE_ALLOCATION))
    return NBD_EINVAL;
  return 0;
}

static uint32_t
slab_blocks (const struct lhb_call *call)
{
  switch (call->type)
    {
    case NBD_CMD_READ:
    case NBD_CMD_WRITE:
      return lhb_request_span_blocks (call->offset_bytes, call->length_bytes);
    case NBD_CMD_BLOCK_STATUS:
      return (4 + 8 * LHB_NBD_EXTENTS_MAX + LHB_BLOCK_BYTES - 1)
             / LHB_BLOCK_BYTES;
    default:
      return 0;
    }
}

static enum lhb_verdict
parse (const struct lhb_connection *connection, const uint8_t *header,
       struct lhb_call *call)
{
  if (lhb_get_be32 (header) != NBD_REQUEST_MAGIC)
    return LHB_CALL_BAD_MAGIC;
  call->flags = lhb_get_be16 (header + 4);
  call->type = lhb_get_be16 (header + 6);
  call->cookie = lhb_get_be64 (header + 8);
  call->offset_bytes = lhb_get_be64 (header + 16);
  call->length_bytes = lhb_get_be32 (header + 24);
  if (call->type == NBD_CMD_DISC)
    return LHB_CALL_END;
  call->refusal = judge (connection, call);
  if (call->type == NBD_CMD_WRITE)
    {
      call->payload_bytes = call->length_bytes;
      call->payload_at = (uint32_t) (call->offset_bytes % LHB_BLOCK_BYTES);
    }
  if (changes_data (call->type))
    call->needs_edges
        = lhb_request_is_partial (call->offset_bytes, call->length_bytes);
  if (call->refusal == 0)
    call->slab_blocks = slab_blocks (call);
  return LHB_CALL_OK;
}

/* ---- Block status. */

int
lhb_volume_block_status (lhb_volume *volume, uint64_t offset_bytes,
                         uint64_t length_bytes, uint32_t *pairs_out,
                         uint32_t max)
{
  uint64_t end = offset_bytes + length_bytes;
  uint64_t block = offset_bytes >> LHB_BLOCK_SHIFT;
  uint64_t last = (end + LHB_BLOCK_BYTES - 1) >> LHB_BLOCK_SHIFT;
  uint64_t at = offset_bytes;
  struct lhb_map *map = NULL;
  uint32_t count = 0;

  for (uint32_t i = 0; i < volume->store_count && map == NULL; i++)
    if (atomic_load (&volume->states[i]) == LHB_STATE_RW)
      map = volume->stores[i]->map;
  for (uint32_t runs = 0; block < last && runs < STATUS_RUNS_MAX; runs++)
    {
      uint64_t left = last - block;
      uint32_t most = left > UINT32_MAX ? UINT32_MAX : (uint32_t) left;
      /* Of what only peers have nothing is known: it counts as data. */
      struct lhb_run run
          = map != NULL ? lhb_map_lookup (map, block, most)
                        : (struct lhb_run) { most, LHB_MAP_HEAD };
      uint32_t state
          = run.layer == LHB_MAP_ZERO ? NBD_STATE_HOLE | NBD_STATE_ZERO : 0;
      uint64_t run_end = (block + run.blocks) << LHB_BLOCK_SHIFT;
      uint64_t bytes = (run_end < end ? run_end : end) - at;

      if (count > 0 && pairs_out[2 * count - 1] == state
          && bytes + pairs_out[2 * count - 2] <= UINT32_MAX)
        pairs_out[2 * count - 2] += (uint32_t) bytes;
      else if (count == max)
        break;
      else
        {
          if (bytes > UINT32_MAX)       /* the rest: asked again */
            bytes = UINT32_MAX & ~(uint64_t) (LHB_BLOCK_BYTES - 1);
          pairs_out[2 * count] = (uint32_t) bytes;
          pairs_out[2 * count + 1] = state;
          count++;
        }
      at += bytes;
      block += run.blocks;
      if (at != (block << LHB_BLOCK_SHIFT) && at != end)
        break;
    }
  return (int) count;
}

static void
probe_status (struct lhb_request *request)
{
  struct lhb_slot *slot
      = lhb_container_of (request, struct lhb_slot, request);
  uint32_t *words = (uint32_t *) (void *) slot->slab;
  uint32_t max = slot->call.flags & NBD_CMD_FLAG_REQ_ONE
                     ? 1
                     : LHB_NBD_EXTENTS_MAX;
  int count = lhb_volume_block_status (request->volume,
                                       slot->call.offset_bytes,
                                       slot->call.length_bytes, words + 1,
                                       max);

  if (count < 0)
    {
      request->error = count;
      return;
    }
  words[0] = slot->connection->base_allocation_id;
  for (uint32_t i = 0; i < 1 + 2 * (uint32_t) count; i++)
    lhb_put_be32 ((uint8_t *) &words[i], words[i]);
  slot->payload = slot->slab;
  slot->payload_bytes = 4 + 8 * (uint32_t) count;
}

static void
probe_cache (struct lhb_request *request)
{
  struct lhb_volume *volume = request->volume;
  uint64_t last = request->claim.last_block;

  for (uint32_t i = 0; i < volume->store_count; i++)
    if (atomic_load (&volume->states[i]) == LHB_STATE_RW
        && volume->stores[i]->peer == NULL)
      lhb_store_prefetch (volume->stores[i], request->first_block,
                          last - request->first_block + 1);
}

/* ---- Execution. */

static void
complete (struct lhb_request *request)
{
  struct lhb_slot *slot
      = lhb_container_of (request, struct lhb_slot, request);

  if (slot->call.type == NBD_CMD_READ && request->error == 0)
    {
      slot->payload
          = slot->slab + slot->call.offset_bytes % LHB_BLOCK_BYTES;
      slot->payload_bytes = slot->call.length_bytes;
    }
  lhb_connection_reply (slot, error_to_nbd (request->error));
}

static void
execute (struct lhb_slot *slot)
{
  static const uint32_t ops[] = {
    [NBD_CMD_READ] = LHB_OP_READ,          [NBD_CMD_WRITE] = LHB_OP_WRITE,
    [NBD_CMD_FLUSH] = LHB_OP_FLUSH,        [NBD_CMD_TRIM] = LHB_OP_TRIM,
    [NBD_CMD_CACHE] = LHB_OP_PROBE,        [NBD_CMD_WRITE_ZEROES] = LHB_OP_ZERO,
    [NBD_CMD_BLOCK_STATUS] = LHB_OP_PROBE,
  };
  struct lhb_connection *connection = slot->connection;
  const struct lhb_call *call = &slot->call;
  struct lhb_request *request = &slot->request;

  assert (call->type <= NBD_CMD_BLOCK_STATUS);
  /* Nothing to make durable in a view that nobody writes. */
  if (call->type == NBD_CMD_FLUSH && connection->flags & LHB_NBD_READ_ONLY)
    {
      lhb_connection_reply (slot, 0);
      return;
    }
  request->volume = connection->volume;
  request->queue = connection->queue;
  request->op = ops[call->type];
  request->flags = 0;
  if (changes_data (call->type) && call->flags & NBD_CMD_FLAG_FUA)
    request->flags |= LHB_IO_FUA;
  if (call->flags & NBD_CMD_FLAG_NO_HOLE)
    request->flags |= LHB_IO_NO_HOLE;
  if (call->flags & NBD_CMD_FLAG_FAST_ZERO)
    request->flags |= LHB_IO_FAST_ZERO;
  request->offset_bytes = call->offset_bytes;
  request->length_bytes = call->length_bytes;
  request->buffer = slot->slab;
  request->edges = slot->edges;
  request->probe
      = call->type == NBD_CMD_CACHE ? probe_cache : probe_status;
  request->complete = complete;
  lhb_request_start (request);
}

/* ---- Replies. */

static void
put_structured (struct lhb_slot *slot, uint16_t type, uint32_t length_bytes)
{
  lhb_put_be32 (slot->reply, NBD_STRUCTURED_REPLY_MAGIC);
  lhb_put_be16 (slot->reply + 4, NBD_REPLY_FLAG_DONE);
  lhb_put_be16 (slot->reply + 6, type);
  lhb_put_be64 (slot->reply + 8, slot->call.cookie);
  lhb_put_be32 (slot->reply + 16, length_bytes);
  slot->reply_bytes = 20;
}

static void
put_simple (struct lhb_slot *slot, uint32_t error)
{
  lhb_put_be32 (slot->reply, NBD_SIMPLE_REPLY_MAGIC);
  lhb_put_be32 (slot->reply + 4, error);
  lhb_put_be64 (slot->reply + 8, slot->call.cookie);
  slot->reply_bytes = 16;
}

static void
format_reply (struct lhb_slot *slot, uint32_t error)
{
  bool structured = (slot->connection->flags & LHB_NBD_STRUCTURED) != 0
                    && (slot->call.type == NBD_CMD_READ
                        || slot->call.type == NBD_CMD_BLOCK_STATUS);

  if (error)
    slot->payload_bytes = 0;
  if (!structured)
    put_simple (slot, error);
  else if (error)
    {
      put_structured (slot, NBD_REPLY_TYPE_ERROR, 6);
      lhb_put_be32 (slot->reply + 20, error);
      lhb_put_be16 (slot->reply + 24, 0);       /* no message */
      slot->reply_bytes = 26;
    }
  else if (slot->call.type == NBD_CMD_READ)
    {
      put_structured (slot, NBD_REPLY_TYPE_OFFSET_DATA,
                      8 + slot->payload_bytes);
      lhb_put_be64 (slot->reply + 20, slot->call.offset_bytes);
      slot->reply_bytes = 28;
    }
  else
    put_structured (slot, NBD_REPLY_TYPE_BLOCK_STATUS, slot->payload_bytes);
}

static const struct lhb_protocol nbd = {
  .header_bytes = NBD_REQUEST_BYTES,
  .parse = parse,
  .execute = execute,
  .format_reply = format_reply,
};

int
lhb_nbd_attach (lhb_volume *volume, int socket_fd, uint32_t flags,
                uint32_t base_allocation_id, uint64_t *connection_id_out)
{
  return lhb_connection_attach (volume, &nbd, socket_fd, flags,
                                base_allocation_id, connection_id_out);
}
