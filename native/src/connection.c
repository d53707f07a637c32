/* Connection: its socket, its life, and the replies it sends.
 *
 * The socket is registered once, edge-triggered; 'readable' and 'writable'
 * remember what the edges said.  A connection ends when it is closing, none
 * of its requests is in flight, and its replies are sent or the socket is
 * dead.
 */

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "lhb_connection.h"
#include "lhb_fault.h"
#include "lhb_util.h"
#include "lhb_volume.h"

/* ---- Replies. */

void
lhb_connection_reply (struct lhb_slot *slot, uint32_t error)
{
  struct lhb_connection *connection = slot->connection;

  connection->protocol->format_reply (slot, error);
  assert (slot->reply_bytes > 0 && slot->reply_bytes <= sizeof slot->reply);
  slot->next = NULL;
  *connection->replies_tail = slot;
  connection->replies_tail = &slot->next;
  lhb_queue_at_turn_end (connection->queue, &connection->turn_end);
}

void
lhb_connection_free_slot (struct lhb_slot *slot)
{
  struct lhb_connection *connection = slot->connection;

  if (slot->slab != NULL)
    lhb_slabs_give (&connection->slabs, slot->slab);
  if (slot->edges != NULL)
    lhb_slabs_give (&connection->slabs, slot->edges);
  slot->slab = slot->edges = NULL;
  slot->next = connection->free_slots;
  connection->free_slots = slot;
  connection->in_flight--;
}

static void
retire_first_reply (struct lhb_connection *connection)
{
  struct lhb_slot *slot = connection->replies;

  connection->replies = slot->next;
  if (connection->replies == NULL)
    connection->replies_tail = &connection->replies;
  connection->reply_sent_bytes = 0;
  lhb_connection_free_slot (slot);
}

static unsigned
gather_replies (struct lhb_connection *connection, struct iovec *iov)
{
  size_t skip = connection->reply_sent_bytes;
  unsigned count = 0;

  for (struct lhb_slot *slot = connection->replies;
       slot != NULL && count + 2 <= LHB_CONN_SEND_IOV_MAX; slot = slot->next)
    {
      if (skip < slot->reply_bytes)
        iov[count++] = (struct iovec){ slot->reply + skip,
                                       slot->reply_bytes - skip };
      skip = skip > slot->reply_bytes ? skip - slot->reply_bytes : 0;
      if (slot->payload_bytes > 0)
        iov[count++] = (struct iovec){ (char *) (uintptr_t) slot->payload
                                           + skip,
                                       slot->payload_bytes - skip };
      skip = 0;
    }
  return count;
}

static void
retire_sent (struct lhb_connection *connection, size_t sent_bytes)
{
  while (sent_bytes > 0)
    {
      struct lhb_slot *slot = connection->replies;
      size_t left = (size_t) slot->reply_bytes + slot->payload_bytes
                    - connection->reply_sent_bytes;

      if (sent_bytes < left)
        {
          connection->reply_sent_bytes += sent_bytes;
          return;
        }
      sent_bytes -= left;
      retire_first_reply (connection);
    }
}

static void
drop_replies (struct lhb_connection *connection)
{
  while (connection->replies != NULL)
    retire_first_reply (connection);
}

void
lhb_connection_give_up (struct lhb_connection *connection, int reason)
{
  if (!connection->closing)
    connection->close_reason = reason;
  connection->closing = true;
  if (reason == LHB_CLOSE_SOCKET_ERROR || reason == LHB_CLOSE_ASKED)
    connection->dead = true;
}

static void
send_replies (struct lhb_connection *connection)
{
  while (connection->replies != NULL && connection->writable
         && !connection->dead)
    {
      struct iovec iov[LHB_CONN_SEND_IOV_MAX];
      struct msghdr message = { .msg_iov = iov };
      ssize_t sent;
      int err = lhb_fault (LHB_FAULT_SOCKET_SEND, 0);

      message.msg_iovlen = gather_replies (connection, iov);
      sent = err ? -1
                 : sendmsg (connection->socket.fd, &message,
                            MSG_NOSIGNAL | MSG_DONTWAIT);
      if (sent >= 0)
        retire_sent (connection, (size_t) sent);
      else if (err == 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        connection->writable = false;
      else if (err || errno != EINTR)
        lhb_connection_give_up (connection, LHB_CLOSE_SOCKET_ERROR);
    }
  if (connection->dead)
    drop_replies (connection);
}

/* ---- Life. */

static void
release (struct lhb_connection *connection)
{
  lhb_slabs_close (&connection->slabs);
  free (connection->receive);
  munmap (connection, sizeof *connection);
}

static void
unlink_connection (struct lhb_connection *connection)
{
  struct lhb_volume *volume = connection->volume;

  if (connection->prev != NULL)
    connection->prev->next = connection->next;
  else
    volume->connections = connection->next;
  if (connection->next != NULL)
    connection->next->prev = connection->prev;
  volume->connection_count--;
  pthread_cond_broadcast (&volume->changed);
}

/* False: a message to this connection is still on its way. */
static bool
try_destroy (struct lhb_connection *connection)
{
  struct lhb_volume *volume = connection->volume;
  struct lhb_event event = {
    .type = LHB_EVENT_CONNECTION_CLOSED,
    .error = connection->close_reason,
    .volume_id = volume->id,
    .subject_id = connection->id,
  };

  pthread_mutex_lock (&volume->lock);
  if (connection->close_posted && !connection->close_handled)
    {
      pthread_mutex_unlock (&volume->lock);
      return false;
    }
  connection->close_posted = true;      /* nobody posts from now on */
  connection->close_handled = true;
  pthread_mutex_unlock (&volume->lock);
  lhb_queue_unwatch (connection->queue, &connection->socket);
  close (connection->socket.fd);
  lhb_engine_post_event (volume->engine, &event);
  /* Last, for the volume may be closed as soon as it has no connections. */
  pthread_mutex_lock (&volume->lock);
  unlink_connection (connection);
  pthread_mutex_unlock (&volume->lock);
  release (connection);
  return true;
}

static void
turn_end (struct lhb_turn_end *self)
{
  struct lhb_connection *connection
      = lhb_container_of (self, struct lhb_connection, turn_end);

  send_replies (connection);
  connection->starved = false;
  if (!connection->closing)
    lhb_connection_pump (connection);
  if (connection->closing && connection->receiving != NULL)
    {
      /* The rest of this write will not come: it never happened. */
      lhb_connection_free_slot (connection->receiving);
      connection->receiving = NULL;
    }
  if (connection->closing && connection->in_flight == 0)
    (void) try_destroy (connection);
}

static void
socket_ready (struct lhb_pollable *self, uint32_t epoll_events)
{
  struct lhb_connection *connection
      = lhb_container_of (self, struct lhb_connection, socket);

  if (epoll_events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
    connection->readable = true;
  if (epoll_events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
    connection->hung_up = true;
  if (epoll_events & (EPOLLOUT | EPOLLHUP | EPOLLERR))
    connection->writable = true;
  if (epoll_events & (EPOLLHUP | EPOLLERR) && connection->closing)
    connection->dead = true;    /* nobody is left to read the replies */
  if (!connection->closing && !connection->starved)
    lhb_connection_pump (connection);
  lhb_queue_at_turn_end (connection->queue, &connection->turn_end);
}

static void
handle_close_asked (struct lhb_message *message)
{
  struct lhb_connection *connection = lhb_container_of (
      message, struct lhb_connection, close_asked);

  connection->close_handled = true;
  lhb_connection_give_up (connection, LHB_CLOSE_ASKED);
  lhb_queue_at_turn_end (connection->queue, &connection->turn_end);
}

static void
handle_attach (struct lhb_message *message)
{
  struct lhb_connection *connection
      = lhb_container_of (message, struct lhb_connection, attach);

  if (lhb_queue_watch (connection->queue, &connection->socket,
                       EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET)
      != 0)
    lhb_connection_give_up (connection, LHB_CLOSE_SOCKET_ERROR);
  lhb_queue_at_turn_end (connection->queue, &connection->turn_end);
}

static int
make_connection (struct lhb_connection **connection_out)
{
  struct lhb_connection *connection;
  int err;

  connection = mmap (NULL, sizeof *connection, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (connection == MAP_FAILED)
    return -errno;
  connection->receive = malloc (LHB_CONN_RECEIVE_BYTES);
  err = connection->receive == NULL ? -ENOMEM
                                    : lhb_slabs_open (&connection->slabs);
  if (err)
    {
      release (connection);
      return err;
    }
  connection->replies_tail = &connection->replies;
  connection->socket.ready = socket_ready;
  connection->turn_end.run = turn_end;
  connection->attach.handle = handle_attach;
  connection->close_asked.handle = handle_close_asked;
  *connection_out = connection;
  return 0;
}

int
lhb_connection_attach (struct lhb_volume *volume,
                       const struct lhb_protocol *protocol, int socket_fd,
                       uint32_t flags, uint32_t base_allocation_id,
                       uint64_t *connection_id_out)
{
  struct lhb_engine *engine = volume->engine;
  struct lhb_connection *connection = NULL;
  uint32_t index;
  int err, fd_flags = fcntl (socket_fd, F_GETFL);

  if (fd_flags == -1
      || fcntl (socket_fd, F_SETFL, fd_flags | O_NONBLOCK) == -1)
    return -errno;
  err = make_connection (&connection);
  if (err)
    return err;
  index = atomic_fetch_add (&engine->next_queue, 1) % engine->queue_count;
  connection->socket.fd = socket_fd;
  connection->protocol = protocol;
  connection->volume = volume;
  connection->queue = engine->queues[index];
  connection->id = lhb_engine_new_id (engine);
  connection->flags = flags;
  if (volume->flags & LHB_VOLUME_READ_ONLY)
    connection->flags |= LHB_NBD_READ_ONLY;
  connection->base_allocation_id = base_allocation_id;
  *connection_id_out = connection->id;
  pthread_mutex_lock (&volume->lock);
  if (volume->closing)
    {
      pthread_mutex_unlock (&volume->lock);
      release (connection);
      return -ESHUTDOWN;
    }
  connection->next = volume->connections;
  if (connection->next != NULL)
    connection->next->prev = connection;
  volume->connections = connection;
  volume->connection_count++;
  /* Under the lock, so that a close can not be posted first. */
  lhb_queue_post (connection->queue, &connection->attach);
  pthread_mutex_unlock (&volume->lock);
  return 0;
}

static void
post_close (struct lhb_connection *connection)
{
  if (connection->close_posted)
    return;
  connection->close_posted = true;
  lhb_queue_post (connection->queue, &connection->close_asked);
}

int
lhb_connection_close (lhb_volume *volume, uint64_t connection_id)
{
  int err = -ENOENT;

  pthread_mutex_lock (&volume->lock);
  for (struct lhb_connection *connection = volume->connections;
       connection != NULL; connection = connection->next)
    if (connection->id == connection_id)
      {
        post_close (connection);
        err = 0;
      }
  pthread_mutex_unlock (&volume->lock);
  return err;
}

void
lhb_connections_close_all (struct lhb_volume *volume)
{
  pthread_mutex_lock (&volume->lock);
  for (struct lhb_connection *connection = volume->connections;
       connection != NULL; connection = connection->next)
    post_close (connection);
  pthread_mutex_unlock (&volume->lock);
}
