/* The connection to the engine: handshake, requests, replies, and what
 * happens when it is gone.
 *
 * A lost connection loses no command.  All that had no answer are sent again
 * on the next one, which the engine does not let in before it has finished
 * what the last one asked for, so an old write never follows a newer one.
 */

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include "lhb_bytes.h"
#include "lhb_tgt.h"
#include "lhb_util.h"

static void handle_socket (int fd, int events, void *data);

static void
turn_handler (struct event_data *event)
{
  lhb_link_turn (event->data);
}

struct lhb_link *
lhb_link_new (struct scsi_lu *lu)
{
  struct lhb_link *link = calloc (1, sizeof *link);

  if (link == NULL)
    return NULL;
  link->lu = lu;
  link->fd = link->timer_fd = -1;
  link->away_ns = LHB_TGT_AWAY_S * 1000000000ull;
  link->to_send_end = &link->to_send;
  INIT_LIST_HEAD (&link->waiting);
  tgt_init_sched_event (&link->turn, turn_handler, link);
  for (unsigned i = 0; i < LHB_TGT_TASKS; i++)
    {
      link->tasks[i].link = link;
      link->tasks[i].next = link->free;
      link->free = &link->tasks[i];
    }
  return link;
}

void
lhb_link_free (struct lhb_link *link)
{
  lhb_link_close (link);
  free (link);
}

/* ---- Going down and coming up. */

static void
set_timer (struct lhb_link *link, uint64_t first_ns)
{
  struct itimerspec when = { .it_value.tv_nsec = (long) first_ns };

  if (first_ns)
    when.it_interval.tv_nsec = (long) LHB_TGT_RETRY_NS;
  timerfd_settime (link->timer_fd, 0, &when, NULL);
}

static void
close_socket (struct lhb_link *link)
{
  if (link->fd == -1)
    return;
  tgt_event_del (link->fd);
  close (link->fd);
  link->fd = -1;
}

/* The connection is gone, or makes no sense.  Commands wait for the next. */
static void
go_down (struct lhb_link *link, const char *why)
{
  if (link->state == LHB_LINK_READY)
    {
      link->down_since_ns = lhb_now_ns ();
      eprintf ("lhblock: %s: %s\n", link->export, why);
    }
  close_socket (link);
  link->state = LHB_LINK_DOWN;
  link->to_send = NULL;
  link->to_send_end = &link->to_send;
  link->reading = NULL;
  link->head = link->tail = 0;
  if (link->timer_fd != -1)
    set_timer (link, LHB_TGT_RETRY_FIRST_NS);
}

/* Say who we are and what we want; the server need not be heard first. */
static void
compose_greeting (struct lhb_link *link)
{
  uint8_t *at = (uint8_t *) link->greeting;
  uint32_t name_bytes = (uint32_t) strlen (link->export);

  lhb_put_be32 (at, NBD_CLIENT_FLAGS);
  lhb_put_be64 (at + 4, NBD_IHAVEOPT);
  lhb_put_be32 (at + 12, NBD_OPT_GO);
  lhb_put_be32 (at + 16, 4 + name_bytes + 2);
  lhb_put_be32 (at + 20, name_bytes);
  memcpy (at + 24, link->export, name_bytes);
  lhb_put_be16 (at + 24 + name_bytes, 0);
  link->greeting_bytes = 26 + name_bytes;
  link->greeting_sent = 0;
}

/* Begin a handshake.  0 or -errno; nothing is left behind on failure. */
static int
connect_socket (struct lhb_link *link)
{
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  int size = 1 << 20;
  int err;

  if (strlen (link->path) >= sizeof address.sun_path)
    return -ENAMETOOLONG;
  strcpy (address.sun_path, link->path);
  link->fd = socket (AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (link->fd == -1)
    return -errno;
  /* Larger batches; a kernel that grants less is as good. */
  setsockopt (link->fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
  if (connect (link->fd, (struct sockaddr *) &address, sizeof address) == -1
      || tgt_event_add (link->fd, EPOLLIN | EPOLLOUT, handle_socket, link))
    {
      err = errno ? -errno : -EIO;
      close (link->fd);
      link->fd = -1;
      return err;
    }
  link->state = LHB_LINK_GREETING;
  link->can_write = false;
  link->began_ns = lhb_now_ns ();
  compose_greeting (link);
  return 0;
}

static void
handle_timer (int fd, int events, void *data)
{
  struct lhb_link *link = data;
  uint64_t expirations, now_ns = lhb_now_ns ();

  (void) events;
  if (read (fd, &expirations, sizeof expirations) == -1)
    return;
  if (link->state == LHB_LINK_READY)
    return;
  if (link->state != LHB_LINK_DOWN
      && now_ns - link->began_ns > LHB_TGT_HANDSHAKE_NS)
    go_down (link, "no answer");
  if (link->state == LHB_LINK_DOWN)
    connect_socket (link);
  if (!link->away && now_ns - link->down_since_ns > link->away_ns)
    {
      eprintf ("lhblock: %s: nobody serves it; commands are answered BUSY\n",
               link->export);
      link->away = true;
    }
  lhb_link_turn (link);
}

int
lhb_link_open (struct lhb_link *link, const char *path)
{
  uint64_t deadline_ns = lhb_now_ns () + LHB_TGT_HANDSHAKE_NS;
  int err;

  link->path = strdup (path);
  if (link->path == NULL)
    return -ENOMEM;
  err = connect_socket (link);
  while (err == 0 && link->state != LHB_LINK_READY)
    {
      struct pollfd waiting = { .fd = link->fd, .events = POLLIN };
      uint64_t now_ns = lhb_now_ns ();

      if (link->greeting_sent < link->greeting_bytes)
        waiting.events |= POLLOUT;
      if (now_ns >= deadline_ns)
        err = -ETIMEDOUT;
      else if (poll (&waiting, 1, (int) ((deadline_ns - now_ns) / 1000000) + 1)
               > 0)
        {
          handle_socket (link->fd, EPOLLIN | EPOLLOUT, link);
          if (link->state == LHB_LINK_DOWN)
            err = -ECONNREFUSED;
        }
    }
  if (err == 0)
    {
      link->timer_fd
          = timerfd_create (CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
      if (link->timer_fd == -1)
        err = -errno;
      else
        err = tgt_event_add (link->timer_fd, EPOLLIN, handle_timer, link);
    }
  if (err)
    lhb_link_close (link);
  return err;
}

void
lhb_link_close (struct lhb_link *link)
{
  tgt_remove_sched_event (&link->turn);
  close_socket (link);
  link->state = LHB_LINK_DOWN;
  if (link->timer_fd != -1)
    {
      tgt_event_del (link->timer_fd);
      close (link->timer_fd);
      link->timer_fd = -1;
    }
  free (link->path);
  link->path = NULL;
  link->known = false;
}

/* ---- Sending. */

static void
queue_to_send (struct lhb_task *task)
{
  struct lhb_link *link = task->link;

  task->sent = 0;
  task->next = NULL;
  *link->to_send_end = task;
  link->to_send_end = &task->next;
}

void
lhb_link_issue (struct lhb_task *task)
{
  struct lhb_link *link = task->link;
  uint32_t max = task->buffer ? LHB_TGT_PAYLOAD_BYTES_MAX
                              : LHB_TGT_ZERO_BYTES_MAX;

  task->length = task->left < max ? (uint32_t) task->left : max;
  lhb_put_be32 (task->header, NBD_REQUEST_MAGIC);
  lhb_put_be16 (task->header + 4, task->flags);
  lhb_put_be16 (task->header + 6, task->type);
  lhb_put_be64 (task->header + 8, (uint64_t) (task - link->tasks));
  lhb_put_be64 (task->header + 16, task->offset);
  lhb_put_be32 (task->header + 24, task->length);
  if (link->state != LHB_LINK_READY)
    return;                     /* go_up sends it with all the others */
  queue_to_send (task);
  tgt_add_sched_event (&link->turn);
}

static uint32_t
bytes_to_send (const struct lhb_task *task)
{
  return NBD_REQUEST_BYTES + (task->type == NBD_CMD_WRITE ? task->length : 0);
}

/* Gather what fits into one message. */
static unsigned
fill_iov (struct lhb_link *link, struct iovec *iov)
{
  unsigned count = 0;

  for (struct lhb_task *task = link->to_send;
       task && count + 2 <= LHB_TGT_IOV_MAX; task = task->next)
    {
      uint32_t skip = 0;

      if (task->sent < NBD_REQUEST_BYTES)
        iov[count++] = (struct iovec) {
          .iov_base = task->header + task->sent,
          .iov_len = NBD_REQUEST_BYTES - task->sent,
        };
      else
        skip = task->sent - NBD_REQUEST_BYTES;
      if (task->type == NBD_CMD_WRITE)
        iov[count++] = (struct iovec) {
          .iov_base = task->buffer + skip,
          .iov_len = task->length - skip,
        };
    }
  return count;
}

static void
retire_sent (struct lhb_link *link, size_t bytes)
{
  while (bytes)
    {
      struct lhb_task *task = link->to_send;
      uint32_t rest = bytes_to_send (task) - task->sent;

      if (bytes < rest)
        {
          task->sent += (uint32_t) bytes;
          return;
        }
      bytes -= rest;
      task->sent += rest;
      link->to_send = task->next;
      if (link->to_send == NULL)
        link->to_send_end = &link->to_send;
    }
}

static void
want_write (struct lhb_link *link, bool wanted)
{
  if (link->can_write == !wanted)
    return;
  link->can_write = !wanted;
  tgt_event_modify (link->fd, EPOLLIN | (wanted ? EPOLLOUT : 0));
}

static void
send_tasks (struct lhb_link *link)
{
  while (link->state == LHB_LINK_READY && link->to_send)
    {
      struct iovec iov[LHB_TGT_IOV_MAX];
      struct msghdr message = { .msg_iov = iov };
      ssize_t n;

      message.msg_iovlen = fill_iov (link, iov);
      n = sendmsg (link->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n == -1 && errno == EINTR)
        continue;
      if (n == -1 && errno == EAGAIN)
        {
          want_write (link, true);
          return;
        }
      if (n == -1)
        {
          go_down (link, strerror (errno));
          return;
        }
      retire_sent (link, (size_t) n);
    }
}

static void
send_greeting (struct lhb_link *link)
{
  uint32_t rest = link->greeting_bytes - link->greeting_sent;
  ssize_t n = send (link->fd, link->greeting + link->greeting_sent, rest,
                    MSG_NOSIGNAL | MSG_DONTWAIT);

  if (n == -1 && errno != EAGAIN && errno != EINTR)
    go_down (link, strerror (errno));
  else if (n > 0)
    link->greeting_sent += (uint32_t) n;
  if (link->fd != -1)
    want_write (link, link->greeting_sent < link->greeting_bytes);
}

/* A free task for the next command, if it may start now. */
static struct lhb_task *
take_task (struct lhb_link *link, const struct scsi_cmd *cmd)
{
  struct lhb_task *task = link->free;
  bool exclusive = lhb_task_is_exclusive (cmd);

  if (task == NULL || link->exclusive || (exclusive && link->in_flight))
    return NULL;
  link->free = task->next;
  link->exclusive = task->exclusive = exclusive;
  link->in_flight++;
  return task;
}

static void
answer_busy (struct lhb_link *link)
{
  for (unsigned i = 0; i < LHB_TGT_TASKS; i++)
    if (link->tasks[i].cmd)
      lhb_task_busy (&link->tasks[i]);
}

void
lhb_link_turn (struct lhb_link *link)
{
  if (link->away)
    answer_busy (link);
  while (!list_empty (&link->waiting))
    {
      struct scsi_cmd *cmd
          = list_first_entry (&link->waiting, struct scsi_cmd, bs_list);
      struct lhb_task *task = take_task (link, cmd);

      if (task == NULL)
        break;
      list_del (&cmd->bs_list);
      link->waiting_count--;
      task->cmd = cmd;
      if (link->away)
        lhb_task_busy (task);
      else
        lhb_task_start (task);
    }
  send_tasks (link);
}

/* ---- Receiving. */

/* The server has said what it serves.  Returns false if that can not be. */
static bool
take_export (struct lhb_link *link, uint64_t size, uint16_t flags)
{
  if (link->known && size < link->size)
    {
      eprintf ("lhblock: %s: it has become smaller, so it is another volume\n",
               link->export);
      return false;
    }
  link->nbd_flags = flags;
  if (link->known && size > link->size)
    {
      link->size = size;
      lhb_unit_resized (link);
    }
  link->size = size;
  return true;
}

static void
go_up (struct lhb_link *link)
{
  link->state = LHB_LINK_READY;
  link->known = true;
  link->away = false;
  if (link->timer_fd != -1)
    {
      set_timer (link, 0);
      eprintf ("lhblock: %s: connected again\n", link->export);
    }
  for (unsigned i = 0; i < LHB_TGT_TASKS; i++)
    if (link->tasks[i].cmd)
      queue_to_send (&link->tasks[i]);
  tgt_add_sched_event (&link->turn);
}

/* One reply to NBD_OPT_GO.  Returns false if the handshake has failed. */
static bool
take_option_reply (struct lhb_link *link, const uint8_t *at, uint32_t length)
{
  uint32_t type = lhb_get_be32 (at + 12);
  const uint8_t *data = at + NBD_OPTION_REPLY_BYTES;

  if (type == NBD_REP_ACK)
    {
      if (link->size == 0)
        return false;
      go_up (link);
      return true;
    }
  if (type != NBD_REP_INFO)
    {
      eprintf ("lhblock: %s: refused: %.*s\n", link->export, (int) length,
               (const char *) data);
      return false;
    }
  if (length == NBD_INFO_EXPORT_BYTES && lhb_get_be16 (data) == NBD_INFO_EXPORT)
    return take_export (link, lhb_get_be64 (data + 2),
                        lhb_get_be16 (data + 10));
  return true;
}

/* Take what is complete of the handshake.  False: it has failed. */
static bool
take_handshake (struct lhb_link *link)
{
  for (;;)
    {
      const uint8_t *at = link->received + link->head;
      uint32_t have = link->tail - link->head;
      uint32_t length;

      if (link->state == LHB_LINK_GREETING)
        {
          if (have < NBD_GREETING_BYTES)
            return true;
          if (lhb_get_be64 (at) != NBD_MAGIC
              || lhb_get_be64 (at + 8) != NBD_IHAVEOPT)
            return false;
          link->head += NBD_GREETING_BYTES;
          link->state = LHB_LINK_OPTION;
          continue;
        }
      if (link->state != LHB_LINK_OPTION || have < NBD_OPTION_REPLY_BYTES)
        return true;
      length = lhb_get_be32 (at + 16);
      if (lhb_get_be64 (at) != NBD_REP_MAGIC
          || length > LHB_TGT_OPTION_BYTES_MAX)
        return false;
      if (have < NBD_OPTION_REPLY_BYTES + length)
        return true;
      link->head += NBD_OPTION_REPLY_BYTES + length;
      if (!take_option_reply (link, at, length))
        return false;
    }
}

/* Take what is there of the payload that is coming in. */
static void
take_payload (struct lhb_link *link)
{
  struct lhb_task *task = link->reading;
  uint32_t have = link->tail - link->head;
  uint32_t rest = task->length - link->reading_got;
  uint32_t n = have < rest ? have : rest;

  memcpy (task->buffer + link->reading_got, link->received + link->head, n);
  link->head += n;
  link->reading_got += n;
  if (link->reading_got < task->length)
    return;
  link->reading = NULL;
  lhb_task_replied (task, 0);
}

/* Take all complete replies.  False: the server talks nonsense. */
static bool
take_replies (struct lhb_link *link)
{
  while (link->state == LHB_LINK_READY)
    {
      const uint8_t *at = link->received + link->head;
      struct lhb_task *task;
      uint32_t error;
      uint64_t cookie;

      if (link->reading)
        {
          if (link->head == link->tail)
            return true;
          take_payload (link);
          continue;
        }
      if (link->tail - link->head < NBD_SIMPLE_REPLY_BYTES)
        return true;
      error = lhb_get_be32 (at + 4);
      cookie = lhb_get_be64 (at + 8);
      if (lhb_get_be32 (at) != NBD_SIMPLE_REPLY_MAGIC
          || cookie >= LHB_TGT_TASKS)
        return false;
      task = &link->tasks[cookie];
      if (task->cmd == NULL || task->sent != bytes_to_send (task))
        return false;           /* nobody asked */
      if (error == NBD_ESHUTDOWN)
        return false;           /* the next connection asks again */
      link->head += NBD_SIMPLE_REPLY_BYTES;
      if (error == 0 && task->type == NBD_CMD_READ)
        {
          link->reading = task;
          link->reading_got = 0;
        }
      else
        lhb_task_replied (task, error);
    }
  return true;
}

/* Receive into the payload that is coming in, then into the buffer. */
static ssize_t
receive (struct lhb_link *link)
{
  struct iovec iov[2];
  int count = 0;
  size_t direct = 0;
  ssize_t n;

  if (link->head)
    {
      memmove (link->received, link->received + link->head,
               link->tail - link->head);
      link->tail -= link->head;
      link->head = 0;
    }
  if (link->reading)            /* then the buffer is empty */
    {
      direct = link->reading->length - link->reading_got;
      iov[count++] = (struct iovec) {
        .iov_base = link->reading->buffer + link->reading_got,
        .iov_len = direct,
      };
    }
  iov[count++] = (struct iovec) {
    .iov_base = link->received + link->tail,
    .iov_len = LHB_TGT_RECEIVE_BYTES - link->tail,
  };
  n = readv (link->fd, iov, count);
  if (n <= 0)
    return n;
  if ((size_t) n <= direct)
    link->reading_got += (uint32_t) n;
  else
    {
      link->reading_got += (uint32_t) direct;
      link->tail += (uint32_t) ((size_t) n - direct);
    }
  if (link->reading && link->reading_got == link->reading->length)
    {
      struct lhb_task *task = link->reading;

      link->reading = NULL;
      lhb_task_replied (task, 0);
    }
  return n;
}

static void
handle_readable (struct lhb_link *link)
{
  for (unsigned i = 0; i < LHB_TGT_RECEIVES_MAX && link->fd != -1; i++)
    {
      ssize_t n = receive (link);

      if (n == -1 && (errno == EAGAIN || errno == EINTR))
        return;
      if (n <= 0)
        {
          go_down (link, n ? strerror (errno) : "the engine has hung up");
          return;
        }
      if (!take_handshake (link) || !take_replies (link))
        {
          go_down (link, "the connection is of no use");
          return;
        }
      /* Nothing more was there. */
      if (n < NBD_SIMPLE_REPLY_BYTES || link->tail < LHB_TGT_RECEIVE_BYTES)
        return;
    }
}

static void
handle_socket (int fd, int events, void *data)
{
  struct lhb_link *link = data;

  (void) fd;
  if (events & EPOLLOUT)
    {
      if (link->state != LHB_LINK_READY)
        send_greeting (link);
      else
        {
          want_write (link, false);
          send_tasks (link);
        }
    }
  if (link->fd != -1 && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
    handle_readable (link);
}
