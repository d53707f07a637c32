/* NBD commands: what is refused, what is executed, and what is answered. */

#include <assert.h>
#include <errno.h>
#include <string.h>

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

uint32_t
lhb_nbd_check (const struct lhb_nbd_connection *connection,
               const struct lhb_nbd_header *header)
{
  uint64_t size = atomic_load (&connection->volume->size_bytes);
  bool beyond = header->offset_bytes > size
                || header->length_bytes > size - header->offset_bytes;

  if (header->type > NBD_CMD_BLOCK_STATUS
      || header->flags & ~legal_flags (header->type))
    return NBD_EINVAL;
  if (header->flags & NBD_CMD_FLAG_DF
      && !(connection->flags & LHB_NBD_STRUCTURED))
    return NBD_EINVAL;
  if (header->type == NBD_CMD_FLUSH)
    return header->offset_bytes || header->length_bytes ? NBD_EINVAL : 0;
  if (header->length_bytes == 0)
    return NBD_EINVAL;
  if (changes_data (header->type) && connection->flags & LHB_NBD_READ_ONLY)
    return NBD_EPERM;
  if (beyond)
    return header->type == NBD_CMD_WRITE
                   || header->type == NBD_CMD_WRITE_ZEROES
               ? NBD_ENOSPC
               : NBD_EINVAL;
  if (header->type <= NBD_CMD_WRITE
      && header->length_bytes > LHB_NBD_PAYLOAD_MAX)
    return NBD_EINVAL;
  if (header->type == NBD_CMD_BLOCK_STATUS
      && !(connection->flags & LHB_NBD_BASE_ALLOCATION))
    return NBD_EINVAL;
  return 0;
}

uint32_t
lhb_nbd_span_blocks (const struct lhb_nbd_header *header)
{
  uint64_t start = header->offset_bytes % LHB_BLOCK_BYTES;

  if (header->type == NBD_CMD_BLOCK_STATUS)
    return (LHB_NBD_EXTENTS_MAX * 8 + 4 + LHB_BLOCK_BYTES - 1)
           / LHB_BLOCK_BYTES;
  return (uint32_t) ((start + header->length_bytes + LHB_BLOCK_BYTES - 1)
                     / LHB_BLOCK_BYTES);
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
  if (map == NULL)
    return -EIO;
  for (uint32_t runs = 0; block < last && runs < STATUS_RUNS_MAX; runs++)
    {
      uint64_t left = last - block;
      struct lhb_run run = lhb_map_lookup (
          map, block, left > UINT32_MAX ? UINT32_MAX : (uint32_t) left);
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
  struct lhb_nbd_slot *slot
      = lhb_container_of (request, struct lhb_nbd_slot, request);
  uint32_t *words = (uint32_t *) (void *) slot->slab;
  uint32_t max = slot->header.flags & NBD_CMD_FLAG_REQ_ONE
                     ? 1
                     : LHB_NBD_EXTENTS_MAX;
  int count = lhb_volume_block_status (request->volume,
                                       slot->header.offset_bytes,
                                       slot->header.length_bytes, words + 1,
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
    if (atomic_load (&volume->states[i]) == LHB_STATE_RW)
      lhb_store_prefetch (volume->stores[i], request->first_block,
                          last - request->first_block + 1);
}

/* ---- Execution. */

static void
complete (struct lhb_request *request)
{
  struct lhb_nbd_slot *slot
      = lhb_container_of (request, struct lhb_nbd_slot, request);

  if (slot->header.type == NBD_CMD_READ && request->error == 0)
    {
      slot->payload
          = slot->slab + slot->header.offset_bytes % LHB_BLOCK_BYTES;
      slot->payload_bytes = slot->header.length_bytes;
    }
  lhb_nbd_reply (slot, error_to_nbd (request->error));
}

void
lhb_nbd_execute (struct lhb_nbd_slot *slot)
{
  static const uint32_t ops[] = {
    [NBD_CMD_READ] = LHB_OP_READ,          [NBD_CMD_WRITE] = LHB_OP_WRITE,
    [NBD_CMD_FLUSH] = LHB_OP_FLUSH,        [NBD_CMD_TRIM] = LHB_OP_TRIM,
    [NBD_CMD_CACHE] = LHB_OP_PROBE,        [NBD_CMD_WRITE_ZEROES] = LHB_OP_ZERO,
    [NBD_CMD_BLOCK_STATUS] = LHB_OP_PROBE,
  };
  struct lhb_nbd_connection *connection = slot->connection;
  const struct lhb_nbd_header *header = &slot->header;
  struct lhb_request *request = &slot->request;

  assert (header->type <= NBD_CMD_BLOCK_STATUS);
  /* Nothing to make durable in a view that nobody writes. */
  if (header->type == NBD_CMD_FLUSH && connection->flags & LHB_NBD_READ_ONLY)
    {
      lhb_nbd_reply (slot, 0);
      return;
    }
  request->volume = connection->volume;
  request->queue = connection->queue;
  request->op = ops[header->type];
  request->flags = 0;
  if (changes_data (header->type) && header->flags & NBD_CMD_FLAG_FUA)
    request->flags |= LHB_IO_FUA;
  if (header->flags & NBD_CMD_FLAG_NO_HOLE)
    request->flags |= LHB_IO_NO_HOLE;
  if (header->flags & NBD_CMD_FLAG_FAST_ZERO)
    request->flags |= LHB_IO_FAST_ZERO;
  request->offset_bytes = header->offset_bytes;
  request->length_bytes = header->length_bytes;
  request->buffer = slot->slab;
  request->edges = slot->edges;
  request->probe
      = header->type == NBD_CMD_CACHE ? probe_cache : probe_status;
  request->complete = complete;
  lhb_request_start (request);
}
