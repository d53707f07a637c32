/* Making a layer of one replica equal to the same layer of another: data,
 * holes and discards.
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lhb_layer_io.h"
#include "lhb_store.h"

struct reconcile {
  int source_fd, target_fd;
  char *want, *have;            /* LHB_SLICE_BLOCKS each */
  uint64_t slice_block;         /* the first block of 'want' */
};

static int64_t
copy_if_different (struct reconcile *r, uint64_t block, uint64_t blocks)
{
  int64_t changed = 0;
  int err = lhb_layer_transfer (r->source_fd, r->want, block, blocks, false);

  if (err == 0)
    err = lhb_layer_transfer (r->target_fd, r->have, block, blocks, false);
  for (uint64_t i = 0; err == 0 && i < blocks; i++)
    {
      size_t at = (size_t) i << LHB_BLOCK_SHIFT;

      if (memcmp (r->want + at, r->have + at, LHB_BLOCK_BYTES) == 0)
        continue;
      err = lhb_layer_transfer (r->target_fd, r->want + at, block + i, 1, true);
      changed += LHB_BLOCK_BYTES;
    }
  return err ? err : changed;
}

/* What compared equal to zeros and is not data of the target is written, for
 * it hides what older layers have. */
static int64_t
fill_gap (void *context, uint64_t block, uint64_t blocks)
{
  struct reconcile *r = context;
  char *zeros = r->want + ((block - r->slice_block) << LHB_BLOCK_SHIFT);
  int err = lhb_layer_transfer (r->target_fd, zeros, block, blocks, true);

  return err ? err : (int64_t) (blocks << LHB_BLOCK_SHIFT);
}

/* The blocks of an extent of the source: equal in the target, and extents
 * there. */
static int64_t
match_extent (void *context, uint64_t block, uint64_t blocks)
{
  struct reconcile *r = context;
  int64_t total = 0;

  while (blocks > 0)
    {
      uint64_t count = blocks < LHB_SLICE_BLOCKS ? blocks : LHB_SLICE_BLOCKS;
      int64_t changed = copy_if_different (r, block, count);
      int64_t filled = changed;

      r->slice_block = block;
      if (changed >= 0)
        filled = lhb_layer_for_each_gap (r->target_fd, LHB_EXTENTS_WRITTEN,
                                         block, block + count, fill_gap, r);
      if (filled < 0)
        return filled;
      total += changed + filled;
      block += count;
      blocks -= count;
    }
  return total;
}

struct punch_gaps {
  int source_fd, target_fd;
  enum lhb_extent_kind source_kind;
};

static int64_t
punch_gap (void *context, uint64_t block, uint64_t blocks)
{
  struct punch_gaps *gaps = context;
  int err = lhb_layer_punch (gaps->target_fd, block, blocks);

  return err ? err : (int64_t) (blocks << LHB_BLOCK_SHIFT);
}

/* The part of a target extent that the source has not, goes. */
static int64_t
punch_surplus (void *context, uint64_t block, uint64_t blocks)
{
  struct punch_gaps *gaps = context;

  return lhb_layer_for_each_gap (gaps->source_fd, gaps->source_kind, block,
                                 block + blocks, punch_gap, gaps);
}

int64_t
lhb_store_reconcile (lhb_store *source, int source_layer, lhb_store *target,
                     int target_layer)
{
  struct lhb_layer *from = lhb_store_layer (source, source_layer);
  struct lhb_layer *to = lhb_store_layer (target, target_layer);
  struct reconcile r;
  struct punch_gaps gaps;
  uint64_t blocks;
  int64_t changed, surplus = 0;
  int bits = 0, err;

  if (from == NULL || to == NULL || from->size_bytes != to->size_bytes)
    return -EINVAL;
  err = lhb_layer_data_kind (source, from, &gaps.source_kind);
  if (err == 0)
    err = lhb_layer_adopt (target, to);
  if (err)
    return err;
  blocks = from->size_bytes >> LHB_BLOCK_SHIFT;
  gaps.source_fd = r.source_fd = atomic_load (&from->fd);
  gaps.target_fd = r.target_fd = atomic_load (&to->fd);
  r.want = aligned_alloc (LHB_BLOCK_BYTES, LHB_SLICE_BLOCKS * LHB_BLOCK_BYTES);
  r.have = aligned_alloc (LHB_BLOCK_BYTES, LHB_SLICE_BLOCKS * LHB_BLOCK_BYTES);
  changed = r.want == NULL || r.have == NULL ? -ENOMEM : 0;
  if (changed == 0)
    changed = lhb_layer_for_each_extent (r.source_fd, gaps.source_kind, 0,
                                         blocks, match_extent, &r);
  if (changed >= 0)
    bits = lhb_discard_copy (source, from, target, to);
  if (changed >= 0 && bits >= 0)
    surplus = lhb_layer_for_each_extent (gaps.target_fd, LHB_EXTENTS_ANY, 0,
                                         blocks, punch_surplus, &gaps);
  free (r.want);
  free (r.have);
  if (changed < 0)
    return changed;
  if (bits < 0)
    return bits;
  if (surplus < 0)
    return surplus;
  changed = changed + surplus + bits;
  atomic_store (&to->dirty, true);
  if (changed > 0 && lhb_store_sync_layer (target, to) != 0)
    return -EIO;
  return changed;
}
