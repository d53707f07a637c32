/* Store: open, layers, the switch of the head, and syncing. */

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lhb_fault.h"
#include "lhb_peer.h"
#include "lhb_store.h"
#include "lhb_util.h"

enum { EXTENTS_BATCH = 256 };

static void run_sync (struct lhb_job *job);
static void finish_sync (struct lhb_message *message);

struct lhb_store *
lhb_store_make (struct lhb_engine *engine, uint64_t size_bytes)
{
  struct lhb_store *store = calloc (1, sizeof *store);

  if (store == NULL)
    return NULL;
  for (int id = 0; id < LHB_MAP_HEAD; id++)
    {
      atomic_init (&store->layers[id].fd, -1);
      store->layers[id].discard_fd = -1;
    }
  store->engine = engine;
  store->id = lhb_engine_new_id (engine);
  store->size_bytes = size_bytes;
  store->dir_fd = -1;
  store->activity_fd = -1;
  store->sync_job.run = run_sync;
  store->sync_job.done.handle = finish_sync;
  lhb_mutex_init (&store->discard_lock);
  lhb_mutex_init (&store->activity_lock);
  lhb_mutex_init (&store->sync_lock);
  lhb_mutex_init (&store->syncing);
  return store;
}

int
lhb_store_open (lhb_engine *engine, int dir_fd, uint64_t size_bytes,
                uint32_t flags, lhb_store **store_out)
{
  struct lhb_store *store;
  int err;

  if (size_bytes == 0 || size_bytes % LHB_BLOCK_BYTES != 0
      || size_bytes > INT64_MAX)
    return -EINVAL;
  store = lhb_store_make (engine, size_bytes);
  if (store == NULL)
    return -ENOMEM;
  store->flags = flags;
  store->dir_fd = fcntl (dir_fd, F_DUPFD_CLOEXEC, 0);
  err = store->dir_fd == -1 ? -errno : 0;
  if (err == 0)
    err = lhb_map_open (size_bytes >> LHB_BLOCK_SHIFT, &store->map);
  if (err)
    {
      lhb_store_close (store);
      return err;
    }
  *store_out = store;
  return 0;
}

/* An fdatasync of the file may run in another thread, and one of a closed file
 * fails: the store would never recover from that. */
static void
close_layer (struct lhb_store *store, struct lhb_layer *layer)
{
  int fd;

  pthread_mutex_lock (&store->syncing);
  fd = atomic_exchange (&layer->fd, -1);
  if (fd >= 0)
    close (fd);
  if (layer->discard_fd >= 0)
    close (layer->discard_fd);
  layer->discard_fd = -1;
  layer->discard_name[0] = '\0';
  layer->in_map = false;
  layer->adopted = false;
  atomic_store (&layer->dirty, false);
  pthread_mutex_unlock (&store->syncing);
}

void
lhb_store_close (lhb_store *store)
{
  if (store == NULL)
    return;
  assert (!store->sync_active);
  if (store->peer != NULL)
    lhb_peer_close (store->peer);
  for (int id = 1; id < LHB_MAP_HEAD; id++)
    close_layer (store, &store->layers[id]);
  if (store->map != NULL)
    lhb_map_close (store->map);
  if (store->activity_fd >= 0)
    close (store->activity_fd);
  if (store->dir_fd >= 0)
    close (store->dir_fd);
  pthread_mutex_destroy (&store->discard_lock);
  pthread_mutex_destroy (&store->activity_lock);
  pthread_mutex_destroy (&store->sync_lock);
  pthread_mutex_destroy (&store->syncing);
  free (store);
}

uint64_t
lhb_store_id (const lhb_store *store)
{
  return store->id;
}

uint64_t
lhb_store_map_bytes (const lhb_store *store)
{
  return store->map == NULL ? 0 : lhb_map_bytes (store->map);
}

struct lhb_layer *
lhb_store_layer (struct lhb_store *store, int id)
{
  if (id < 1 || id >= LHB_MAP_HEAD)
    return NULL;
  if (atomic_load (&store->layers[id].fd) < 0)
    return NULL;
  return &store->layers[id];
}

void
lhb_store_forget_layer (struct lhb_store *store, int id)
{
  assert (id != store->head);
  close_layer (store, &store->layers[id]);
}

/* Open a file of the directory, refusing what is not a regular file.  It is
 * not waited for: a FIFO in its place would never open. */
int
lhb_store_open_file (struct lhb_store *store, const char *name, int flags)
{
  struct stat st;
  int fd, err;

  flags |= store->flags & LHB_STORE_READ_ONLY ? O_RDONLY : O_RDWR;
  fd = openat (store->dir_fd, name,
               flags | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0644);
  if (fd == -1)
    return -errno;
  err = fstat (fd, &st) == -1 ? -errno : 0;
  if (err == 0 && !S_ISREG (st.st_mode))
    err = -EINVAL;
  /* io_uring would take it for "never wait for the disk". */
  if (err == 0 && fcntl (fd, F_SETFL, flags & O_DIRECT) == -1)
    err = -errno;
  if (err)
    {
      close (fd);
      return err;
    }
  return fd;
}

/* Open an image file into a free slot.  Returns the slot's id. */
static int
open_layer (struct lhb_store *store, const char *image, const char *discard)
{
  struct lhb_layer *layer;
  struct stat st;
  int id, fd, err;

  if (strlen (discard) >= LHB_NAME_BYTES_MAX || strchr (image, '/') != NULL
      || strchr (discard, '/') != NULL)
    return -EINVAL;
  for (id = 1; id < LHB_MAP_HEAD; id++)
    if (atomic_load (&store->layers[id].fd) < 0)
      break;
  if (id == LHB_MAP_HEAD)
    return -EMFILE;
  fd = lhb_store_open_file (store, image,
                            lhb_store_is_direct (store) ? O_DIRECT : 0);
  if (fd < 0)
    return fd;
  err = fstat (fd, &st) == -1 ? -errno : 0;
  if (err == 0 && st.st_size % LHB_BLOCK_BYTES != 0)
    err = -EINVAL;
  if (err)
    {
      close (fd);
      return err;
    }
  layer = &store->layers[id];
  layer->size_bytes = (uint64_t) st.st_size;
  memcpy (layer->discard_name, discard, strlen (discard) + 1);
  /* What an earlier process wrote may still be in the page cache only. */
  atomic_store (&layer->dirty, (store->flags & LHB_STORE_READ_ONLY) == 0);
  atomic_store (&layer->fd, fd);
  return id;
}

/* Enter a layer's discards and data into the map, as the head or below it. */
static int
map_layer (struct lhb_store *store, int id, bool is_head)
{
  const uint64_t blocks = store->size_bytes >> LHB_BLOCK_SHIFT;
  struct lhb_layer *layer = &store->layers[id];
  struct lhb_extent extents[EXTENTS_BATCH];
  uint64_t offset = 0, block = 0, first, count;
  enum lhb_extent_kind kind;
  int r = lhb_layer_data_kind (store, layer, &kind);

  if (r)
    return r;
  while ((r = lhb_discard_next (store, layer, block, blocks, &first, &count))
         == 1)
    {
      r = lhb_map_add_discard (store->map, first, count);
      if (r)
        return r;
      block = first + count;
    }
  if (r < 0)
    return r;
  do
    {
      r = lhb_fault (LHB_FAULT_STORE_FIEMAP, store->id);
      if (r == 0)
        r = lhb_file_extents_of (atomic_load (&layer->fd), kind, offset,
                                 extents, EXTENTS_BATCH);
      if (r < 0)
        return r;
      for (int i = 0; i < r; i++)
        {
          int err;

          first = extents[i].offset_bytes >> LHB_BLOCK_SHIFT;
          count = extents[i].length_bytes >> LHB_BLOCK_SHIFT;
          offset = extents[i].offset_bytes + extents[i].length_bytes;
          if (first >= blocks)
            return 0;           /* a layer may be longer than its child */
          if (count > blocks - first)
            count = blocks - first;
          if (!is_head)
            err = lhb_map_add_layer (store->map, (uint8_t) id, first, count);
          else
            err = lhb_map_reserve_head (store->map, first, count);
          if (err)
            return err;
          if (is_head)
            lhb_map_set_head (store->map, first, count);
        }
    }
  while (r == EXTENTS_BATCH);
  return 0;
}

/* The layer added last is entered into the map when it is known whether a
 * newer one follows.  After an error the map may hold a part of it: the store
 * is of no use and the caller closes it. */
static int
map_newest (struct lhb_store *store, bool is_head)
{
  int err;

  if (store->newest == 0)
    return 0;
  /* Nobody knows yet what the layer will have: any block.  So every discard of
   * the head is recorded, and zeros are written. */
  if (store->flags & LHB_STORE_WRITE_ONLY && !is_head)
    return lhb_map_add_layer (store->map, store->newest, 0,
                              store->size_bytes >> LHB_BLOCK_SHIFT);
  err = map_layer (store, store->newest, is_head);
  store->layers[store->newest].in_map = err == 0;
  return err;
}

int
lhb_store_add_layer (lhb_store *store, const char *image, const char *discard)
{
  int err = map_newest (store, false);
  int id;

  if (err)
    return err;
  id = open_layer (store, image, discard);
  if (id > 0)
    store->newest = (uint8_t) id;
  return id;
}

int
lhb_store_add_side_layer (lhb_store *store, const char *image,
                          const char *discard)
{
  return open_layer (store, image, discard);
}

int
lhb_store_start (lhb_store *store)
{
  bool has_head = (store->flags & LHB_STORE_READ_ONLY) == 0;
  int err;

  if (store->newest == 0)
    return -EINVAL;
  if (has_head && store->layers[store->newest].size_bytes != store->size_bytes)
    return -EINVAL;
  err = has_head ? lhb_layer_adopt (store, &store->layers[store->newest]) : 0;
  if (err == 0)
    err = map_newest (store, has_head);
  if (err == 0 && has_head)
    store->head = store->newest;
  return err;
}

int
lhb_store_prepare_head (lhb_store *store, const char *image,
                        const char *discard)
{
  int id, err;

  if (store->prepared != 0)
    return -EBUSY;
  id = open_layer (store, image, discard);
  if (id < 0)
    return id;
  err = lhb_layer_adopt (store, &store->layers[id]);
  if (err)
    {
      close_layer (store, &store->layers[id]);
      return err;
    }
  store->prepared = (uint8_t) id;
  return 0;
}

void
lhb_store_abandon_head (lhb_store *store)
{
  if (store->prepared != 0)
    close_layer (store, &store->layers[store->prepared]);
  store->prepared = 0;
}

int
lhb_store_commit_head (lhb_store *store, uint64_t size_bytes)
{
  struct lhb_layer *layer;
  int err;

  if (store->prepared == 0 || size_bytes < store->size_bytes
      || size_bytes % LHB_BLOCK_BYTES != 0)
    return -EINVAL;
  layer = &store->layers[store->prepared];
  if (layer->size_bytes != size_bytes)
    return -EINVAL;
  err = lhb_map_resize (store->map, size_bytes >> LHB_BLOCK_SHIFT);
  if (err == 0)
    err = lhb_map_fold_head (store->map, store->head);
  if (err)
    return err;
  store->size_bytes = size_bytes;
  store->head = store->prepared;
  store->newest = store->prepared;
  layer->in_map = true;
  store->prepared = 0;
  return store->head;
}

int
lhb_store_rename_discard (lhb_store *store, int layer, const char *discard)
{
  struct lhb_layer *renamed = lhb_store_layer (store, layer);

  if (renamed == NULL || strlen (discard) >= LHB_NAME_BYTES_MAX
      || strchr (discard, '/') != NULL)
    return -EINVAL;
  pthread_mutex_lock (&store->discard_lock);
  memcpy (renamed->discard_name, discard, strlen (discard) + 1);
  pthread_mutex_unlock (&store->discard_lock);
  return 0;
}

/* With 'syncing' held: whoever finds a layer clean knows that the fdatasync
 * which made it so is over. */
static int
sync_dirty_layer (struct lhb_store *store, struct lhb_layer *layer)
{
  int fd = atomic_load (&layer->fd);
  int err;

  /* Cleared before, for a write that ends meanwhile may not be covered. */
  if (fd < 0 || !atomic_exchange (&layer->dirty, false))
    return 0;
  err = lhb_fault (LHB_FAULT_STORE_SYNC, store->id);
  if (err == 0 && fdatasync (fd) == -1)
    err = -errno;
  if (err)
    {
      atomic_store (&layer->dirty, true);
      atomic_store (&store->sync_failed, true);
    }
  return err;
}

int
lhb_store_sync_layer (struct lhb_store *store, struct lhb_layer *layer)
{
  int err;

  pthread_mutex_lock (&store->syncing);
  err = atomic_load (&store->sync_failed) ? -EIO
                                          : sync_dirty_layer (store, layer);
  pthread_mutex_unlock (&store->syncing);
  return err;
}

int
lhb_store_sync (lhb_store *store)
{
  int first_error = 0;

  pthread_mutex_lock (&store->syncing);
  if (atomic_load (&store->sync_failed))
    first_error = -EIO;
  for (int id = 1; id < LHB_MAP_HEAD && first_error == 0; id++)
    first_error = sync_dirty_layer (store, &store->layers[id]);
  pthread_mutex_unlock (&store->syncing);
  return first_error;
}

static void
run_sync (struct lhb_job *job)
{
  struct lhb_store *store = lhb_container_of (job, struct lhb_store, sync_job);

  store->sync_result = lhb_store_sync (store);
}

static void
finish_sync (struct lhb_message *message)
{
  struct lhb_store *store
      = lhb_container_of (message, struct lhb_store, sync_job.done);
  int error = store->sync_result;
  struct lhb_sync_wait *wait, *next;

  pthread_mutex_lock (&store->sync_lock);
  wait = store->sync_running;
  store->sync_running = store->sync_waiting;
  store->sync_waiting = NULL;
  store->sync_active = store->sync_running != NULL;
  if (store->sync_active)
    lhb_pool_submit (store->engine->pool, &store->sync_job);
  pthread_mutex_unlock (&store->sync_lock);
  /* The store may be closed as soon as its last waiter was told. */
  for (; wait != NULL; wait = next)
    {
      next = wait->next;
      wait->done (wait, error);
    }
}

void
lhb_store_sync_async (struct lhb_store *store, struct lhb_sync_wait *wait)
{
  pthread_mutex_lock (&store->sync_lock);
  if (store->sync_active)
    {
      wait->next = store->sync_waiting;
      store->sync_waiting = wait;
    }
  else
    {
      wait->next = NULL;
      store->sync_running = wait;
      store->sync_active = true;
      lhb_pool_submit (store->engine->pool, &store->sync_job);
    }
  pthread_mutex_unlock (&store->sync_lock);
}
