/* Store: reading, writing and zeroing blocks of the chain. */

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "lhb_fault.h"
#include "lhb_store.h"
#include "lhb_util.h"

/* Read one run completely.  A layer that ends inside a run it claims to have
 * was cut behind our back: that is an error, not zeros. */
static int
read_run (int fd, void *buffer, size_t length, uint64_t offset, int rw_flags)
{
  size_t got = 0;

  while (got < length)
    {
      struct iovec iov = { (char *) buffer + got, length - got };
      ssize_t r = preadv2 (fd, &iov, 1, (off_t) (offset + got), rw_flags);

      if (r == -1 && errno == EINTR)
        continue;
      if (r == -1)
        return errno == EOPNOTSUPP ? -EAGAIN : -errno;
      if (r == 0)
        return -EIO;
      got += (size_t) r;
    }
  return 0;
}

static int
read_blocks (struct lhb_store *store, uint64_t block, uint32_t blocks,
             char *buffer, int rw_flags)
{
  int err = lhb_fault (LHB_FAULT_STORE_READ, store->id);

  while (err == 0 && blocks > 0)
    {
      struct lhb_run run = lhb_map_lookup (store->map, block, blocks);
      size_t length = (size_t) run.blocks << LHB_BLOCK_SHIFT;

      assert (run.blocks > 0 && run.blocks <= blocks);
      if (run.layer == LHB_MAP_ZERO)
        memset (buffer, 0, length);
      else
        err = read_run (lhb_store_run_fd (store, run.layer), buffer, length,
                        block << LHB_BLOCK_SHIFT, rw_flags);
      buffer += length;
      block += run.blocks;
      blocks -= run.blocks;
    }
  return err;
}

int
lhb_store_try_read (struct lhb_store *store, uint64_t block, uint32_t blocks,
                    void *buffer)
{
  if (lhb_store_is_direct (store))
    {
      struct lhb_run run = lhb_map_lookup (store->map, block, blocks);

      if (run.layer != LHB_MAP_ZERO || run.blocks < blocks)
        return -EAGAIN;         /* the device is never "in the cache" */
    }
  return read_blocks (store, block, blocks, buffer, RWF_NOWAIT);
}

int
lhb_store_read (struct lhb_store *store, uint64_t block, uint32_t blocks,
                void *buffer)
{
  return read_blocks (store, block, blocks, buffer, 0);
}

uint32_t
lhb_store_write (struct lhb_store *store, uint64_t block, uint32_t blocks,
                 const void *buffer, int rw_flags, int *error_out)
{
  size_t length = (size_t) blocks << LHB_BLOCK_SHIFT;
  uint64_t offset = block << LHB_BLOCK_SHIFT;
  int fd = atomic_load_explicit (&store->layers[store->head].fd,
                                 memory_order_relaxed);
  bool direct = lhb_store_is_direct (store);
  size_t put = 0;
  int cut_error = 0;
  int err = lhb_fault (LHB_FAULT_STORE_WRITE, store->id);

  if (err == 0 && blocks > 1)
    cut_error = lhb_fault (LHB_FAULT_STORE_SHORT_WRITE, store->id);
  if (cut_error)
    length = LHB_BLOCK_BYTES;
  while (err == 0 && put < length)
    {
      size_t rest = length - put;
      struct iovec iov = { (char *) (uintptr_t) buffer + put,
                           direct || rest < LHB_FOLIO_BYTES_MAX
                               ? rest
                               : LHB_FOLIO_BYTES_MAX };
      ssize_t r = pwritev2 (fd, &iov, 1, (off_t) (offset + put), rw_flags);

      if (r == -1 && errno == EINTR)
        continue;
      if (r <= 0)
        {
          err = r == 0 ? -EIO : -errno;
          break;
        }
      put += (size_t) r;
    }
  *error_out = err ? err : cut_error;
  return (uint32_t) put;
}

void
lhb_store_wrote (struct lhb_store *store, uint64_t block,
                 uint64_t written_bytes)
{
  struct lhb_layer *head = &store->layers[store->head];

  /* A block that was only partly written is not complete in the head: it
   * stays what it was, and the request it belongs to has failed. */
  if (written_bytes >= LHB_BLOCK_BYTES)
    lhb_map_set_head (store->map, block, written_bytes >> LHB_BLOCK_SHIFT);
  if (!atomic_load_explicit (&head->dirty, memory_order_relaxed))
    atomic_store_explicit (&head->dirty, true, memory_order_relaxed);
}

/* Zero a part of one block by rewriting it. */
static int
zero_part (struct lhb_store *store, uint64_t offset, uint64_t length)
{
  uint64_t block = offset >> LHB_BLOCK_SHIFT;
  char *buffer;
  int err;

  assert ((offset + length - 1) >> LHB_BLOCK_SHIFT == block);
  buffer = aligned_alloc (LHB_BLOCK_BYTES, LHB_BLOCK_BYTES);
  if (buffer == NULL)
    return -ENOMEM;
  err = lhb_map_reserve_head (store->map, block, 1);
  if (err == 0)
    err = lhb_store_read (store, block, 1, buffer);
  if (err == 0)
    {
      memset (buffer + offset % LHB_BLOCK_BYTES, 0, (size_t) length);
      lhb_store_wrote (store, block,
                       lhb_store_write (store, block, 1, buffer, 0, &err));
    }
  free (buffer);
  return err;
}

/* Write zeros where the file system can not make them by itself. */
static int
write_zero_blocks (struct lhb_store *store, uint64_t block, uint64_t blocks)
{
  const uint64_t batch = 256;
  char *zeros = aligned_alloc (LHB_BLOCK_BYTES, batch << LHB_BLOCK_SHIFT);
  int err = zeros == NULL ? -ENOMEM : 0;

  if (zeros != NULL)
    memset (zeros, 0, batch << LHB_BLOCK_SHIFT);
  while (err == 0 && blocks > 0)
    {
      uint32_t count = (uint32_t) (blocks < batch ? blocks : batch);

      lhb_store_write (store, block, count, zeros, 0, &err);
      block += count;
      blocks -= count;
    }
  free (zeros);
  return err;
}

/* One fallocate of the head. */
static int
change_space (struct lhb_store *store, int mode, uint64_t block,
              uint64_t blocks)
{
  struct lhb_layer *head = &store->layers[store->head];
  int err;

  err = lhb_fault (LHB_FAULT_STORE_PUNCH, store->id);
  if (err == 0
      && fallocate (atomic_load (&head->fd), mode | FALLOC_FL_KEEP_SIZE,
                    (off_t) (block << LHB_BLOCK_SHIFT),
                    (off_t) (blocks << LHB_BLOCK_SHIFT))
             == -1)
    err = -errno;
  /* Afterwards, for an fdatasync that ran meanwhile did not cover it. */
  atomic_store (&head->dirty, true);
  return err;
}

/* Whether the file system makes zeros by itself, tried behind the end of the
 * head: discard bits are set before zeros are made, and not for nothing. */
static int
try_zero_range (struct lhb_store *store)
{
  uint64_t end = store->size_bytes >> LHB_BLOCK_SHIFT;
  int err;

  if (store->makes_zeros)
    return 0;
  err = change_space (store, FALLOC_FL_ZERO_RANGE, end, 1);
  if (err == 0)
    {
      err = change_space (store, FALLOC_FL_PUNCH_HOLE, end, 1);
      store->makes_zeros = err == 0;
    }
  return err;
}

/* Space that is zeros although it is not written.  The bits say so after a
 * restart, and come first as those of a TRIM do. */
static int
make_zeros (struct lhb_store *store, uint64_t block, uint64_t blocks)
{
  int err = try_zero_range (store);

  if (err == 0)
    err = lhb_discard_set (store, &store->layers[store->head], block, blocks);
  if (err == 0)
    err = change_space (store, FALLOC_FL_ZERO_RANGE, block, blocks);
  return err;
}

static int
allocate_zeros (struct lhb_store *store, uint64_t block, uint64_t blocks,
                uint32_t io_flags)
{
  int err = lhb_map_reserve_head (store->map, block, blocks);

  if (err)
    return err;
  err = make_zeros (store, block, blocks);
  if (err == -EOPNOTSUPP && (io_flags & LHB_IO_FAST_ZERO) == 0)
    err = write_zero_blocks (store, block, blocks);
  if (err == 0)
    lhb_store_wrote (store, block, blocks << LHB_BLOCK_SHIFT);
  return err;
}

/* TRIM of whole blocks.  The bits are durable before the hole is made, so no
 * crash can show what an older layer has there. */
static int
trim_blocks (struct lhb_store *store, uint64_t block, uint64_t blocks)
{
  int err = 0;

  if (lhb_map_any_lower (store->map, block, blocks))
    err = lhb_discard_set (store, &store->layers[store->head], block, blocks);
  else if (!lhb_map_any_head (store->map, block, blocks))
    return 0;                   /* nothing is here: mkfs discards everything */
  if (err == 0)
    err = change_space (store, FALLOC_FL_PUNCH_HOLE, block, blocks);
  if (err == 0)
    err = lhb_map_discard (store->map, block, blocks);
  return err;
}

/* WRITE_ZEROES of whole blocks.  Other readers of the format know no discard
 * bits, so where a lower layer has data the zeros must be data, too. */
static int
zero_blocks (struct lhb_store *store, uint64_t block, uint64_t blocks,
             uint32_t io_flags)
{
  bool no_hole = (io_flags & LHB_IO_NO_HOLE) != 0;
  int err = -EOPNOTSUPP;

  if (!no_hole && !lhb_map_any_lower (store->map, block, blocks))
    err = trim_blocks (store, block, blocks);
  /* Without holes, space is the next best. */
  if (err == -EOPNOTSUPP)
    err = allocate_zeros (store, block, blocks, io_flags);
  return err;
}

int
lhb_store_zero (struct lhb_store *store, uint64_t offset_bytes,
                uint64_t length_bytes, bool trim, uint32_t io_flags)
{
  /* Small steps where zeros may have to be allocated, so that a sparse range
   * below does not make the whole range dense. */
  const uint64_t step_blocks
      = (trim || io_flags & LHB_IO_NO_HOLE ? LHB_ZERO_STEP_BYTES : 1u << 20)
        >> LHB_BLOCK_SHIFT;
  uint64_t end = offset_bytes + length_bytes;
  uint64_t first = (offset_bytes + LHB_BLOCK_BYTES - 1) >> LHB_BLOCK_SHIFT;
  uint64_t last = end >> LHB_BLOCK_SHIFT;       /* exclusive */
  int err = 0;

  if (first > last)             /* inside one block */
    return zero_part (store, offset_bytes, length_bytes);
  /* The edges last: what can not be fast is refused before it began. */
  for (uint64_t block = first, count; err == 0 && block < last;
       block += count)
    {
      count = last - block < step_blocks ? last - block : step_blocks;
      err = trim ? trim_blocks (store, block, count)
                 : zero_blocks (store, block, count, io_flags);
    }
  if (err == 0 && offset_bytes < first << LHB_BLOCK_SHIFT)
    err = zero_part (store, offset_bytes,
                     (first << LHB_BLOCK_SHIFT) - offset_bytes);
  if (err == 0 && end > last << LHB_BLOCK_SHIFT)
    err = zero_part (store, last << LHB_BLOCK_SHIFT,
                     end - (last << LHB_BLOCK_SHIFT));
  return err;
}

void
lhb_store_prefetch (struct lhb_store *store, uint64_t block, uint64_t blocks)
{
  while (blocks > 0)
    {
      uint32_t most = blocks > UINT32_MAX ? UINT32_MAX : (uint32_t) blocks;
      struct lhb_run run = lhb_map_lookup (store->map, block, most);

      if (run.layer != LHB_MAP_ZERO)
        (void) posix_fadvise (lhb_store_run_fd (store, run.layer),
                              (off_t) (block << LHB_BLOCK_SHIFT),
                              (off_t) run.blocks << LHB_BLOCK_SHIFT,
                              POSIX_FADV_WILLNEED);
      block += run.blocks;
      blocks -= run.blocks;
    }
}
