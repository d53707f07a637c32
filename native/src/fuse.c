/* FUSE: requests from the kernel to whoever answers them, and the answers
 * back.  What is answered without the server is in fuse_io.c. */

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "lhb_fuse.h"
#include "lhb_util.h"
#include "lhb_volume.h"

/* Payload at any alignment, and two blocks for the edges. */
#define SLOT_BYTES (LHB_FUSE_BYTES_MAX + 3 * (size_t) LHB_BLOCK_BYTES)

/* ---- Lanes. */

static void
watch (struct lhb_fuse_lane *lane)
{
  if (lane->watching || lane->ended || lane->stopping
      || lane->stalled != NULL)
    return;
  lane->start_error
      = lhb_queue_watch (lane->queue, &lane->kernel, EPOLLIN | EPOLLEXCLUSIVE);
  lane->watching = lane->start_error == 0;
}

static void
unwatch (struct lhb_fuse_lane *lane)
{
  if (lane->watching)
    lhb_queue_unwatch (lane->queue, &lane->kernel);
  lane->watching = false;
}

static void
settle (struct lhb_fuse *fuse)
{
  pthread_mutex_lock (&fuse->lock);
  fuse->lanes_settled++;
  pthread_cond_broadcast (&fuse->changed);
  pthread_mutex_unlock (&fuse->lock);
}

static void
handle_gone (struct lhb_message *message)
{
  settle (lhb_container_of (message, struct lhb_fuse_lane, message)->fuse);
}

static void
free_slot (struct lhb_fuse_slot *slot)
{
  struct lhb_fuse_lane *lane = slot->lane;

  slot->next = lane->free;
  lane->free = slot;
  lane->busy--;
  if (!lane->stopping)
    watch (lane);
  else if (lane->busy == 0)
    {
      /* Through the queue: the caller may still look at the lane. */
      lane->message.handle = handle_gone;
      lhb_queue_post (lane->queue, &lane->message);
    }
}

/* The mount is no more, or not to be trusted.  This lane reads no more. */
static void
end (struct lhb_fuse_lane *lane)
{
  unwatch (lane);
  lane->ended = true;
  eventfd_write (lane->fuse->ended_fd, 1);
}

/* ---- Answers. */

void
lhb_fuse_reply (struct lhb_fuse_slot *slot, int error, const void *payload,
                size_t payload_bytes)
{
  struct fuse_out_header out = { .error = error, .unique = slot->unique };
  struct iovec iov[2] = { { &out, sizeof out },
                          { (void *) (uintptr_t) payload, payload_bytes } };
  ssize_t sent;

  if (error != 0)
    iov[1].iov_len = 0;
  out.len = (uint32_t) (sizeof out + iov[1].iov_len);
  do
    sent = writev (slot->lane->fuse->kernel_fd, iov, 2);
  while (sent == -1 && errno == EINTR);
  /* Otherwise ENOENT, nobody waits for it any more, or the mount has gone;
   * the next read says so.  EFAULT and the like would leave a caller
   * waiting. */
  if (sent == -1 && errno != ENOENT && errno != ENODEV && error == 0)
    lhb_fuse_reply (slot, -EIO, NULL, 0);
  else
    free_slot (slot);
}

static bool
was_open (struct lhb_fuse *fuse, uint64_t unique)
{
  bool found = false;

  pthread_mutex_lock (&fuse->lock);
  for (uint32_t i = 0; i < LHB_FUSE_OPENS && !found; i++)
    if (fuse->opens[i] == unique)
      {
        fuse->opens[i] = 0;
        found = true;
      }
  pthread_mutex_unlock (&fuse->lock);
  return found;
}

/* The kernel must not send more than fits a slot, may have more requests in
 * the background than its default of 12, and may write in parallel to files
 * that it does not cache. */
static void
edit_reply (struct lhb_fuse *fuse, const struct fuse_out_header *out)
{
  char *body = fuse->message + sizeof *out;
  size_t body_bytes = out->len - sizeof *out;
  struct fuse_init_out *init = (void *) body;
  struct fuse_open_out *opened = (void *) body;

  if (out->error != 0 || out->unique == 0)
    return;
  if (out->unique == atomic_load (&fuse->init_unique))
    {
      if (body_bytes < offsetof (struct fuse_init_out, map_alignment))
        return;
      init->flags &= ~(uint32_t) FUSE_WRITEBACK_CACHE;
      init->max_background = LHB_FUSE_BACKGROUND_MAX;
      init->congestion_threshold = LHB_FUSE_BACKGROUND_MAX * 3 / 4;
      if (init->max_write > LHB_FUSE_BYTES_MAX)
        init->max_write = LHB_FUSE_BYTES_MAX;
      if (init->max_pages > LHB_FUSE_BYTES_MAX / LHB_BLOCK_BYTES)
        init->max_pages = LHB_FUSE_BYTES_MAX / LHB_BLOCK_BYTES;
    }
  else if (body_bytes == sizeof *opened && was_open (fuse, out->unique)
           && opened->open_flags & FOPEN_DIRECT_IO)
    opened->open_flags |= FOPEN_PARALLEL_DIRECT_WRITES;
}

/* One message.  False: there is none now. */
static bool
pass_reply (struct lhb_fuse *fuse)
{
  struct fuse_out_header out;
  ssize_t got = recv (fuse->server_fd, fuse->message, LHB_FUSE_MESSAGE_BYTES,
                      MSG_DONTWAIT | MSG_TRUNC);

  if (got == -1 && errno == EINTR)
    return true;
  if (got <= 0)
    return false;
  if ((size_t) got < sizeof out || (size_t) got > LHB_FUSE_MESSAGE_BYTES)
    return true;
  memcpy (&out, fuse->message, sizeof out);
  if (out.len != (size_t) got)
    return true;
  edit_reply (fuse, &out);
  /* The kernel checks it, and refuses what nobody waits for. */
  while (write (fuse->kernel_fd, fuse->message, (size_t) got) == -1
         && errno == EINTR)
    ;
  return true;
}

static void
server_ready (struct lhb_pollable *self, uint32_t epoll_events)
{
  struct lhb_fuse *fuse = lhb_container_of (self, struct lhb_fuse, server);
  uint32_t count = 0;

  while (count < LHB_FUSE_TURN_MAX && pass_reply (fuse))
    count++;
  if (count == 0 && epoll_events & (EPOLLHUP | EPOLLERR))
    lhb_queue_unwatch (fuse->lanes[0].queue, self);
}

/* ---- Requests. */

static void
note_request (struct lhb_fuse *fuse, const struct lhb_fuse_slot *slot)
{
  if (slot->opcode == FUSE_INIT)
    atomic_store (&fuse->init_unique, slot->unique);
  if (slot->opcode != FUSE_OPEN)
    return;
  pthread_mutex_lock (&fuse->lock);
  fuse->opens[fuse->next_open++ % LHB_FUSE_OPENS] = slot->unique;
  pthread_mutex_unlock (&fuse->lock);
}

static bool
wants_no_answer (const struct lhb_fuse_slot *slot)
{
  return slot->opcode == FUSE_FORGET || slot->opcode == FUSE_BATCH_FORGET
         || slot->opcode == FUSE_INTERRUPT;
}

/* To the server.  If its socket is full, the lane waits. */
static void
forward (struct lhb_fuse_slot *slot)
{
  struct lhb_fuse_lane *lane = slot->lane;
  size_t bytes = slot->message_bytes;
  size_t head = bytes < sizeof slot->head ? bytes : sizeof slot->head;
  struct iovec iov[2]
      = { { slot->head, head }, { slot->data, bytes - head } };
  struct msghdr message = { .msg_iov = iov, .msg_iovlen = 2 };
  ssize_t sent;

  note_request (lane->fuse, slot);
  do
    sent = sendmsg (lane->fuse->server_fd, &message,
                    MSG_NOSIGNAL | MSG_DONTWAIT);
  while (sent == -1 && errno == EINTR);
  if (sent == -1 && errno == EAGAIN && !lane->stopping)
    {
      lane->stalled = slot;
      unwatch (lane);
      lhb_queue_arm (lane->queue, &lane->retry,
                     lhb_now_ns () + LHB_FUSE_RETRY_NS);
    }
  else if (sent == -1 && !wants_no_answer (slot))
    lhb_fuse_reply (slot, errno == EMSGSIZE ? -E2BIG : -EIO, NULL, 0);
  else
    free_slot (slot);
}

static void
retry (struct lhb_timer *timer)
{
  struct lhb_fuse_lane *lane
      = lhb_container_of (timer, struct lhb_fuse_lane, retry);
  struct lhb_fuse_slot *slot = lane->stalled;

  lane->stalled = NULL;
  if (slot != NULL)
    forward (slot);
}

/* False: it is no request, and what comes after it would be none either. */
static bool
dispatch (struct lhb_fuse_slot *slot, size_t bytes)
{
  if (bytes < sizeof slot->in || slot->in.len != bytes)
    return false;
  slot->message_bytes = bytes;
  slot->unique = slot->in.unique;
  slot->opcode = slot->in.opcode;
  slot->file = NULL;
  if (slot->opcode == FUSE_INTERRUPT)
    free_slot (slot);           /* everything ends by itself */
  else if (!lhb_fuse_execute (slot))
    forward (slot);
  return true;
}

/* Whether to go on reading. */
static bool
take_request (struct lhb_fuse_lane *lane)
{
  struct lhb_fuse_slot *slot = lane->free;
  struct iovec iov[2];
  ssize_t got;

  if (slot == NULL || !lane->watching)
    {
      unwatch (lane);
      return false;
    }
  iov[0] = (struct iovec) { slot->head, sizeof slot->head };
  iov[1] = (struct iovec) { slot->data, LHB_FUSE_BYTES_MAX };
  got = readv (lane->kernel.fd, iov, 2);
  if (got == -1 && errno == EAGAIN)
    return false;
  if (got == -1 && (errno == EINTR || errno == ENOENT))
    return true;
  if (got > 0)
    {
      lane->free = slot->next;
      lane->busy++;
      if (dispatch (slot, (size_t) got))
        return true;
      end (lane);
      free_slot (slot);
      return false;
    }
  end (lane);
  return false;
}

static void
kernel_ready (struct lhb_pollable *self, uint32_t epoll_events)
{
  struct lhb_fuse_lane *lane
      = lhb_container_of (self, struct lhb_fuse_lane, kernel);

  (void) epoll_events;
  for (uint32_t i = 0; i < LHB_FUSE_TURN_MAX; i++)
    if (!take_request (lane))
      return;
}

/* ---- Files. */

/* Called with the lock held. */
static struct lhb_fuse_file *
find_file (struct lhb_fuse *fuse, uint64_t handle)
{
  for (uint32_t i = 0; i < fuse->file_count; i++)
    if (fuse->files[i].handle == handle)
      return &fuse->files[i];
  return NULL;
}

struct lhb_fuse_file *
lhb_fuse_take_file (struct lhb_fuse *fuse, uint64_t handle,
                    lhb_volume **volume_out)
{
  struct lhb_fuse_file *file = NULL;

  pthread_mutex_lock (&fuse->lock);
  if (handle != 0)
    file = find_file (fuse, handle);
  if (file != NULL)
    {
      file->in_flight++;
      *volume_out = file->volume;
    }
  pthread_mutex_unlock (&fuse->lock);
  return file;
}

void
lhb_fuse_put_file (struct lhb_fuse *fuse, struct lhb_fuse_file *file)
{
  pthread_mutex_lock (&fuse->lock);
  assert (file->in_flight > 0);
  if (--file->in_flight == 0)
    pthread_cond_broadcast (&fuse->changed);
  pthread_mutex_unlock (&fuse->lock);
}

int
lhb_fuse_add_file (lhb_fuse *fuse, uint64_t handle, lhb_volume *volume,
                   uint32_t flags)
{
  struct lhb_fuse_file *file;
  int err = 0;

  if (handle == 0)
    return -EINVAL;
  pthread_mutex_lock (&fuse->lock);
  file = find_file (fuse, 0);
  if (file == NULL && fuse->file_count < LHB_FUSE_FILES_MAX)
    file = &fuse->files[fuse->file_count++];
  if (find_file (fuse, handle) != NULL)
    err = -EEXIST;
  else if (file == NULL)
    err = -EMFILE;
  else
    *file = (struct lhb_fuse_file) { handle, volume, flags, 0 };
  pthread_mutex_unlock (&fuse->lock);
  return err;
}

/* Called with the lock held, which is dropped meanwhile. */
static void
wait_file (struct lhb_fuse *fuse, struct lhb_fuse_file *file)
{
  while (file->in_flight > 0)
    pthread_cond_wait (&fuse->changed, &fuse->lock);
}

void
lhb_fuse_remove_file (lhb_fuse *fuse, uint64_t handle)
{
  struct lhb_fuse_file *file;

  pthread_mutex_lock (&fuse->lock);
  file = handle == 0 ? NULL : find_file (fuse, handle);
  if (file != NULL)
    {
      wait_file (fuse, file);
      *file = (struct lhb_fuse_file) { 0 };
    }
  pthread_mutex_unlock (&fuse->lock);
}

void
lhb_fuse_release_volume (lhb_volume *volume)
{
  struct lhb_engine *engine = volume->engine;
  struct lhb_fuse *fuse;

  /* Held until the end, so that the relay stays. */
  pthread_mutex_lock (&engine->fuse_lock);
  fuse = engine->fuse;
  if (fuse != NULL)
    {
      pthread_mutex_lock (&fuse->lock);
      for (uint32_t i = 0; i < LHB_FUSE_FILES_MAX; i++)
        if (fuse->files[i].volume == volume)
          {
            fuse->files[i].volume = NULL;
            wait_file (fuse, &fuse->files[i]);
          }
      pthread_mutex_unlock (&fuse->lock);
    }
  pthread_mutex_unlock (&engine->fuse_lock);
}

/* ---- Beginning and end. */

/* Every lane once; then wait for all of them. */
static void
tell_lanes (struct lhb_fuse *fuse,
            void (*handle) (struct lhb_message *message))
{
  uint32_t count = fuse->engine->queue_count;

  fuse->lanes_settled = 0;
  for (uint32_t i = 0; i < count; i++)
    {
      fuse->lanes[i].message.handle = handle;
      lhb_queue_post (fuse->lanes[i].queue, &fuse->lanes[i].message);
    }
  pthread_mutex_lock (&fuse->lock);
  while (fuse->lanes_settled < count)
    pthread_cond_wait (&fuse->changed, &fuse->lock);
  pthread_mutex_unlock (&fuse->lock);
}

static void
handle_start (struct lhb_message *message)
{
  struct lhb_fuse_lane *lane
      = lhb_container_of (message, struct lhb_fuse_lane, message);
  struct lhb_fuse *fuse = lane->fuse;

  watch (lane);
  if (lane == &fuse->lanes[0] && lane->start_error == 0)
    lane->start_error = lhb_queue_watch (lane->queue, &fuse->server, EPOLLIN);
  settle (fuse);
}

static void
handle_stop (struct lhb_message *message)
{
  struct lhb_fuse_lane *lane
      = lhb_container_of (message, struct lhb_fuse_lane, message);
  struct lhb_fuse *fuse = lane->fuse;
  struct lhb_fuse_slot *stalled = lane->stalled;

  unwatch (lane);
  lhb_queue_disarm (lane->queue, &lane->retry);
  lane->stalled = NULL;
  if (lane == &fuse->lanes[0])
    {
      /* What the server said before it ended; its socket has a bound. */
      while (pass_reply (fuse))
        ;
      lhb_queue_unwatch (lane->queue, &fuse->server);
    }
  lane->busy++;                 /* so that the last one settles it, once */
  lane->stopping = true;
  if (stalled != NULL)
    forward (stalled);
  if (--lane->busy == 0)
    settle (fuse);
}

static void
prepare_lane (struct lhb_fuse *fuse, uint32_t index)
{
  struct lhb_fuse_lane *lane = &fuse->lanes[index];

  lane->fuse = fuse;
  lane->queue = fuse->engine->queues[index];
  lane->kernel = (struct lhb_pollable) { kernel_ready, fuse->kernel_fd };
  lane->retry.fire = retry;
  for (uint32_t i = 0; i < LHB_FUSE_SLOTS; i++)
    {
      struct lhb_fuse_slot *slot = &lane->slots[i];

      slot->lane = lane;
      slot->data
          = fuse->memory + (index * (size_t) LHB_FUSE_SLOTS + i) * SLOT_BYTES;
      slot->next = lane->free;
      lane->free = slot;
    }
}

static void
release (struct lhb_fuse *fuse)
{
  if (fuse->memory != NULL && fuse->memory != MAP_FAILED)
    munmap (fuse->memory, fuse->memory_bytes);
  if (fuse->ended_fd != -1)
    close (fuse->ended_fd);
  free (fuse->message);
  pthread_cond_destroy (&fuse->changed);
  pthread_mutex_destroy (&fuse->lock);
  free (fuse);
}

/* Address space: untouched slots cost no memory. */
static int
allocate (struct lhb_engine *engine, struct lhb_fuse **fuse_out)
{
  uint32_t lanes = engine->queue_count;
  struct lhb_fuse *fuse
      = calloc (1, sizeof *fuse + lanes * sizeof fuse->lanes[0]);

  if (fuse == NULL)
    return -ENOMEM;
  fuse->engine = engine;
  lhb_mutex_init (&fuse->lock);
  if (pthread_cond_init (&fuse->changed, NULL) != 0)
    abort ();
  fuse->ended_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  fuse->message = malloc (LHB_FUSE_MESSAGE_BYTES);
  fuse->memory_bytes = lanes * (size_t) LHB_FUSE_SLOTS * SLOT_BYTES;
  fuse->memory = mmap (NULL, fuse->memory_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fuse->ended_fd == -1 || fuse->message == NULL
      || fuse->memory == MAP_FAILED)
    {
      release (fuse);
      return -ENOMEM;
    }
  *fuse_out = fuse;
  return 0;
}

int
lhb_fuse_open (lhb_engine *engine, int kernel_fd, int server_fd,
               lhb_fuse **fuse_out)
{
  int flags = fcntl (kernel_fd, F_GETFL);
  struct lhb_fuse *fuse;
  int err;

  if (flags == -1 || fcntl (kernel_fd, F_SETFL, flags | O_NONBLOCK) == -1)
    return -errno;
  err = allocate (engine, &fuse);
  if (err)
    return err;
  fuse->kernel_fd = kernel_fd;
  fuse->server_fd = server_fd;
  fuse->server = (struct lhb_pollable) { server_ready, server_fd };
  for (uint32_t i = 0; i < engine->queue_count; i++)
    prepare_lane (fuse, i);
  pthread_mutex_lock (&engine->fuse_lock);
  if (engine->fuse != NULL)
    err = -EBUSY;
  else
    engine->fuse = fuse;
  pthread_mutex_unlock (&engine->fuse_lock);
  if (err)
    {
      release (fuse);
      return err;
    }
  tell_lanes (fuse, handle_start);
  for (uint32_t i = 0; i < engine->queue_count && err == 0; i++)
    err = fuse->lanes[i].start_error;
  if (err)
    {
      fuse->kernel_fd = fuse->server_fd = -1;   /* the caller's again */
      lhb_fuse_close (fuse);
      return err;
    }
  *fuse_out = fuse;
  return 0;
}

int
lhb_fuse_fd (const lhb_fuse *fuse)
{
  return fuse->ended_fd;
}

void
lhb_fuse_close (lhb_fuse *fuse)
{
  tell_lanes (fuse, handle_stop);
  pthread_mutex_lock (&fuse->engine->fuse_lock);
  fuse->engine->fuse = NULL;
  pthread_mutex_unlock (&fuse->engine->fuse_lock);
  if (fuse->kernel_fd != -1)
    close (fuse->kernel_fd);
  if (fuse->server_fd != -1)
    close (fuse->server_fd);
  release (fuse);
}
