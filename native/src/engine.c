/* The engine: queue threads, worker pool and the ring of events for Python. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "lhb_engine.h"
#include "lhb_queue.h"
#include "lhb_util.h"

static int
engine_check_options (const struct lhb_engine_options *options)
{
  if (options->queues < 1 || options->queues > LHB_QUEUES_MAX
      || options->workers_max < 1 || options->workers_max > LHB_WORKERS_MAX
      || options->driver > LHB_DRIVER_POOL || options->reserved != 0)
    return -EINVAL;
  return 0;
}

/* The driver to use, or why the one that was asked for can not be. */
static int
engine_choose_driver (uint32_t wanted)
{
  int status;

  if (wanted == LHB_DRIVER_POOL)
    return LHB_DRIVER_POOL;
  status = lhb_probe_uring ();
  if (status == 0)
    return LHB_DRIVER_URING;
  return wanted == LHB_DRIVER_AUTO ? LHB_DRIVER_POOL : status;
}

static int
engine_open_queues (struct lhb_engine *engine, uint32_t count)
{
  while (engine->queue_count < count)
    {
      uint32_t index = engine->queue_count;
      int result = lhb_queue_open (engine, index, &engine->queues[index]);

      if (result < 0)
        return result;
      engine->queue_count++;
    }
  return 0;
}

int
lhb_engine_open (const struct lhb_engine_options *options,
                 lhb_engine **engine_out)
{
  struct lhb_engine *engine;
  int result, driver;

  result = engine_check_options (options);
  if (result < 0)
    return result;
  driver = engine_choose_driver (options->driver);
  if (driver < 0)
    return driver;
  engine = calloc (1, sizeof *engine);
  if (engine == NULL)
    return -ENOMEM;
  engine->driver = (uint32_t) driver;
  pthread_mutex_init (&engine->event_lock, NULL);
  pthread_cond_init (&engine->event_room, NULL);
  lhb_mutex_init (&engine->fuse_lock);

  engine->event_fd = eventfd (0, EFD_NONBLOCK | EFD_CLOEXEC);
  result = engine->event_fd == -1 ? -errno : 0;
  if (result == 0)
    result = lhb_pool_open (options->workers_max, &engine->pool);
  if (result == 0)
    result = engine_open_queues (engine, options->queues);
  if (result < 0)
    {
      lhb_engine_close (engine);
      return result;
    }
  *engine_out = engine;
  return 0;
}

/* Also takes down what lhb_engine_open had made when it failed.  Producers are
 * let go first, so that no queue thread waits for a drain that will not come.
 * Then the pool: the volumes are closed and it has no jobs left, but a worker
 * may still be on its way out of a queue's post function.
 */
void
lhb_engine_close (lhb_engine *engine)
{
  pthread_mutex_lock (&engine->event_lock);
  engine->events_closed = 1;
  pthread_cond_broadcast (&engine->event_room);
  pthread_mutex_unlock (&engine->event_lock);

  if (engine->pool != NULL)
    lhb_pool_close (engine->pool);
  for (uint32_t i = 0; i < engine->queue_count; i++)
    lhb_queue_close (engine->queues[i]);
  if (engine->event_fd != -1)
    close (engine->event_fd);
  pthread_cond_destroy (&engine->event_room);
  pthread_mutex_destroy (&engine->event_lock);
  pthread_mutex_destroy (&engine->fuse_lock);
  free (engine);
}

int
lhb_engine_driver (const lhb_engine *engine)
{
  return (int) engine->driver;
}

uint32_t
lhb_engine_queues (const lhb_engine *engine)
{
  return engine->queue_count;
}

int
lhb_engine_event_fd (const lhb_engine *engine)
{
  return engine->event_fd;
}

/* Ids are never 0, so 0 can mean "any" or "none". */
uint64_t
lhb_engine_new_id (struct lhb_engine *engine)
{
  return atomic_fetch_add (&engine->next_id, 1) + 1;
}

void
lhb_engine_post_event (struct lhb_engine *engine,
                       const struct lhb_event *event)
{
  uint32_t slot;

  pthread_mutex_lock (&engine->event_lock);
  while (engine->event_count == LHB_EVENTS_MAX && !engine->events_closed)
    pthread_cond_wait (&engine->event_room, &engine->event_lock);
  if (!engine->events_closed)
    {
      slot = (engine->event_first + engine->event_count) % LHB_EVENTS_MAX;
      engine->events[slot] = *event;
      engine->event_count++;
      /* A counter at its limit is readable already, so EAGAIN is success. */
      eventfd_write (engine->event_fd, 1);
    }
  pthread_mutex_unlock (&engine->event_lock);
}

int
lhb_engine_next_event (lhb_engine *engine, struct lhb_event *event_out)
{
  int got = 0;

  pthread_mutex_lock (&engine->event_lock);
  if (engine->event_count > 0)
    {
      *event_out = engine->events[engine->event_first];
      engine->event_first = (engine->event_first + 1) % LHB_EVENTS_MAX;
      engine->event_count--;
      got = 1;
      pthread_cond_signal (&engine->event_room);
    }
  pthread_mutex_unlock (&engine->event_lock);
  return got;
}
