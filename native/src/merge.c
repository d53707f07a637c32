/* Merging a removed layer away.
 *
 * 'lower' is the removed layer and 'upper' its only child.  Two directions:
 *
 *   up    copy into 'upper' what it lacks.  Its content as a snapshot stays
 *         the same at every instant, so any crash leaves a valid chain.
 *   down  copy into 'lower' what 'upper' has.  Only 'upper' could show those
 *         blocks of 'lower', and it hides them, so any crash leaves a valid
 *         chain, too; at the end 'lower' takes the place of 'upper'.
 *
 * A block belongs to a layer if the layer's file has data there or its discard
 * bit is set; data wins over the bit.  Both layers are adopted first, so that
 * any extent of them is data.
 */

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lhb_fault.h"
#include "lhb_layer_io.h"
#include "lhb_util.h"
#include "lhb_volume.h"

static int64_t
copy_blocks (int from, int to, char *buffer, uint64_t block, uint64_t blocks)
{
  int64_t copied = 0;

  while (blocks > 0)
    {
      uint64_t count = blocks < LHB_SLICE_BLOCKS ? blocks : LHB_SLICE_BLOCKS;
      int err = lhb_fault (LHB_FAULT_MERGE_COPY, 0);

      if (err == 0)
        err = lhb_layer_transfer (from, buffer, block, count, false);
      if (err == 0)
        err = lhb_layer_transfer (to, buffer, block, count, true);
      if (err)
        return err;
      copied += (int64_t) (count << LHB_BLOCK_SHIFT);
      block += count;
      blocks -= count;
    }
  return copied;
}

/* What one merge call works with. */
struct merge {
  struct lhb_volume *volume;    /* NULL: nothing serves the store */
  struct lhb_store *store;
  struct lhb_layer *lower, *upper;
  int lower_id, upper_id;
  uint64_t block, end;          /* the range of this call */
  char *buffer;                 /* LHB_SLICE_BLOCKS */
};

static int
merge_begin (struct merge *merge, uint64_t offset_bytes, uint64_t length_bytes)
{
  uint64_t most;

  merge->lower = lhb_store_layer (merge->store, merge->lower_id);
  merge->upper = lhb_store_layer (merge->store, merge->upper_id);
  if (merge->lower == NULL || merge->upper == NULL
      || merge->lower_id == merge->upper_id
      || merge->lower_id == merge->store->head)
    return -EINVAL;
  if ((offset_bytes | length_bytes) % LHB_BLOCK_BYTES != 0
      || length_bytes > LHB_MERGE_STEP_BYTES)
    return -EINVAL;
  most = merge->lower->size_bytes > merge->upper->size_bytes
             ? merge->lower->size_bytes
             : merge->upper->size_bytes;
  merge->block = offset_bytes >> LHB_BLOCK_SHIFT;
  merge->end = (offset_bytes + length_bytes) >> LHB_BLOCK_SHIFT;
  if (merge->end > most >> LHB_BLOCK_SHIFT)
    merge->end = most >> LHB_BLOCK_SHIFT;
  merge->buffer = aligned_alloc (LHB_BLOCK_BYTES,
                                 LHB_SLICE_BLOCKS * LHB_BLOCK_BYTES);
  return merge->buffer == NULL ? -ENOMEM : 0;
}

static int
adopt_both (struct merge *merge)
{
  int err = lhb_layer_adopt (merge->store, merge->lower);

  return err ? err : lhb_layer_adopt (merge->store, merge->upper);
}

static void
merge_end (struct merge *merge)
{
  free (merge->buffer);
}

/* OR the discard bits of one layer into another's. */
static int
merge_discards (struct merge *merge, struct lhb_layer *from,
                struct lhb_layer *to)
{
  uint64_t block = merge->block, first, count;
  int r;

  while ((r = lhb_discard_next (merge->store, from, block, merge->end, &first,
                                &count))
         == 1)
    {
      r = lhb_discard_set (merge->store, to, first, count);
      if (r)
        return r;
      block = first + count;
    }
  return r;
}

/* ---- Up. */

/* The head lacks exactly the blocks that reads still take from 'lower'. */
static int64_t
fill_head (struct merge *merge, uint64_t block, uint64_t blocks)
{
  struct lhb_store *store = merge->store;
  int64_t copied = 0;

  while (blocks > 0)
    {
      struct lhb_run run
          = lhb_map_lookup (store->map, block, (uint32_t) blocks);

      if (run.layer == merge->lower_id)
        {
          int64_t r = copy_blocks (atomic_load (&merge->lower->fd),
                                   atomic_load (&merge->upper->fd),
                                   merge->buffer, block, run.blocks);

          if (r < 0)
            return r;
          copied += r;
        }
      block += run.blocks;
      blocks -= run.blocks;
    }
  return copied;
}

/* A frozen layer lacks what is neither in its file nor in its bits. */
static int64_t
fill_frozen (struct merge *merge, uint64_t block, uint64_t blocks)
{
  int upper_fd = atomic_load (&merge->upper->fd);
  int lower_fd = atomic_load (&merge->lower->fd);
  uint8_t has[LHB_SLICE_BLOCKS] = { 0 };
  struct lhb_extent extents[LHB_EXTENTS_BATCH];
  uint64_t at = block, first, count;
  int64_t copied = 0;
  int r;

  assert (blocks <= LHB_SLICE_BLOCKS);
  do
    {
      r = lhb_file_extents_of (upper_fd, LHB_EXTENTS_WRITTEN,
                               at << LHB_BLOCK_SHIFT, extents,
                               LHB_EXTENTS_BATCH);
      for (int i = 0; i < r; i++)
        {
          first = extents[i].offset_bytes >> LHB_BLOCK_SHIFT;
          at = first + (extents[i].length_bytes >> LHB_BLOCK_SHIFT);
          for (uint64_t b = first < block ? block : first;
               b < at && b < block + blocks; b++)
            has[b - block] = 1;
        }
    }
  while (r == LHB_EXTENTS_BATCH && at < block + blocks);
  if (r < 0)
    return r;
  at = block;
  while ((r = lhb_discard_next (merge->store, merge->upper, at,
                                block + blocks, &first, &count))
         == 1)
    {
      memset (has + (first - block), 1, (size_t) count);
      at = first + count;
    }
  if (r < 0)
    return r;
  for (uint64_t i = 0; i < blocks; i += count)
    {
      int64_t c;

      for (count = 1; i + count < blocks && has[i + count] == has[i];)
        count++;
      if (has[i])
        continue;
      c = copy_blocks (lower_fd, upper_fd, merge->buffer, block + i, count);
      if (c < 0)
        return c;
      copied += c;
    }
  return copied;
}

/* Up to LHB_SLICE_BLOCKS blocks, with their range claimed if the volume serves:
 * nobody reads 'lower' there while the map turns to 'upper'. */
static int64_t
fill_slice (struct merge *merge, uint64_t block, uint64_t blocks)
{
  struct lhb_store *store = merge->store;
  bool is_head = merge->upper_id == store->head;
  struct lhb_range_claim claim;
  int64_t copied;
  int err = 0;

  if (merge->volume != NULL)
    lhb_volume_claim (merge->volume, LHB_RANGE_WRITE, block, blocks, &claim);
  copied = is_head ? fill_head (merge, block, blocks)
                   : fill_frozen (merge, block, blocks);
  if (copied >= 0 && merge->upper->in_map)
    err = lhb_map_relabel (store->map, block, blocks,
                           (uint8_t) merge->lower_id,
                           is_head ? LHB_MAP_HEAD : (uint8_t) merge->upper_id);
  if (copied > 0)
    atomic_store (&merge->upper->dirty, true);
  if (merge->volume != NULL)
    lhb_range_release (merge->volume->ranges, &claim);
  return err ? err : copied;
}

static int64_t
fill_extent (void *context, uint64_t block, uint64_t blocks)
{
  struct merge *merge = context;
  int64_t total = 0;

  while (blocks > 0)
    {
      uint64_t count = blocks < LHB_SLICE_BLOCKS ? blocks : LHB_SLICE_BLOCKS;
      int64_t r = fill_slice (merge, block, count);

      if (r < 0)
        return r;
      total += r;
      block += count;
      blocks -= count;
    }
  return total;
}

static int
grow_to (struct lhb_layer *layer, uint64_t size_bytes)
{
  if (layer->size_bytes >= size_bytes)
    return 0;
  if (ftruncate (atomic_load (&layer->fd), (off_t) size_bytes) == -1)
    return -errno;
  layer->size_bytes = size_bytes;
  return 0;
}

int64_t
lhb_merge_up (lhb_volume *volume, lhb_store *store, int lower, int upper,
              uint64_t offset_bytes, uint64_t length_bytes)
{
  struct merge merge = { .volume = volume,
                         .store = store,
                         .lower_id = lower,
                         .upper_id = upper };
  int64_t copied;
  int err = merge_begin (&merge, offset_bytes, length_bytes);

  if (err)
    return err;
  copied = adopt_both (&merge);
  if (copied == 0)
    copied = grow_to (merge.upper, merge.lower->size_bytes);
  /* Also space that is zeros by its bit: the map may lead there. */
  if (copied == 0)
    copied = lhb_layer_for_each_extent (atomic_load (&merge.lower->fd),
                                        LHB_EXTENTS_ANY, merge.block,
                                        merge.end, fill_extent, &merge);
  /* Durable in 'upper' before it is freed in 'lower'.  The data first: where
   * 'lower' has a block that it had discarded before, its bit alone in 'upper'
   * would show zeros after a power loss. */
  if (copied >= 0)
    err = lhb_store_sync_layer (store, merge.upper);
  if (copied >= 0 && err == 0)
    err = merge_discards (&merge, merge.lower, merge.upper);
  if (copied >= 0 && err == 0 && merge.end > merge.block)
    err = lhb_layer_punch (atomic_load (&merge.lower->fd), merge.block,
                 merge.end - merge.block);
  merge_end (&merge);
  return err ? err : copied;
}

/* ---- Down. */

static int64_t
copy_down (void *context, uint64_t block, uint64_t blocks)
{
  struct merge *merge = context;

  return copy_blocks (atomic_load (&merge->upper->fd),
                      atomic_load (&merge->lower->fd), merge->buffer, block,
                      blocks);
}

/* Where 'upper' discarded a block, 'lower' must hold nothing.  Done before the
 * copy, so that data which 'upper' wrote over its own discard comes back. */
static int
punch_discarded (struct merge *merge)
{
  uint64_t block = merge->block, first, count;
  int r;

  while ((r = lhb_discard_next (merge->store, merge->upper, block, merge->end,
                                &first, &count))
         == 1)
    {
      r = lhb_discard_set (merge->store, merge->lower, first, count);
      if (r == 0)
        r = lhb_layer_punch (atomic_load (&merge->lower->fd), first, count);
      if (r)
        return r;
      block = first + count;
    }
  return r;
}

int64_t
lhb_merge_down (lhb_store *store, int lower, int upper, uint64_t offset_bytes,
                uint64_t length_bytes)
{
  struct merge merge
      = { .store = store, .lower_id = lower, .upper_id = upper };
  int64_t copied;
  int err = upper == store->head
                ? -EINVAL
                : merge_begin (&merge, offset_bytes, length_bytes);

  if (err)
    return err;
  copied = adopt_both (&merge);
  if (copied == 0)
    copied = grow_to (merge.lower, merge.upper->size_bytes);
  if (copied == 0)
    copied = punch_discarded (&merge);
  if (copied == 0)
    copied = lhb_layer_for_each_extent (atomic_load (&merge.upper->fd),
                                        LHB_EXTENTS_WRITTEN, merge.block,
                                        merge.end, copy_down, &merge);
  atomic_store (&merge.lower->dirty, true);
  merge_end (&merge);
  return copied;
}

int
lhb_merge_down_finish (lhb_store *store, int lower, int upper)
{
  struct lhb_layer *layer = lhb_store_layer (store, lower);

  if (layer == NULL || lhb_store_layer (store, upper) == NULL)
    return -EINVAL;
  return lhb_store_sync_layer (store, layer);
}

/* ---- Prune. */

enum { STEP_BLOCKS = LHB_MERGE_STEP_BYTES / LHB_BLOCK_BYTES };

struct prune {
  struct merge merge;
  bool hidden[STEP_BLOCKS];     /* by 'upper', from merge.block on */
};

/* An extent of the head may belong to a write that is under way or failed:
 * only what the map says is in the head hides what is below. */
static int64_t
mark_hidden (void *context, uint64_t block, uint64_t blocks)
{
  struct prune *prune = context;
  struct lhb_store *store = prune->merge.store;
  bool is_head = prune->merge.upper_id == store->head;
  uint64_t in_map = lhb_map_blocks (store->map);

  while (blocks > 0)
    {
      struct lhb_run run = { (uint32_t) blocks, LHB_MAP_HEAD };

      if (is_head && block >= in_map)
        return 0;
      if (is_head)
        run = lhb_map_lookup (store->map, block, (uint32_t) blocks);
      if (run.layer == LHB_MAP_HEAD)
        memset (prune->hidden + (block - prune->merge.block), true,
                run.blocks);
      block += run.blocks;
      blocks -= run.blocks;
    }
  return 0;
}

static int64_t
punch_hidden (const struct prune *prune)
{
  const uint64_t blocks = prune->merge.end - prune->merge.block;
  int fd = atomic_load (&prune->merge.lower->fd);
  struct stat before, after;
  uint64_t count;

  if (fstat (fd, &before) == -1)
    return -errno;
  for (uint64_t i = 0; i < blocks; i += count)
    {
      int err = 0;

      count = 1;
      while (i + count < blocks && prune->hidden[i + count] == prune->hidden[i])
        count++;
      if (prune->hidden[i])
        err = lhb_layer_punch (fd, prune->merge.block + i, count);
      if (err)
        return err;
    }
  if (fstat (fd, &after) == -1)
    return -errno;
  return before.st_blocks > after.st_blocks
             ? (before.st_blocks - after.st_blocks) * 512
             : 0;
}

int64_t
lhb_merge_prune (lhb_store *store, int lower, int upper, uint64_t offset_bytes,
                 uint64_t length_bytes)
{
  struct prune *prune = calloc (1, sizeof *prune);
  enum lhb_extent_kind kind;
  struct merge *merge;
  int64_t freed;

  if (prune == NULL)
    return -ENOMEM;
  merge = &prune->merge;
  merge->store = store;
  merge->lower_id = lower;
  merge->upper_id = upper;
  freed = merge_begin (merge, offset_bytes, length_bytes);
  if (freed == 0)
    {
      freed = lhb_layer_data_kind (store, merge->upper, &kind);
      if (freed == 0)
        freed = lhb_layer_for_each_extent (atomic_load (&merge->upper->fd),
                                           kind, merge->block, merge->end,
                                           mark_hidden, prune);
      /* What was found must be durable before what it hides goes.  A write
       * that just ended may not have marked the head dirty yet. */
      if (freed == 0)
        {
          atomic_store (&merge->upper->dirty, true);
          freed = lhb_store_sync_layer (store, merge->upper);
        }
      if (freed == 0 && merge->end > merge->block)
        freed = punch_hidden (prune);
      merge_end (merge);
    }
  free (prune);
  return freed;
}

/* ---- The layer table. */

/* No request that looked up the old files is left when this returns. */
static void
drain (lhb_volume *volume)
{
  if (volume == NULL)
    return;
  (void) lhb_volume_freeze (volume);
  lhb_volume_thaw (volume);
}

int
lhb_store_replace_layer (lhb_volume *volume, lhb_store *store, int lower,
                         int upper)
{
  struct lhb_layer *from = lhb_store_layer (store, lower);
  struct lhb_layer *to = lhb_store_layer (store, upper);
  int err, fd, old_fd;

  if (from == NULL || to == NULL || lower == upper || lower == store->head
      || upper == store->head)
    return -EINVAL;
  fd = fcntl (atomic_load (&from->fd), F_DUPFD_CLOEXEC, 0);
  if (fd == -1)
    return -errno;
  /* Both ids now lead to the merged file, which shows the same under both. */
  old_fd = atomic_exchange (&to->fd, fd);
  err = to->in_map
            ? lhb_map_relabel (store->map, 0, lhb_map_blocks (store->map),
                               (uint8_t) lower, (uint8_t) upper)
            : 0;
  drain (volume);
  /* Nor does an fdatasync use it. */
  pthread_mutex_lock (&store->syncing);
  close (old_fd);
  pthread_mutex_unlock (&store->syncing);
  to->size_bytes = from->size_bytes;
  if (atomic_load (&from->dirty))
    atomic_store (&to->dirty, true);
  pthread_mutex_lock (&store->discard_lock);
  if (to->discard_fd >= 0)
    close (to->discard_fd);
  to->discard_fd = from->discard_fd;
  from->discard_fd = -1;
  to->adopted = from->adopted;
  pthread_mutex_unlock (&store->discard_lock);
  if (err == 0)
    lhb_store_forget_layer (store, lower);
  return err;
}

int
lhb_store_drop_layer (lhb_volume *volume, lhb_store *store, int lower)
{
  struct lhb_layer *layer = lhb_store_layer (store, lower);

  if (layer == NULL || lower == store->head)
    return -EINVAL;
  if (layer->in_map)
    drain (volume);
  lhb_store_forget_layer (store, lower);
  return 0;
}
