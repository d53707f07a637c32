/* What the tests of stores and volumes share: replica directories with plain
 * names in them, engines, and the events they post.
 *
 * A directory needs a file system with FIEMAP, so $TMPDIR, /tmp and the place
 * of the program are tried in this order.
 */
#ifndef LHB_REPLICA_H
#define LHB_REPLICA_H

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/eventfd.h>
#include <sys/stat.h>

#include "lhb_engine.h"
#include "lhb_fault.h"
#include "lhb_store.h"
#include "lhb_test.h"
#include "lhb_volume.h"

#define BLOCK LHB_BLOCK_BYTES

struct replica {
  char path[PATH_MAX];
  int fd;
};

/* ---- Directories. */

static inline bool
replica_try (struct replica *replica, const char *parent)
{
  int fd;
  bool good;

  if (parent == NULL
      || snprintf (replica->path, PATH_MAX, "%s/lhb-XXXXXX", parent)
             >= PATH_MAX
      || mkdtemp (replica->path) == NULL)
    return false;
  replica->fd = open (replica->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  CHECK (replica->fd >= 0);
  fd = openat (replica->fd, "probe", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  CHECK (fd >= 0);
  good = lhb_probe_fiemap (fd) == 0;
  close (fd);
  CHECK_EQUAL (unlinkat (replica->fd, "probe", 0), 0);
  if (!good)
    {
      close (replica->fd);
      CHECK_EQUAL (rmdir (replica->path), 0);
    }
  return good;
}

static inline void
replica_make (struct replica *replica)
{
  char program[PATH_MAX];
  ssize_t length = readlink ("/proc/self/exe", program, sizeof program - 1);

  CHECK (length > 0);
  program[length] = '\0';
  *strrchr (program, '/') = '\0';
  CHECK (replica_try (replica, getenv ("TMPDIR"))
         || replica_try (replica, "/tmp") || replica_try (replica, program));
}

static inline int
replica_remove_entry (const char *path, const struct stat *st, int type,
                      struct FTW *ftw)
{
  (void) st;
  (void) type;
  (void) ftw;
  return remove (path);
}

static inline void
replica_remove (struct replica *replica)
{
  close (replica->fd);
  CHECK_EQUAL (nftw (replica->path, replica_remove_entry, 8,
                     FTW_DEPTH | FTW_PHYS),
               0);
}

/* An image without data. */
static inline void
replica_image (const struct replica *replica, const char *name,
               uint64_t size_bytes)
{
  int fd = openat (replica->fd, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC,
                   0600);

  CHECK (fd >= 0);
  CHECK_EQUAL (ftruncate (fd, (off_t) size_bytes), 0);
  close (fd);
}

static inline int
replica_open_image (const struct replica *replica, const char *name)
{
  int fd = openat (replica->fd, name, O_RDWR | O_CLOEXEC);

  CHECK (fd >= 0);
  return fd;
}

/* Blocks of one byte, past the store's back. */
static inline void
replica_fill (const struct replica *replica, const char *name, uint64_t block,
              uint64_t blocks, int byte)
{
  int fd = replica_open_image (replica, name);
  char data[BLOCK];

  memset (data, byte, sizeof data);
  for (uint64_t i = 0; i < blocks; i++)
    CHECK_EQUAL (pwrite (fd, data, BLOCK, (off_t) ((block + i) * BLOCK)),
                 BLOCK);
  close (fd);
}

static inline void
replica_discard_name (const char *image, char *name_out)
{
  CHECK (snprintf (name_out, LHB_NAME_BYTES_MAX, "discard.%s", image)
         < LHB_NAME_BYTES_MAX);
}

/* ---- Engines. */

static inline lhb_engine *
engine_make (uint32_t driver, uint32_t queues)
{
  struct lhb_engine_options options
      = { .queues = queues, .workers_max = 4, .driver = driver };
  lhb_engine *engine;

  CHECK_EQUAL (lhb_engine_open (&options, &engine), 0);
  return engine;
}

/* The pool, and io_uring where there is one: the number of drivers. */
static inline int
engine_drivers (uint32_t *drivers_out)
{
  drivers_out[0] = LHB_DRIVER_POOL;
  drivers_out[1] = LHB_DRIVER_URING;
  return lhb_probe_uring () == 0 ? 2 : 1;
}

static inline struct lhb_event
engine_wait_event (lhb_engine *engine)
{
  struct pollfd ready
      = { .fd = lhb_engine_event_fd (engine), .events = POLLIN };
  struct lhb_event event;
  eventfd_t count;

  while (lhb_engine_next_event (engine, &event) == 0)
    {
      CHECK (poll (&ready, 1, -1) == 1 || errno == EINTR);
      (void) eventfd_read (ready.fd, &count);
    }
  return event;
}

/* ---- Stores.  'images' is oldest first and ends with NULL. */

static inline lhb_store *
store_open (lhb_engine *engine, const struct replica *replica,
            uint64_t size_bytes, uint32_t flags, const char *const *images)
{
  char discard[LHB_NAME_BYTES_MAX];
  lhb_store *store;

  CHECK_EQUAL (
      lhb_store_open (engine, replica->fd, size_bytes, flags, &store), 0);
  for (int i = 0; images[i] != NULL; i++)
    {
      replica_discard_name (images[i], discard);
      CHECK (lhb_store_add_layer (store, images[i], discard) > 0);
    }
  CHECK_EQUAL (lhb_store_start (store), 0);
  return store;
}

static inline char *
blocks_alloc (uint64_t blocks)
{
  char *memory = aligned_alloc (BLOCK, blocks * BLOCK);

  CHECK (memory != NULL);
  memset (memory, 0, blocks * BLOCK);
  return memory;
}

/* The store shows exactly 'want'. */
static inline void
store_check (lhb_store *store, const char *want, uint64_t blocks)
{
  char *got = blocks_alloc (blocks);

  CHECK_EQUAL (lhb_store_read (store, 0, (uint32_t) blocks, got), 0);
  for (uint64_t i = 0; i < blocks; i++)
    if (memcmp (got + i * BLOCK, want + i * BLOCK, BLOCK) != 0)
      {
        fprintf (stderr, "# block %" PRIu64 ": %d.., not %d..\n", i,
                 got[i * BLOCK], want[i * BLOCK]);
        CHECK (memcmp (got + i * BLOCK, want + i * BLOCK, BLOCK) == 0);
      }
  free (got);
}

/* What a reader of the directory sees that opens these layers anew. */
static inline void
replica_check (lhb_engine *engine, const struct replica *replica,
               const char *const *images, const char *want, uint64_t blocks)
{
  lhb_store *store = store_open (engine, replica, blocks * BLOCK,
                                 LHB_STORE_READ_ONLY, images);

  store_check (store, want, blocks);
  lhb_store_close (store);
}

#endif
