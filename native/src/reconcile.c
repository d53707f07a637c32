/* Making a layer of one replica equal to the same layer of another: data,
 * holes and discards.
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lhb_layer_io.h"
#include "lhb_store.h"

struct punch_gaps {
  int source_fd, target_fd;
  enum lhb_extent_kind source_kind;
};

struct reconcile {
  struct lhb_store *source, *target;
  struct lhb_layer *from, *to;
  int source_fd, target_fd;
  char *want, *have;            /* LHB_SLICE_BLOCKS each */
  uint64_t slice_block;         /* the first block of 'want' */
  const struct lhb_extent *ranges;
  uint32_t range_count;
  struct punch_gaps gaps;
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

/* Blocks of a range that a layer has.  -EINVAL: it does not begin where a byte
 * of discard bits does, or ends in the middle of one. */
static int
blocks_of_range (const struct lhb_layer *layer, const struct lhb_extent *range,
                 uint64_t *first_out, uint64_t *end_out)
{
  const uint64_t mask = LHB_RANGE_STEP_BYTES - 1;
  uint64_t size = layer->size_bytes, first = range->offset_bytes, end;

  if (range->length_bytes > UINT64_MAX - first)
    return -EINVAL;
  end = first + range->length_bytes;
  if ((first & mask) != 0 || ((end & mask) != 0 && end < size))
    return -EINVAL;
  *first_out = (first < size ? first : size) >> LHB_BLOCK_SHIFT;
  *end_out = (end < size ? end : size) >> LHB_BLOCK_SHIFT;
  return 0;
}

/* Data, then bits. */
static int64_t
match_range (struct reconcile *r, uint64_t first, uint64_t end)
{
  int64_t changed = lhb_layer_for_each_extent (
      r->source_fd, r->gaps.source_kind, first, end, match_extent, r);
  int bits;

  if (changed < 0)
    return changed;
  bits = lhb_discard_copy (r->source, r->from, r->target, r->to, first, end);
  return bits < 0 ? bits : changed + bits;
}

static int64_t
punch_range (struct reconcile *r, uint64_t first, uint64_t end)
{
  return lhb_layer_for_each_extent (r->target_fd, LHB_EXTENTS_ANY, first, end,
                                    punch_surplus, &r->gaps);
}

static int64_t
for_each_range (struct reconcile *r,
                int64_t (*step) (struct reconcile *r, uint64_t first,
                                 uint64_t end))
{
  int64_t total = 0;

  for (uint32_t i = 0; i < r->range_count; i++)
    {
      uint64_t first, end;
      int err = blocks_of_range (r->from, &r->ranges[i], &first, &end);
      int64_t changed = err ? err : step (r, first, end);

      if (changed < 0)
        return changed;
      total += changed;
    }
  return total;
}

/* The bits are durable before anything is punched: a hole without its bit
 * would show what older layers have. */
static int64_t
reconcile_ranges (struct reconcile *r)
{
  int64_t changed, surplus;
  int err = lhb_layer_data_kind (r->source, r->from, &r->gaps.source_kind);

  if (err == 0)
    err = lhb_layer_adopt (r->target, r->to);
  if (err)
    return err;
  changed = for_each_range (r, match_range);
  if (changed < 0)
    return changed;
  err = lhb_discard_sync (r->target, r->to);
  if (err)
    return err;
  surplus = for_each_range (r, punch_range);
  return surplus < 0 ? surplus : changed + surplus;
}

int64_t
lhb_store_reconcile (lhb_store *source, int source_layer, lhb_store *target,
                     int target_layer, const struct lhb_extent *ranges,
                     uint32_t count)
{
  struct reconcile r = {
    .source = source,
    .target = target,
    .from = lhb_store_layer (source, source_layer),
    .to = lhb_store_layer (target, target_layer),
    .ranges = ranges,
    .range_count = count,
  };
  int64_t changed = -ENOMEM;

  if (r.from == NULL || r.to == NULL
      || r.from->size_bytes != r.to->size_bytes)
    return -EINVAL;
  r.gaps.source_fd = r.source_fd = atomic_load (&r.from->fd);
  r.gaps.target_fd = r.target_fd = atomic_load (&r.to->fd);
  r.want = aligned_alloc (LHB_BLOCK_BYTES, LHB_SLICE_BLOCKS * LHB_BLOCK_BYTES);
  r.have = aligned_alloc (LHB_BLOCK_BYTES, LHB_SLICE_BLOCKS * LHB_BLOCK_BYTES);
  if (r.want != NULL && r.have != NULL)
    changed = reconcile_ranges (&r);
  free (r.want);
  free (r.have);
  if (changed < 0)
    return changed;
  atomic_store (&r.to->dirty, true);
  if (changed > 0 && lhb_store_sync_layer (target, r.to) != 0)
    return -EIO;
  return changed;
}
