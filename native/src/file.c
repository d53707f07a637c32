/* Frozen image files: where they hold data, and what their content sums to. */
#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include "lhb_crc64.h"
#include "lhb_contract.h"
#include "lhb_layer_io.h"

#define FILE_FIEMAP_BATCH 512           /* extents of one ioctl, 28 KiB */
#define FILE_CRC_EXTENTS 512            /* extents of one turn of a checksum */
#define FILE_READ_BYTES (1u << 20)

/* FIEMAP is free to answer in any granularity; blocks are ours. */
struct file_fiemap {
  struct fiemap header;
  struct fiemap_extent extents[FILE_FIEMAP_BATCH];
};

struct file_gather {
  struct lhb_extent *extents;
  uint32_t count, max;
  uint64_t start_bytes, end_bytes;      /* nothing outside is reported */
  enum lhb_extent_kind kind;            /* nothing else is reported */
  struct lhb_extent pending;            /* may still grow; empty at first */
};

static uint64_t
block_down (uint64_t offset_bytes)
{
  return offset_bytes & ~(uint64_t) (LHB_BLOCK_BYTES - 1);
}

/* No file is so long that this wraps: offsets are signed in the kernel. */
static uint64_t
block_up (uint64_t offset_bytes)
{
  return block_down (offset_bytes + LHB_BLOCK_BYTES - 1);
}

static int
file_size (int fd, uint64_t *size_out)
{
  struct stat st;

  if (fstat (fd, &st) == -1)
    return -errno;
  if (!S_ISREG (st.st_mode))
    return -EINVAL;
  *size_out = (uint64_t) st.st_size;
  return 0;
}

/* Ask for the extents of [start, end).  Delayed allocations are written out
 * first, so that what is reported is on its way to the disk.
 */
static int
file_fiemap (int fd, uint64_t start_bytes, uint64_t end_bytes,
             struct file_fiemap *map)
{
  int status;

  do
    {
      memset (&map->header, 0, sizeof map->header);
      map->header.fm_start = start_bytes;
      map->header.fm_length = end_bytes - start_bytes;
      map->header.fm_flags = FIEMAP_FLAG_SYNC;
      map->header.fm_extent_count = FILE_FIEMAP_BATCH;
      status = ioctl (fd, FS_IOC_FIEMAP, &map->header);
    }
  while (status == -1 && errno == EINTR);
  if (status == -1)
    return -errno;
  if (map->header.fm_mapped_extents > FILE_FIEMAP_BATCH)
    return -EIO;
  return 0;
}

static void
gather_flush (struct file_gather *gather)
{
  if (gather->pending.length_bytes == 0)
    return;
  assert (gather->count < gather->max);
  gather->extents[gather->count++] = gather->pending;
  gather->pending.length_bytes = 0;
}

/* Add [start, end) to the answer.  An extent leaves 'pending' when one comes
 * that does not touch it, so a run that spans two ioctls is still one extent.
 * False: the answer is full, and what came now is not in it.
 */
static bool
gather_add (struct file_gather *gather, uint64_t start_bytes,
            uint64_t end_bytes)
{
  struct lhb_extent *pending = &gather->pending;

  if (gather->kind == LHB_EXTENTS_UNWRITTEN_WHOLE)
    {
      start_bytes = block_up (start_bytes);
      end_bytes = block_down (end_bytes);
    }
  else
    {
      start_bytes = block_down (start_bytes);
      end_bytes = block_up (end_bytes);
    }
  if (start_bytes < gather->start_bytes)
    start_bytes = gather->start_bytes;
  if (end_bytes > gather->end_bytes)
    end_bytes = gather->end_bytes;
  if (start_bytes >= end_bytes)
    return true;

  if (pending->length_bytes != 0)
    {
      uint64_t pending_end = pending->offset_bytes + pending->length_bytes;

      if (start_bytes <= pending_end)
        {
          if (end_bytes > pending_end)
            pending->length_bytes = end_bytes - pending->offset_bytes;
          return true;
        }
      gather_flush (gather);
      if (gather->count == gather->max)
        return false;
    }
  *pending = (struct lhb_extent) { start_bytes, end_bytes - start_bytes };
  return true;
}

/* Data that waits in the page cache counts as written. */
static bool
gather_wants (const struct file_gather *gather, uint32_t flags)
{
  bool unwritten = (flags & FIEMAP_EXTENT_UNWRITTEN) != 0
                   && (flags & FIEMAP_EXTENT_DELALLOC) == 0;

  return gather->kind == LHB_EXTENTS_ANY
         || unwritten == (gather->kind != LHB_EXTENTS_WRITTEN);
}

/* Add one ioctl's answer.  '*position_io' moves behind its last extent.
 * Returns 1 when there is nothing more to ask for, 0 to go on.
 */
static int
gather_batch (struct file_gather *gather, const struct file_fiemap *map,
              uint64_t *position_io)
{
  uint64_t position = *position_io;

  for (uint32_t i = 0; i < map->header.fm_mapped_extents; i++)
    {
      const struct fiemap_extent *extent = &map->extents[i];
      uint64_t extent_end = extent->fe_logical + extent->fe_length;

      /* The extents must rise, or we would never come to an end. */
      if (extent->fe_length == 0 || extent_end < extent->fe_logical
          || extent_end > INT64_MAX || extent_end <= position)
        return -EIO;
      position = extent_end;
      if (gather_wants (gather, extent->fe_flags)
          && !gather_add (gather, extent->fe_logical, extent_end))
        return 1;
      if (extent->fe_flags & FIEMAP_EXTENT_LAST)
        return 1;
    }
  *position_io = position;
  return map->header.fm_mapped_extents < FILE_FIEMAP_BATCH
         || position >= gather->end_bytes;
}

/* The answer begins with the block of 'offset_bytes' and ends with the block
 * of the last byte of the file: preallocation behind it is not content.
 */
int
lhb_file_extents_of (int fd, enum lhb_extent_kind kind, uint64_t offset_bytes,
                     struct lhb_extent *extents_out, uint32_t max)
{
  struct file_gather gather
      = { .extents = extents_out, .max = max, .kind = kind };
  struct file_fiemap map;
  uint64_t size_bytes = 0, position;
  int result;

  if (max == 0 || max > INT_MAX || offset_bytes > INT64_MAX)
    return -EINVAL;
  result = file_size (fd, &size_bytes);
  if (result < 0)
    return result;
  gather.start_bytes = position = block_down (offset_bytes);
  gather.end_bytes = block_up (size_bytes);

  while (result == 0 && position < gather.end_bytes)
    {
      result = file_fiemap (fd, position, gather.end_bytes, &map);
      if (result == 0)
        result = gather_batch (&gather, &map, &position);
    }
  if (result < 0)
    return result;
  if (gather.count < max)
    gather_flush (&gather);
  return (int) gather.count;
}

int
lhb_file_extents (int fd, uint64_t offset_bytes,
                  struct lhb_extent *extents_out, uint32_t max)
{
  return lhb_file_extents_of (fd, LHB_EXTENTS_ANY, offset_bytes, extents_out,
                              max);
}

/* Read [offset, offset+length) into the running value.  Reads start and end on
 * blocks even when the range does not, for the sake of O_DIRECT.
 */
static int
crc_data (int fd, uint64_t offset_bytes, uint64_t length_bytes,
          unsigned char *buffer, uint64_t *crc_io)
{
  uint64_t end_bytes = offset_bytes + length_bytes;

  while (offset_bytes < end_bytes)
    {
      uint64_t start = block_down (offset_bytes);
      uint64_t skip = offset_bytes - start;
      uint64_t want = block_up (end_bytes) - start;
      ssize_t got;

      if (want > FILE_READ_BYTES)
        want = FILE_READ_BYTES;
      got = pread (fd, buffer, (size_t) want, (off_t) start);
      if (got == -1 && errno == EINTR)
        continue;
      if (got == -1)
        return -errno;
      /* The file was longer when we began: somebody truncates it. */
      if ((uint64_t) got <= skip)
        return -EIO;
      uint64_t useful = (uint64_t) got - skip;
      if (useful > end_bytes - offset_bytes)
        useful = end_bytes - offset_bytes;
      *crc_io = lhb_crc64 (*crc_io, buffer + skip, (size_t) useful);
      offset_bytes += useful;
    }
  return 0;
}

/* Sum [position, end), which is inside the file, skipping its holes. */
static int
crc_sparse (int fd, uint64_t position, uint64_t end_bytes,
            unsigned char *buffer, uint64_t *crc_io)
{
  struct lhb_extent extents[FILE_CRC_EXTENTS];

  while (position < end_bytes)
    {
      int count = lhb_file_extents (fd, position, extents, FILE_CRC_EXTENTS);

      /* Without FIEMAP every byte is read: slower, and the same sum. */
      if (count == -EOPNOTSUPP || count == -ENOTTY)
        return crc_data (fd, position, end_bytes - position, buffer, crc_io);
      if (count < 0)
        return count;
      for (int i = 0; i < count && position < end_bytes; i++)
        {
          uint64_t start = extents[i].offset_bytes;
          uint64_t end = start + extents[i].length_bytes;
          int result;

          if (start > end_bytes)
            start = end_bytes;
          if (end > end_bytes)
            end = end_bytes;
          if (start > position)
            {
              *crc_io = lhb_crc64_zeros (*crc_io, start - position);
              position = start;
            }
          result = crc_data (fd, position, end - position, buffer, crc_io);
          if (result < 0)
            return result;
          position = end;
        }
      if (count < FILE_CRC_EXTENTS && position < end_bytes)
        {
          *crc_io = lhb_crc64_zeros (*crc_io, end_bytes - position);
          position = end_bytes;
        }
    }
  return 0;
}

/* What lies behind the end of the file counts as zeros, as it does for a layer
 * that is shorter than its volume.  On failure '*crc_io' is unchanged.
 */
int
lhb_file_crc64 (int fd, uint64_t offset_bytes, uint64_t length_bytes,
                uint64_t *crc_io)
{
  uint64_t crc = *crc_io;
  uint64_t size_bytes = 0, end_bytes, data_end;
  void *buffer;
  int result;

  if (offset_bytes > INT64_MAX || length_bytes > INT64_MAX - offset_bytes)
    return -EINVAL;
  result = file_size (fd, &size_bytes);
  if (result < 0)
    return result;
  if (posix_memalign (&buffer, LHB_BLOCK_BYTES, FILE_READ_BYTES) != 0)
    return -ENOMEM;

  end_bytes = offset_bytes + length_bytes;
  data_end = end_bytes < size_bytes ? end_bytes : size_bytes;
  if (data_end < offset_bytes)
    data_end = offset_bytes;
  result = crc_sparse (fd, offset_bytes, data_end, buffer, &crc);
  free (buffer);
  if (result < 0)
    return result;
  *crc_io = lhb_crc64_zeros (crc, end_bytes - data_end);
  return 0;
}
