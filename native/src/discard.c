/* Discard files: one bit a block, set where a layer discarded a block that an
 * older layer may have.  Data in the layer wins over its bit, so bits are
 * never cleared while the layer lives, and a bit that was set too early does
 * no harm.  That is why the order is: bit durable first, hole punched after.
 */

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lhb_fault.h"
#include "lhb_store.h"

enum { WINDOW_BYTES = 4096 };   /* bits handled per read or write */

static int
read_window (int fd, uint64_t byte, uint8_t *window, size_t length)
{
  size_t got = 0;

  while (got < length)
    {
      ssize_t r = pread (fd, window + got, length - got, (off_t) (byte + got));

      if (r == -1 && errno == EINTR)
        continue;
      if (r == -1)
        return -errno;
      if (r == 0)
        break;
      got += (size_t) r;
    }
  memset (window + got, 0, length - got);       /* a short file is zeros */
  return 0;
}

static int
write_window (struct lhb_store *store, int fd, uint64_t byte,
              const uint8_t *window, size_t length, bool *changed_io)
{
  size_t put = 0;
  int err = lhb_fault (LHB_FAULT_STORE_DISCARD_WRITE, store->id);

  if (err)
    return err;
  while (put < length)
    {
      ssize_t r = pwrite (fd, window + put, length - put, (off_t) (byte + put));

      if (r == -1 && errno == EINTR)
        continue;
      if (r == -1)
        return -errno;
      put += (size_t) r;
      *changed_io = true;
    }
  return 0;
}

int
lhb_discard_open (struct lhb_store *store, struct lhb_layer *layer)
{
  int fd;

  if (layer->discard_fd >= 0)
    return 0;
  if (layer->discard_name[0] == '\0')
    return -ENOENT;
  fd = lhb_store_open_file (store, layer->discard_name, 0);
  if (fd < 0)
    return fd;
  layer->discard_fd = fd;
  return 0;
}

/* Set the bits first..last of a window; true if any was clear. */
static bool
set_bits (uint8_t *window, uint64_t first, uint64_t last)
{
  bool changed = false;
  uint64_t bit = first;

  while (bit <= last)
    {
      uint8_t *byte = &window[bit / 8];
      uint8_t mask;

      if (bit % 8 == 0 && last - bit >= 7)
        {
          mask = 0xff;
          bit += 8;
        }
      else
        {
          mask = (uint8_t) (1u << (bit % 8));
          bit++;
        }
      if ((*byte & mask) != mask)
        {
          *byte = (uint8_t) (*byte | mask);
          changed = true;
        }
    }
  return changed;
}

/* Set bits of a file; '*changed_io' becomes true if it was written. */
static int
set_in_file (struct lhb_store *store, int fd, uint64_t block, uint64_t blocks,
             bool *changed_io)
{
  uint8_t window[WINDOW_BYTES];
  const uint64_t window_bits = (uint64_t) WINDOW_BYTES * 8;
  uint64_t end = block + blocks;
  int err = 0;

  while (err == 0 && block < end)
    {
      uint64_t base = block / window_bits * window_bits;
      uint64_t stop = end < base + window_bits ? end : base + window_bits;
      uint64_t first_byte = (block - base) / 8;
      uint64_t last_byte = (stop - 1 - base) / 8;
      size_t length = (size_t) (last_byte - first_byte + 1);

      err = read_window (fd, base / 8 + first_byte, window + first_byte,
                         length);
      if (err == 0 && set_bits (window, block - base, stop - 1 - base))
        err = write_window (store, fd, base / 8 + first_byte,
                            window + first_byte, length, changed_io);
      block = stop;
    }
  return err;
}

struct marking {
  struct lhb_store *store;
  int fd;
};

static int64_t
mark_extent (void *context, uint64_t block, uint64_t blocks)
{
  struct marking *marking = context;
  bool changed = false;

  return set_in_file (marking->store, marking->fd, block, blocks, &changed);
}

/* Give a file without a name that of the layer's discards, durably. */
static int
publish (struct lhb_store *store, struct lhb_layer *layer, int fd)
{
  char path[32];

  (void) snprintf (path, sizeof path, "/proc/self/fd/%d", fd);
  if (fsync (fd) == -1
      || linkat (AT_FDCWD, path, store->dir_fd, layer->discard_name,
                 AT_SYMLINK_FOLLOW)
             == -1)
    return -errno;
  if (fsync (store->dir_fd) == -1)
    {
      int err = -errno;

      (void) unlinkat (store->dir_fd, layer->discard_name, 0);
      return err;
    }
  return 0;
}

/* That the file is there says that its bits are complete: it gets its name
 * when they are. */
int
lhb_discard_create (struct lhb_store *store, struct lhb_layer *layer,
                    enum lhb_extent_kind kind)
{
  struct marking marking = { .store = store };
  int64_t err;

  if (layer->discard_name[0] == '\0')
    return -EINVAL;
  marking.fd
      = openat (store->dir_fd, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0644);
  if (marking.fd == -1)
    return -errno;
  err = lhb_layer_for_each_extent (atomic_load (&layer->fd), kind, 0,
                                   layer->size_bytes >> LHB_BLOCK_SHIFT,
                                   mark_extent, &marking);
  pthread_mutex_lock (&store->discard_lock);
  if (err == 0)
    err = publish (store, layer, marking.fd);
  if (err == 0)
    layer->discard_fd = marking.fd;
  else
    close (marking.fd);
  pthread_mutex_unlock (&store->discard_lock);
  return (int) err;
}

int
lhb_discard_set (struct lhb_store *store, struct lhb_layer *layer,
                 uint64_t block, uint64_t blocks, bool *changed_io)
{
  bool changed = false;
  int err;

  pthread_mutex_lock (&store->discard_lock);
  err = lhb_discard_open (store, layer);
  if (err == 0)
    err = set_in_file (store, layer->discard_fd, block, blocks, &changed);
  if (err == 0 && changed && fdatasync (layer->discard_fd) == -1)
    err = -errno;
  *changed_io |= changed;
  pthread_mutex_unlock (&store->discard_lock);
  return err;
}

int
lhb_discard_next (struct lhb_store *store, struct lhb_layer *layer,
                  uint64_t block, uint64_t end, uint64_t *first_out,
                  uint64_t *blocks_out)
{
  uint8_t window[WINDOW_BYTES];
  const uint64_t window_bits = (uint64_t) WINDOW_BYTES * 8;
  uint64_t run_first = 0, run_blocks = 0;
  struct stat st;
  int err;

  pthread_mutex_lock (&store->discard_lock);
  err = lhb_discard_open (store, layer);
  if (err == -ENOENT)
    {
      pthread_mutex_unlock (&store->discard_lock);
      return 0;
    }
  if (err == 0 && fstat (layer->discard_fd, &st) == -1)
    err = -errno;
  if (err == 0 && (uint64_t) st.st_size * 8 < end)
    end = (uint64_t) st.st_size * 8;
  while (err == 0 && block < end)
    {
      uint64_t base = block / window_bits * window_bits;
      uint64_t stop = end < base + window_bits ? end : base + window_bits;

      err = read_window (layer->discard_fd, base / 8, window,
                         (size_t) ((stop - base + 7) / 8));
      while (err == 0 && block < stop)
        {
          uint64_t at = block - base;

          if (run_blocks == 0 && at % 8 == 0 && window[at / 8] == 0)
            {
              block += 8;
              continue;
            }
          if (window[at / 8] & (1u << (at % 8)))
            {
              if (run_blocks == 0)
                run_first = block;
              run_blocks++;
            }
          else if (run_blocks > 0)
            goto out;
          block++;
        }
    }
out:
  pthread_mutex_unlock (&store->discard_lock);
  if (err)
    return err;
  *first_out = run_first;
  *blocks_out = run_blocks;
  return run_blocks > 0;
}

int
lhb_discard_read (struct lhb_store *store, struct lhb_layer *layer,
                  uint64_t block, uint8_t *bits, size_t length)
{
  int err;

  memset (bits, 0, length);
  pthread_mutex_lock (&store->discard_lock);
  err = lhb_discard_open (store, layer);
  if (err == 0)
    err = read_window (layer->discard_fd, block / 8, bits, length);
  pthread_mutex_unlock (&store->discard_lock);
  return err == -ENOENT ? 0 : err;
}

int
lhb_discard_write (struct lhb_store *store, struct lhb_layer *layer,
                   uint64_t block, const uint8_t *bits, size_t length)
{
  uint8_t have[WINDOW_BYTES];
  bool changed = false;
  int err;

  if (length > sizeof have)
    return -EINVAL;
  pthread_mutex_lock (&store->discard_lock);
  err = lhb_discard_open (store, layer);
  if (err == 0)
    err = read_window (layer->discard_fd, block / 8, have, length);
  if (err == 0 && memcmp (have, bits, length) != 0)
    err = write_window (store, layer->discard_fd, block / 8, bits, length,
                        &changed);
  pthread_mutex_unlock (&store->discard_lock);
  return err ? err : changed;
}

/* Bytes of bits that either file has, at most 'end': the rest is zeros in
 * both. */
static int
clip_to_files (const struct lhb_layer *a, const struct lhb_layer *b,
               uint64_t *end_io)
{
  struct stat a_st = { 0 }, b_st = { 0 };
  uint64_t size;

  if ((a->discard_fd >= 0 && fstat (a->discard_fd, &a_st) == -1)
      || fstat (b->discard_fd, &b_st) == -1)
    return -errno;
  size = (uint64_t) (a_st.st_size > b_st.st_size ? a_st.st_size : b_st.st_size);
  if (size < *end_io)
    *end_io = size;
  return 0;
}

int
lhb_discard_copy (struct lhb_store *source_store, struct lhb_layer *source,
                  struct lhb_store *target_store, struct lhb_layer *target,
                  uint64_t block, uint64_t end)
{
  uint8_t want[WINDOW_BYTES], have[WINDOW_BYTES];
  uint64_t byte = block / 8, last = (end + 7) / 8;
  bool changed = false;
  int err = lhb_discard_open (source_store, source);

  if (err && err != -ENOENT)
    return err;
  err = lhb_discard_open (target_store, target);
  if (err == 0)
    err = clip_to_files (source, target, &last);
  for (; err == 0 && byte < last; byte += WINDOW_BYTES)
    {
      size_t length = (size_t) (last - byte < WINDOW_BYTES ? last - byte
                                                           : WINDOW_BYTES);

      memset (want, 0, sizeof want);
      if (source->discard_fd >= 0)
        err = read_window (source->discard_fd, byte, want, length);
      if (err == 0)
        err = read_window (target->discard_fd, byte, have, length);
      if (err == 0 && memcmp (want, have, length) != 0)
        err = write_window (target_store, target->discard_fd, byte, want,
                            length, &changed);
    }
  return err ? err : changed;
}

int
lhb_discard_sync (struct lhb_store *store, struct lhb_layer *layer)
{
  int err = lhb_discard_open (store, layer);

  if (err == 0 && fdatasync (layer->discard_fd) == -1)
    err = -errno;
  return err;
}
