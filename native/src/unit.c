/* Units: reading, writing and hashing pieces of frozen layers for a rebuild.
 *
 * A unit says of each block whether the layer has it, whether it discarded it,
 * and what it has; so a layer whose units are equal is the same layer, and not
 * only one that reads the same today.  Different units of one layer may be
 * handled by several threads at once.
 */

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lhb_fault.h"
#include "lhb_layer_io.h"
#include "lhb_store.h"
#include "lhb_unit.h"

static bool
get_bit (const uint8_t *bits, uint64_t n)
{
  return bits[n / 8] >> (n % 8) & 1;
}

int
lhb_unit_open (lhb_unit **unit_out)
{
  struct lhb_unit *unit = calloc (1, sizeof *unit);

  if (unit == NULL)
    return -ENOMEM;
  unit->data = aligned_alloc (LHB_BLOCK_BYTES, LHB_UNIT_BYTES);
  unit->scratch = aligned_alloc (LHB_BLOCK_BYTES, LHB_UNIT_BYTES);
  if (unit->data == NULL || unit->scratch == NULL)
    {
      lhb_unit_close (unit);
      return -ENOMEM;
    }
  *unit_out = unit;
  return 0;
}

void
lhb_unit_close (lhb_unit *unit)
{
  if (unit == NULL)
    return;
  free (unit->data);
  free (unit->scratch);
  free (unit);
}

/* What one call works with. */
struct span {
  int fd;
  uint64_t block, blocks;       /* the unit, cut at the end of the layer */
};

static int
find_span (struct lhb_store *store, int id, uint64_t offset_bytes,
           struct lhb_layer **layer_out, struct span *span)
{
  struct lhb_layer *layer = lhb_store_layer (store, id);
  uint64_t end;

  if (layer == NULL || id == store->head || offset_bytes % LHB_UNIT_BYTES != 0
      || offset_bytes >= layer->size_bytes)
    return -EINVAL;
  end = offset_bytes + LHB_UNIT_BYTES;
  if (end > layer->size_bytes)
    end = layer->size_bytes;
  span->fd = atomic_load (&layer->fd);
  span->block = offset_bytes >> LHB_BLOCK_SHIFT;
  span->blocks = (end - offset_bytes) >> LHB_BLOCK_SHIFT;
  *layer_out = layer;
  return 0;
}

/* All extents of a unit in one answer: every other block at most begins one. */
static int
find_extents (const struct span *span, enum lhb_extent_kind kind,
              uint8_t *bits)
{
  struct lhb_extent extents[LHB_UNIT_BLOCKS / 2];
  int count = lhb_file_extents_of (span->fd, kind,
                                   span->block << LHB_BLOCK_SHIFT, extents,
                                   LHB_UNIT_BLOCKS / 2);

  memset (bits, 0, LHB_UNIT_BLOCKS / 8);
  for (int i = 0; i < count; i++)
    {
      uint64_t first = (extents[i].offset_bytes >> LHB_BLOCK_SHIFT)
                       - span->block;
      uint64_t end = first + (extents[i].length_bytes >> LHB_BLOCK_SHIFT);

      for (uint64_t n = first; n < end && n < span->blocks; n++)
        bits[n / 8] |= (uint8_t) (1u << (n % 8));
    }
  return count < 0 ? count : 0;
}

/* One call from the first block there is to the last: holes between them are
 * zeros and cost less than more calls would. */
static int
read_data (const struct span *span, const uint8_t *bits, char *buffer)
{
  uint64_t first = 0, end = span->blocks;

  while (first < end && !get_bit (bits, first))
    first++;
  while (end > first && !get_bit (bits, end - 1))
    end--;
  if (first == end)
    return 0;
  return lhb_layer_transfer (span->fd, buffer + (first << LHB_BLOCK_SHIFT),
                             span->block + first, end - first, false);
}

int64_t
lhb_unit_read (lhb_store *store, int id, uint64_t offset_bytes,
               lhb_unit *unit)
{
  struct lhb_layer *layer;
  enum lhb_extent_kind kind;
  struct span span;
  int64_t blocks = 0;
  int err = lhb_fault (LHB_FAULT_UNIT_READ, store->id);

  if (err == 0)
    err = find_span (store, id, offset_bytes, &layer, &span);
  if (err == 0)
    err = lhb_layer_data_kind (store, layer, &kind);
  if (err == 0)
    err = find_extents (&span, kind, unit->has);
  if (err == 0)
    err = lhb_discard_read (store, layer, span.block, unit->discarded,
                            sizeof unit->discarded);
  if (err == 0)
    err = read_data (&span, unit->has, unit->data);
  if (err)
    return err;
  for (uint64_t n = 0; n < span.blocks; n++)
    blocks += get_bit (unit->has, n);
  return blocks << LHB_BLOCK_SHIFT;
}

enum change { KEEP, WRITE, PUNCH };

static enum change
change_of (const struct lhb_unit *unit, const uint8_t *any,
           const uint8_t *written, uint64_t n)
{
  size_t at = (size_t) n << LHB_BLOCK_SHIFT;

  if (!get_bit (unit->has, n))
    return get_bit (any, n) ? PUNCH : KEEP;
  return get_bit (written, n)
                 && memcmp (unit->data + at, unit->scratch + at,
                            LHB_BLOCK_BYTES)
                        == 0
             ? KEEP
             : WRITE;
}

/* Runs of blocks that need the same. */
static int64_t
change_runs (const struct lhb_unit *unit, const struct span *span,
             const uint8_t *any, const uint8_t *written)
{
  int64_t changed = 0;
  uint64_t count;

  for (uint64_t n = 0; n < span->blocks; n += count)
    {
      enum change change = change_of (unit, any, written, n);
      int err = 0;

      for (count = 1; n + count < span->blocks
                      && change_of (unit, any, written, n + count) == change;)
        count++;
      if (change == WRITE)
        err = lhb_layer_transfer (span->fd,
                                  unit->data + (n << LHB_BLOCK_SHIFT),
                                  span->block + n, count, true);
      else if (change == PUNCH)
        err = lhb_layer_punch (span->fd, span->block + n, count);
      if (err)
        return err;
      if (change != KEEP)
        changed += (int64_t) (count << LHB_BLOCK_SHIFT);
    }
  return changed;
}

int64_t
lhb_unit_write (lhb_store *store, int id, uint64_t offset_bytes,
                lhb_unit *unit, int empty)
{
  uint8_t any[LHB_UNIT_BLOCKS / 8] = { 0 };
  uint8_t written[LHB_UNIT_BLOCKS / 8] = { 0 };
  struct lhb_layer *layer;
  struct span span;
  int64_t changed;
  int err = lhb_fault (LHB_FAULT_UNIT_WRITE, store->id);

  if (err == 0)
    err = find_span (store, id, offset_bytes, &layer, &span);
  if (err == 0 && !empty)
    err = find_extents (&span, LHB_EXTENTS_ANY, any);
  if (err == 0 && !empty)
    err = find_extents (&span, LHB_EXTENTS_WRITTEN, written);
  if (err == 0)
    err = read_data (&span, written, unit->scratch);
  if (err)
    return err;
  changed = change_runs (unit, &span, any, written);
  if (changed < 0)
    return changed;
  err = lhb_discard_write (store, layer, span.block, unit->discarded,
                           sizeof unit->discarded);
  if (err < 0)
    return err;
  /* The disk begins now, so that the sync at the end finds little to do and
   * the flushes of clients are not behind it. */
  if (changed > 0 && !lhb_store_is_direct (store))
    (void) sync_file_range (span.fd, (off_t) offset_bytes, LHB_UNIT_BYTES,
                            SYNC_FILE_RANGE_WRITE);
  return changed + err;
}

enum { LANES = 4 };

static uint64_t
stir (uint64_t lane, uint64_t word)
{
  lane = (lane ^ word) * 0x9e3779b97f4a7c15ull;
  return lane << 29 | lane >> 35;
}

/* Whole blocks.  Each word goes into one of four lanes that do not wait for
 * each other, for a CRC of 64 bits would take as long as the copy.  Every step
 * can be undone, so one changed word always changes the result. */
static uint64_t
hash_blocks (uint64_t seed, const char *data, size_t length)
{
  uint64_t lanes[LANES], words[LANES];

  for (unsigned i = 0; i < LANES; i++)
    lanes[i] = seed + i;
  for (size_t at = 0; at < length; at += sizeof words)
    {
      memcpy (words, data + at, sizeof words);
      for (unsigned i = 0; i < LANES; i++)
        lanes[i] = stir (lanes[i], le64toh (words[i]));
    }
  for (unsigned i = 1; i < LANES; i++)
    lanes[0] = stir (lanes[0], lanes[i]);
  return lanes[0];
}

uint64_t
lhb_unit_hash (const lhb_unit *unit, int shape_only)
{
  uint64_t hash = lhb_crc64 (0, unit->has, sizeof unit->has);
  uint64_t count;

  hash = lhb_crc64 (hash, unit->discarded, sizeof unit->discarded);
  for (uint64_t n = 0; n < LHB_UNIT_BLOCKS && !shape_only; n += count)
    {
      for (count = 1; n + count < LHB_UNIT_BLOCKS
                      && get_bit (unit->has, n + count)
                             == get_bit (unit->has, n);)
        count++;
      if (get_bit (unit->has, n))
        hash = hash_blocks (hash, unit->data + (n << LHB_BLOCK_SHIFT),
                            (size_t) count << LHB_BLOCK_SHIFT);
    }
  return hash;
}

uint8_t *
lhb_unit_maps (lhb_unit *unit)
{
  return (uint8_t *) unit + offsetof (struct lhb_unit, has);
}

char *
lhb_unit_data (lhb_unit *unit)
{
  return unit->data;
}

int
lhb_unit_begin (lhb_store *store, int id, uint64_t size_bytes)
{
  struct lhb_layer *layer = lhb_store_layer (store, id);
  int err;

  if (layer == NULL || id == store->head || size_bytes % LHB_BLOCK_BYTES != 0)
    return -EINVAL;
  err = lhb_layer_adopt (store, layer);
  if (err)
    return err;
  if (layer->size_bytes != size_bytes
      && ftruncate (atomic_load (&layer->fd), (off_t) size_bytes) == -1)
    return -errno;
  layer->size_bytes = size_bytes;
  return 0;
}

/* Not lhb_store_sync: a client's flush would wait for it.  With the times,
 * which tell a later rebuild that nobody wrote since. */
int
lhb_unit_sync (lhb_store *store, int id)
{
  struct lhb_layer *layer = lhb_store_layer (store, id);
  int err = lhb_fault (LHB_FAULT_UNIT_SYNC, store->id);

  if (layer == NULL)
    return -EINVAL;
  if (err == 0 && fsync (atomic_load (&layer->fd)) == -1)
    err = -errno;
  if (err == 0 && layer->discard_fd >= 0
      && fdatasync (layer->discard_fd) == -1)
    err = -errno;
  return err;
}
