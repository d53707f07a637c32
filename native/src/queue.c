/* Queue: one thread that waits in epoll, drains what is ready, and sends at
 * the end of the turn what the turn gathered.
 *
 * A turn is: every ready socket, ring and wake-up; then the messages; then the
 * gathered writes; then the turn ends; then the submission of new I/O.
 * Everything that a turn made possible for itself (a message to its own queue,
 * a turn end that asked for another) is done before the thread sleeps again.
 */

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "lhb_batch.h"
#include "lhb_queue.h"
#include "lhb_util.h"

struct message_list {
  struct lhb_message *first;
  struct lhb_message **tail;
};

struct lhb_queue {
  struct lhb_engine *engine;
  uint32_t index;
  pthread_t thread;
  int epoll_fd, wake_fd;
  struct lhb_pollable wake, ring;
  struct lhb_batches *batches;
  struct lhb_uring *uring;      /* NULL: every io goes to the pool */
  bool stopping;                /* own thread only */
  struct lhb_message stop;

  struct message_list local;    /* posted by the queue's own thread */
  struct lhb_turn_end *turn_ends;
  struct lhb_timer *timers;     /* in no order: there are few */
  uint64_t next_deadline_ns;    /* of them, or earlier; UINT64_MAX: none */

  pthread_mutex_t lock;         /* the two below */
  struct message_list inbox;
  bool signalled;               /* wake_fd is already readable */
};

static _Thread_local struct lhb_queue *current_queue;

static void
list_init (struct message_list *list)
{
  list->first = NULL;
  list->tail = &list->first;
}

static void
list_append (struct message_list *list, struct lhb_message *message)
{
  message->next = NULL;
  *list->tail = message;
  list->tail = &message->next;
}

static struct lhb_message *
list_take_all (struct message_list *list)
{
  struct lhb_message *first = list->first;

  list_init (list);
  return first;
}

struct lhb_batches *
lhb_queue_batches (struct lhb_queue *queue)
{
  return queue->batches;
}

struct lhb_engine *
lhb_queue_engine (struct lhb_queue *queue)
{
  return queue->engine;
}

uint32_t
lhb_queue_index (const struct lhb_queue *queue)
{
  return queue->index;
}

void
lhb_queue_post (struct lhb_queue *queue, struct lhb_message *message)
{
  const uint64_t one = 1;
  bool wake;

  if (queue == current_queue)
    {
      list_append (&queue->local, message);
      return;
    }
  pthread_mutex_lock (&queue->lock);
  list_append (&queue->inbox, message);
  wake = !queue->signalled;
  queue->signalled = true;
  pthread_mutex_unlock (&queue->lock);
  if (wake && write (queue->wake_fd, &one, sizeof one) != sizeof one)
    abort ();                   /* an eventfd at 1 takes another 1 */
}

void
lhb_queue_at_turn_end (struct lhb_queue *queue, struct lhb_turn_end *turn_end)
{
  assert (queue == current_queue);
  if (turn_end->asked)
    return;
  turn_end->asked = 1;
  turn_end->next = queue->turn_ends;
  queue->turn_ends = turn_end;
}

/* ---- Timers. */

void
lhb_queue_arm (struct lhb_queue *queue, struct lhb_timer *timer,
               uint64_t deadline_ns)
{
  assert (queue == current_queue);
  if (timer->armed)
    return;
  timer->armed = true;
  timer->deadline_ns = deadline_ns;
  timer->prev = NULL;
  timer->next = queue->timers;
  if (timer->next != NULL)
    timer->next->prev = timer;
  queue->timers = timer;
  if (deadline_ns < queue->next_deadline_ns)
    queue->next_deadline_ns = deadline_ns;
}

void
lhb_queue_disarm (struct lhb_queue *queue, struct lhb_timer *timer)
{
  assert (queue == current_queue);
  if (!timer->armed)
    return;
  timer->armed = false;
  if (timer->prev != NULL)
    timer->prev->next = timer->next;
  else
    queue->timers = timer->next;
  if (timer->next != NULL)
    timer->next->prev = timer->prev;
}

/* One timer fires in a pass, for it may arm and disarm others. */
static bool
fire_one_timer (struct lhb_queue *queue, uint64_t now_ns)
{
  struct lhb_timer *timer;

  queue->next_deadline_ns = UINT64_MAX;
  for (timer = queue->timers; timer != NULL; timer = timer->next)
    {
      if (timer->deadline_ns <= now_ns)
        {
          lhb_queue_disarm (queue, timer);
          queue->next_deadline_ns = 0;  /* look again */
          timer->fire (timer);
          return true;
        }
      if (timer->deadline_ns < queue->next_deadline_ns)
        queue->next_deadline_ns = timer->deadline_ns;
    }
  return false;
}

static void
fire_timers (struct lhb_queue *queue)
{
  uint64_t now_ns;

  if (queue->next_deadline_ns == UINT64_MAX)
    return;
  now_ns = lhb_now_ns ();
  while (queue->next_deadline_ns <= now_ns && fire_one_timer (queue, now_ns))
    ;
}

/* How long epoll may sleep: rounded up, so that it is not woken too early. */
static int
sleep_ms (const struct lhb_queue *queue, uint64_t worked_at_ns)
{
  bool in_flight = queue->uring != NULL
                   && lhb_uring_in_flight (queue->uring) > 0;
  uint64_t awake_ns = in_flight ? LHB_AWAKE_IN_FLIGHT_NS : LHB_AWAKE_NS;
  uint64_t now_ns = lhb_now_ns (), ms;

  if (now_ns - worked_at_ns < awake_ns || queue->next_deadline_ns <= now_ns)
    return 0;
  if (queue->next_deadline_ns == UINT64_MAX)
    return -1;
  ms = (queue->next_deadline_ns - now_ns + 999999) / 1000000;
  return ms < INT_MAX ? (int) ms : INT_MAX;
}

static int
control (struct lhb_queue *queue, int operation,
         struct lhb_pollable *pollable, uint32_t epoll_events)
{
  struct epoll_event event = { .events = epoll_events, .data.ptr = pollable };

  return epoll_ctl (queue->epoll_fd, operation, pollable->fd, &event) == -1
             ? -errno
             : 0;
}

int
lhb_queue_watch (struct lhb_queue *queue, struct lhb_pollable *pollable,
                 uint32_t epoll_events)
{
  return control (queue, EPOLL_CTL_ADD, pollable, epoll_events);
}

void
lhb_queue_unwatch (struct lhb_queue *queue, struct lhb_pollable *pollable)
{
  (void) control (queue, EPOLL_CTL_DEL, pollable, 0);
}

static void
wake_ready (struct lhb_pollable *self, uint32_t epoll_events)
{
  uint64_t count;

  (void) epoll_events;
  /* Cleared before the inbox is read, so no message is left behind. */
  if (read (self->fd, &count, sizeof count) == -1 && errno != EAGAIN)
    abort ();
}

static void
ring_ready (struct lhb_pollable *self, uint32_t epoll_events)
{
  struct lhb_queue *queue = lhb_container_of (self, struct lhb_queue, ring);

  (void) epoll_events;
  lhb_uring_reap (queue->uring);
}

static void
handle_messages (struct lhb_message *message)
{
  while (message != NULL)
    {
      struct lhb_message *next = message->next;

      message->handle (message);
      message = next;
    }
}

static void
take_inbox (struct lhb_queue *queue)
{
  struct lhb_message *messages;

  pthread_mutex_lock (&queue->lock);
  messages = list_take_all (&queue->inbox);
  queue->signalled = false;
  pthread_mutex_unlock (&queue->lock);
  handle_messages (messages);
}

static void
run_turn_ends (struct lhb_queue *queue)
{
  struct lhb_turn_end *turn_end = queue->turn_ends;

  queue->turn_ends = NULL;
  while (turn_end != NULL)
    {
      struct lhb_turn_end *next = turn_end->next;

      turn_end->asked = 0;
      turn_end->run (turn_end);
      turn_end = next;
    }
}

static void *
queue_main (void *argument)
{
  struct lhb_queue *queue = argument;
  struct epoll_event events[LHB_EPOLL_EVENTS];

  uint64_t worked_at_ns = 0;

  current_queue = queue;
  while (!queue->stopping)
    {
      bool busy = queue->local.first != NULL || queue->turn_ends != NULL
                  || lhb_batches_pending (queue->batches)
                  || (queue->uring != NULL
                      && lhb_uring_unsubmitted (queue->uring) > 0);
      int count = epoll_wait (queue->epoll_fd, events, LHB_EPOLL_EVENTS,
                              busy ? 0 : sleep_ms (queue, worked_at_ns));

      if (count == -1 && errno != EINTR)
        abort ();
      for (int i = 0; i < count; i++)
        {
          struct lhb_pollable *pollable = events[i].data.ptr;

          pollable->ready (pollable, events[i].events);
        }
      if (count > 0)
        {
          take_inbox (queue);
          worked_at_ns = lhb_now_ns ();
        }
      else if (!busy)
        (void) sched_yield ();  /* to whom this thread may be waiting for */
      fire_timers (queue);
      handle_messages (list_take_all (&queue->local));
      lhb_batches_run (queue->batches);
      handle_messages (list_take_all (&queue->local));
      run_turn_ends (queue);
      /* Last: turn ends start requests, too.  What the kernel does not take
       * now is offered again in the next turn. */
      if (queue->uring != NULL)
        (void) lhb_uring_submit (queue->uring);
    }
  return NULL;
}

static void
handle_stop (struct lhb_message *message)
{
  struct lhb_queue *queue = lhb_container_of (message, struct lhb_queue, stop);

  queue->stopping = true;
}

static void
release (struct lhb_queue *queue)
{
  if (queue->uring != NULL)
    lhb_uring_close (queue->uring);
  lhb_batches_close (queue->batches);
  if (queue->wake_fd >= 0)
    close (queue->wake_fd);
  if (queue->epoll_fd >= 0)
    close (queue->epoll_fd);
  pthread_mutex_destroy (&queue->lock);
  free (queue);
}

static int
open_fds (struct lhb_queue *queue)
{
  int err = 0;

  queue->epoll_fd = epoll_create1 (EPOLL_CLOEXEC);
  queue->wake_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (queue->epoll_fd == -1 || queue->wake_fd == -1)
    return -errno;
  queue->wake.fd = queue->wake_fd;
  queue->wake.ready = wake_ready;
  err = lhb_queue_watch (queue, &queue->wake, EPOLLIN);
  if (err || queue->engine->driver != LHB_DRIVER_URING)
    return err;
  err = lhb_uring_open (LHB_URING_ENTRIES, &queue->uring);
  if (err)
    return err;
  queue->ring.fd = lhb_uring_fd (queue->uring);
  queue->ring.ready = ring_ready;
  return lhb_queue_watch (queue, &queue->ring, EPOLLIN);
}

/* All signals stay with the Python threads. */
static int
start_thread (struct lhb_queue *queue, uint32_t index)
{
  sigset_t all, before;
  char name[16];
  int err;

  sigfillset (&all);
  pthread_sigmask (SIG_SETMASK, &all, &before);
  err = pthread_create (&queue->thread, NULL, queue_main, queue);
  pthread_sigmask (SIG_SETMASK, &before, NULL);
  if (err)
    return -err;
  snprintf (name, sizeof name, "lhb-queue-%u", index % 1000);
  pthread_setname_np (queue->thread, name);
  return 0;
}

int
lhb_queue_open (struct lhb_engine *engine, uint32_t index,
                struct lhb_queue **queue_out)
{
  struct lhb_queue *queue = calloc (1, sizeof *queue);
  int err;

  if (queue == NULL)
    return -ENOMEM;
  queue->engine = engine;
  queue->index = index;
  queue->next_deadline_ns = UINT64_MAX;
  queue->epoll_fd = queue->wake_fd = -1;
  queue->stop.handle = handle_stop;
  list_init (&queue->local);
  list_init (&queue->inbox);
  lhb_mutex_init (&queue->lock);
  err = open_fds (queue);
  if (err == 0)
    err = lhb_batches_open (queue, &queue->batches);
  if (err == 0)
    err = start_thread (queue, index);
  if (err)
    {
      release (queue);
      return err;
    }
  *queue_out = queue;
  return 0;
}

void
lhb_queue_close (struct lhb_queue *queue)
{
  lhb_queue_post (queue, &queue->stop);
  if (pthread_join (queue->thread, NULL) != 0)
    abort ();
  release (queue);
}

static void
run_io (struct lhb_job *job)
{
  lhb_io_execute (lhb_container_of (job, struct lhb_io, job));
}

static void
handle_io_done (struct lhb_message *message)
{
  struct lhb_io *io = lhb_container_of (message, struct lhb_io, job.done);

  io->done (io);
}

void
lhb_io_start (struct lhb_io *io)
{
  struct lhb_queue *queue = io->queue;

  assert (queue == current_queue);
  if (queue->uring != NULL && lhb_uring_prepare (queue->uring, io) == 0)
    return;
  io->job.run = run_io;
  io->job.done.handle = handle_io_done;
  io->job.queue = queue;
  lhb_pool_submit (queue->engine->pool, &io->job);
}
