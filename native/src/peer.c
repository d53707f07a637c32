/* Peer: open and close, its connections, and its end. */

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lhb_fault.h"
#include "lhb_peer_parts.h"
#include "lhb_util.h"
#include "lhb_volume.h"

/* ---- The end.
 *
 * Whoever finds a reason says so once; the volume drops the peer; then every
 * queue closes its sockets and ends its calls.  A connection is freed in its
 * turn end, which nothing of that queue comes after. */

/* Without locks: the ring of events may be full. */
static void
tell_volume (struct lhb_peer *peer, int error)
{
  struct lhb_event event;
  bool post;

  pthread_mutex_lock (&peer->lock);
  post = peer->volume != NULL
         && lhb_volume_lose_peer (peer->volume, peer->store, error, &event);
  pthread_mutex_unlock (&peer->lock);
  if (post)
    lhb_engine_post_event (peer->engine, &event);
}

void
lhb_peer_end (struct lhb_peer *peer, int error, uint32_t reason)
{
  int alive = 0;

  assert (error > 0);
  if (!atomic_compare_exchange_strong (&peer->ended, &alive, error))
    return;
  atomic_store (&peer->reason, reason);
  tell_volume (peer, error);
  for (uint32_t i = 0; i < peer->queue_count; i++)
    lhb_queue_post (peer->queues[i].queue, &peer->queues[i].end);
}

static void
close_connection (struct lhb_peer_connection *connection)
{
  if (connection->closed)
    return;
  connection->closed = true;
  if (connection->watched)
    lhb_queue_unwatch (connection->owner->queue, &connection->socket);
  close (connection->socket.fd);
  lhb_queue_at_turn_end (connection->owner->queue, &connection->turn_end);
}

/* The sockets first: what the kernel has yet to read of a buffer, or could
 * still write into one, is gone before the buffer's owner hears of it. */
static void
handle_end (struct lhb_message *message)
{
  struct lhb_peer_queue *owner
      = lhb_container_of (message, struct lhb_peer_queue, end);
  struct lhb_peer *peer = owner->peer;

  for (uint32_t i = 0; i < owner->connection_count; i++)
    close_connection (owner->connections[i]);
  owner->connection_count = 0;
  lhb_queue_disarm (owner->queue, &owner->timer);
  lhb_peer_drop_calls (owner, -atomic_load (&peer->ended));
  pthread_mutex_lock (&peer->lock);
  peer->ending--;
  pthread_cond_broadcast (&peer->changed);
  pthread_mutex_unlock (&peer->lock);
}

static void
free_connection (struct lhb_peer_connection *connection)
{
  struct lhb_peer *peer = connection->owner->peer;

  free (connection->receive);
  free (connection);
  pthread_mutex_lock (&peer->lock);
  peer->open--;
  pthread_cond_broadcast (&peer->changed);
  pthread_mutex_unlock (&peer->lock);
}

/* ---- Connections. */

static void
turn_end (struct lhb_turn_end *self)
{
  struct lhb_peer_connection *connection
      = lhb_container_of (self, struct lhb_peer_connection, turn_end);

  if (!connection->closed)
    lhb_peer_send (connection);
  if (!connection->closed && connection->readable)
    lhb_peer_receive (connection);
  if (connection->closed)
    free_connection (connection);
}

static void
socket_ready (struct lhb_pollable *self, uint32_t epoll_events)
{
  struct lhb_peer_connection *connection
      = lhb_container_of (self, struct lhb_peer_connection, socket);

  if (epoll_events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
    connection->readable = true;
  if (epoll_events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
    connection->hung_up = true;
  if (epoll_events & (EPOLLOUT | EPOLLHUP | EPOLLERR))
    connection->writable = true;
  if (connection->closed)
    return;
  lhb_peer_receive (connection);
  if (connection->send != NULL)
    lhb_queue_at_turn_end (connection->owner->queue, &connection->turn_end);
}

static void
handle_attach (struct lhb_message *message)
{
  struct lhb_peer_connection *connection
      = lhb_container_of (message, struct lhb_peer_connection, attach);
  struct lhb_peer_queue *owner = connection->owner;
  int err;

  if (lhb_peer_has_ended (owner->peer))
    {
      close_connection (connection);
      return;
    }
  owner->connections[owner->connection_count++] = connection;
  err = lhb_fault (LHB_FAULT_PEER_WATCH, owner->peer->store->id);
  if (err == 0)
    err = lhb_queue_watch (owner->queue, &connection->socket,
                           EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
  connection->watched = err == 0;
  if (err)
    lhb_peer_end (owner->peer, -err, LHB_PEER_END_SOCKET_ERROR);
}

/* Best effort: a Unix socket has none of these, and knows when its peer is
 * gone.  A host that vanished while nothing is in flight is found this way. */
static void
tune_socket (int fd, uint64_t reply_timeout_ns)
{
  int seconds = (int) (reply_timeout_ns / 3000000000u) + 1;
  const struct {
    int level, name, value;
  } options[] = {
    { IPPROTO_TCP, TCP_NODELAY, 1 },
    { SOL_SOCKET, SO_KEEPALIVE, 1 },
    { IPPROTO_TCP, TCP_KEEPIDLE, seconds },
    { IPPROTO_TCP, TCP_KEEPINTVL, seconds },
    { IPPROTO_TCP, TCP_KEEPCNT, 2 },
  };

  for (size_t i = 0; i < sizeof options / sizeof options[0]; i++)
    (void) setsockopt (fd, options[i].level, options[i].name,
                       &options[i].value, sizeof options[i].value);
}

static struct lhb_peer_connection *
make_connection (struct lhb_peer_queue *owner, int socket_fd)
{
  struct lhb_peer_connection *connection
      = lhb_fault (LHB_FAULT_PEER_ALLOC, owner->peer->store->id)
            ? NULL
            : calloc (1, sizeof *connection);

  if (connection == NULL)
    return NULL;
  connection->receive = malloc (LHB_PEER_RECEIVE_BYTES);
  if (connection->receive == NULL)
    {
      free (connection);
      return NULL;
    }
  connection->owner = owner;
  connection->socket.fd = socket_fd;
  connection->socket.ready = socket_ready;
  connection->turn_end.run = turn_end;
  connection->attach.handle = handle_attach;
  connection->send_tail = &connection->send;
  while (connection->free_count < LHB_PEER_IN_FLIGHT_MAX)
    {
      uint32_t slot = LHB_PEER_IN_FLIGHT_MAX - 1 - connection->free_count;

      connection->free_slots[connection->free_count++] = (uint8_t) slot;
    }
  return connection;
}

int
lhb_peer_add_connection (lhb_store *store, uint32_t queue, int socket_fd)
{
  struct lhb_peer *peer = store->peer;
  struct lhb_peer_connection *connection;
  int err = 0, fd_flags = fcntl (socket_fd, F_GETFL);

  if (peer == NULL || queue >= peer->queue_count)
    return -EINVAL;
  if (fd_flags == -1
      || fcntl (socket_fd, F_SETFL, fd_flags | O_NONBLOCK) == -1)
    return -errno;
  tune_socket (socket_fd, peer->reply_timeout_ns);
  connection = make_connection (&peer->queues[queue], socket_fd);
  if (connection == NULL)
    return -ENOMEM;
  pthread_mutex_lock (&peer->lock);
  if (lhb_peer_has_ended (peer))
    err = -ENOTCONN;
  else if (peer->volume != NULL)
    err = -EBUSY;
  else if (peer->added[queue] == LHB_PEER_CONNECTIONS_MAX)
    err = -EMFILE;
  if (err == 0)
    {
      peer->added[queue]++;
      peer->open++;
      lhb_queue_post (peer->queues[queue].queue, &connection->attach);
    }
  pthread_mutex_unlock (&peer->lock);
  if (err)
    {
      free (connection->receive);
      free (connection);
    }
  return err;
}

/* ---- Life. */

static void
init_queue (struct lhb_peer *peer, uint32_t index)
{
  struct lhb_peer_queue *owner = &peer->queues[index];

  owner->peer = peer;
  owner->queue = peer->engine->queues[index];
  owner->end.handle = handle_end;
  owner->timer.fire = lhb_peer_timer_fired;
  owner->in_flight.next = owner->in_flight.prev = &owner->in_flight;
  owner->waiting.next = owner->waiting.prev = &owner->waiting;
}

int
lhb_peer_open (lhb_engine *engine, uint64_t size_bytes, uint32_t flags,
               uint32_t reply_timeout_ms, lhb_store **store_out)
{
  struct lhb_peer *peer;

  if (size_bytes == 0 || size_bytes % LHB_BLOCK_BYTES != 0
      || size_bytes > INT64_MAX || flags & ~(uint32_t) LHB_PEER_OURS
      || reply_timeout_ms == 0 || reply_timeout_ms > LHB_PEER_TIMEOUT_MS_MAX)
    return -EINVAL;
  if (lhb_fault (LHB_FAULT_PEER_ALLOC, 0))
    return -ENOMEM;
  peer = calloc (1, sizeof *peer
                        + engine->queue_count * sizeof peer->queues[0]);
  if (peer == NULL)
    return -ENOMEM;
  /* No layer has a file, so that whoever takes it for a local store is told
   * that there is no such layer. */
  peer->store = lhb_store_make (engine, size_bytes);
  if (peer->store == NULL)
    {
      free (peer);
      return -ENOMEM;
    }
  peer->store->peer = peer;
  peer->engine = engine;
  peer->flags = flags;
  peer->reply_timeout_ns = (uint64_t) reply_timeout_ms * 1000000u;
  lhb_mutex_init (&peer->lock);
  if (pthread_cond_init (&peer->changed, NULL) != 0)
    abort ();
  peer->queue_count = peer->ending = engine->queue_count;
  for (uint32_t i = 0; i < peer->queue_count; i++)
    init_queue (peer, i);
  *store_out = peer->store;
  return 0;
}

void
lhb_peer_close (struct lhb_peer *peer)
{
  assert (peer->volume == NULL);
  lhb_peer_end (peer, ESHUTDOWN, LHB_PEER_END_CLOSED);
  pthread_mutex_lock (&peer->lock);
  while (peer->ending > 0 || peer->open > 0)
    pthread_cond_wait (&peer->changed, &peer->lock);
  pthread_mutex_unlock (&peer->lock);
  pthread_cond_destroy (&peer->changed);
  pthread_mutex_destroy (&peer->lock);
  free (peer);
}

int
lhb_peer_resize (lhb_store *store, uint64_t size_bytes)
{
  if (store->peer == NULL || size_bytes < store->size_bytes
      || size_bytes % LHB_BLOCK_BYTES != 0 || size_bytes > INT64_MAX)
    return -EINVAL;
  store->size_bytes = size_bytes;
  return 0;
}

void
lhb_peer_set_volume (struct lhb_peer *peer, struct lhb_volume *volume)
{
  pthread_mutex_lock (&peer->lock);
  peer->volume = volume;
  pthread_mutex_unlock (&peer->lock);
}

bool
lhb_peer_has_ended (const struct lhb_peer *peer)
{
  return atomic_load_explicit (&peer->ended, memory_order_acquire) != 0;
}

bool
lhb_peer_is_complete (struct lhb_peer *peer)
{
  bool complete = true;

  pthread_mutex_lock (&peer->lock);
  for (uint32_t i = 0; i < peer->queue_count; i++)
    complete &= peer->added[i] > 0;
  pthread_mutex_unlock (&peer->lock);
  return complete;
}

void
lhb_peer_statistics (lhb_store *store,
                     struct lhb_peer_statistics *statistics_out)
{
  struct lhb_peer *peer = store->peer;
  struct lhb_peer_statistics s = { 0 };

  for (uint32_t i = 0; i < peer->queue_count; i++)
    {
      const struct lhb_peer_counters *c = &peer->queues[i].counters;

      s.frames_sent += atomic_load (&c->frames_sent);
      s.frames_received += atomic_load (&c->frames_received);
      s.bytes_sent += atomic_load (&c->bytes_sent);
      s.bytes_received += atomic_load (&c->bytes_received);
      s.errors += atomic_load (&c->errors);
      s.timeouts += atomic_load (&c->timeouts);
      s.in_flight += atomic_load (&c->in_flight);
      s.waiting += atomic_load (&c->waiting);
    }
  s.ended = atomic_load (&peer->ended);
  s.end_reason = s.ended ? atomic_load (&peer->reason) : 0;
  pthread_mutex_lock (&peer->lock);
  s.connections = peer->open;
  pthread_mutex_unlock (&peer->lock);
  *statistics_out = s;
}
