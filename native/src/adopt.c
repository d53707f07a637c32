/* Whose layer it is, and what that means for unwritten extents.
 *
 * A file system allocates space before it writes, and a power loss in between
 * leaves an unwritten extent, which reads as zeros.  Taken for data it would
 * hide what older layers have had there since long ago.  Other programs make
 * such extents on purpose, for zeros; we record those in discard bits.
 */

#include <errno.h>

#include "lhb_layer_io.h"
#include "lhb_store.h"

/* 1: the layer has a discard file; 0, or -errno. */
static int
is_ours (struct lhb_store *store, struct lhb_layer *layer)
{
  int err;

  pthread_mutex_lock (&store->discard_lock);
  err = lhb_discard_open (store, layer);
  pthread_mutex_unlock (&store->discard_lock);
  return err == 0 ? 1 : err == -ENOENT ? 0 : err;
}

int
lhb_layer_data_kind (struct lhb_store *store, struct lhb_layer *layer,
                     enum lhb_extent_kind *kind_out)
{
  int ours = is_ours (store, layer);

  *kind_out = ours ? LHB_EXTENTS_WRITTEN : LHB_EXTENTS_ANY;
  return ours < 0 ? ours : 0;
}

struct strays {
  struct lhb_store *store;
  struct lhb_layer *layer;
};

/* Unwritten space stays where a bit says that it is meant as zeros. */
static int64_t
punch_strays (void *context, uint64_t block, uint64_t blocks)
{
  const struct strays *strays = context;
  uint64_t end = block + blocks;
  int fd = atomic_load (&strays->layer->fd);

  while (block < end)
    {
      uint64_t first, count;
      int err = 0;
      int r = lhb_discard_next (strays->store, strays->layer, block, end,
                                &first, &count);

      if (r < 0)
        return r;
      if (r == 0)
        {
          first = end;
          count = 0;
        }
      if (first > block)
        err = lhb_layer_punch (fd, block, first - block);
      if (err)
        return err;
      block = first + count;
    }
  return 0;
}

int
lhb_layer_adopt (struct lhb_store *store, struct lhb_layer *layer)
{
  struct strays strays = { store, layer };
  int ours;
  int64_t err;

  if (layer->adopted)
    return 0;
  ours = is_ours (store, layer);
  if (ours < 0)
    return ours;
  err = ours ? lhb_layer_for_each_extent (
                   atomic_load (&layer->fd), LHB_EXTENTS_UNWRITTEN_WHOLE, 0,
                   layer->size_bytes >> LHB_BLOCK_SHIFT, punch_strays, &strays)
             : lhb_discard_create (store, layer, LHB_EXTENTS_UNWRITTEN);
  layer->adopted = err == 0;
  return (int) err;
}
