/* Blocking I/O on the files of frozen layers. */

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <unistd.h>

#include "lhb_contract.h"
#include "lhb_layer_io.h"
#include "lhb_limits.h"

int64_t
lhb_layer_for_each_extent (int fd, enum lhb_extent_kind kind, uint64_t block,
                           uint64_t end, lhb_extent_visitor visit,
                           void *context)
{
  struct lhb_extent extents[LHB_EXTENTS_BATCH];
  int64_t total = 0;
  int count;

  do
    {
      count = lhb_file_extents_of (fd, kind, block << LHB_BLOCK_SHIFT,
                                   extents, LHB_EXTENTS_BATCH);
      if (count < 0)
        return count;
      for (int i = 0; i < count; i++)
        {
          uint64_t first = extents[i].offset_bytes >> LHB_BLOCK_SHIFT;
          uint64_t stop
              = first + (extents[i].length_bytes >> LHB_BLOCK_SHIFT);
          int64_t r;

          if (first < block)
            first = block;
          if (first >= end)
            return total;
          if (stop > end)
            stop = end;
          if (first >= stop)
            continue;
          r = visit (context, first, stop - first);
          if (r < 0)
            return r;
          total += r;
          block = stop;
        }
    }
  while (count == LHB_EXTENTS_BATCH && block < end);
  return total;
}

int64_t
lhb_layer_for_each_gap (int fd, enum lhb_extent_kind kind, uint64_t block,
                        uint64_t end, lhb_extent_visitor visit, void *context)
{
  struct lhb_extent extent;
  int64_t total = 0;

  while (block < end)
    {
      int count = lhb_file_extents_of (fd, kind, block << LHB_BLOCK_SHIFT,
                                       &extent, 1);
      uint64_t first = end, stop = end;

      if (count < 0)
        return count;
      if (count == 1)
        {
          first = extent.offset_bytes >> LHB_BLOCK_SHIFT;
          stop = first + (extent.length_bytes >> LHB_BLOCK_SHIFT);
        }
      if (first > end)
        first = end;
      if (first > block)
        {
          int64_t r = visit (context, block, first - block);

          if (r < 0)
            return r;
          total += r;
        }
      block = stop > first ? stop : end;
    }
  return total;
}

int
lhb_layer_transfer (int fd, char *buffer, uint64_t block, uint64_t blocks,
                    bool writes)
{
  size_t length = (size_t) blocks << LHB_BLOCK_SHIFT, done = 0;
  off_t offset = (off_t) (block << LHB_BLOCK_SHIFT);

  while (done < length)
    {
      ssize_t r = writes ? pwrite (fd, buffer + done, length - done,
                                   offset + (off_t) done)
                         : pread (fd, buffer + done, length - done,
                                  offset + (off_t) done);

      if (r == -1 && errno == EINTR)
        continue;
      if (r == -1)
        return -errno;
      if (r == 0)
        return -EIO;
      done += (size_t) r;
    }
  return 0;
}

int
lhb_layer_punch (int fd, uint64_t block, uint64_t blocks)
{
  if (blocks == 0)
    return 0;
  return fallocate (fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    (off_t) (block << LHB_BLOCK_SHIFT),
                    (off_t) (blocks << LHB_BLOCK_SHIFT))
                 == -1
             ? -errno
             : 0;
}
