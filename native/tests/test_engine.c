/* The engine: options, drivers and the ring of events. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "lhb_engine.h"
#include "lhb_test.h"

static struct lhb_engine_options
make_options (uint32_t queues, uint32_t workers_max, uint32_t driver)
{
  return (struct lhb_engine_options) {
    .queues = queues, .workers_max = workers_max, .driver = driver,
  };
}

static lhb_engine *
open_engine (uint32_t driver)
{
  struct lhb_engine_options options = make_options (2, 4, driver);
  lhb_engine *engine;

  CHECK_EQUAL (lhb_engine_open (&options, &engine), 0);
  return engine;
}

static void
wrong_options_are_refused (void)
{
  struct lhb_engine_options wrong[] = {
    make_options (0, 1, LHB_DRIVER_POOL), make_options (65, 1, LHB_DRIVER_POOL),
    make_options (1, 0, LHB_DRIVER_POOL), make_options (1, 65, LHB_DRIVER_POOL),
    make_options (1, 1, 3),
    { .queues = 1, .workers_max = 1, .reserved = 1 },
  };
  lhb_engine *engine;

  for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
    CHECK_EQUAL (lhb_engine_open (&wrong[i], &engine), -EINVAL);
}

static void
largest_engine_opens_and_closes (void)
{
  struct lhb_engine_options options = make_options (64, 64, LHB_DRIVER_AUTO);
  lhb_engine *engine;

  CHECK_EQUAL (lhb_engine_open (&options, &engine), 0);
  lhb_engine_close (engine);
}

static void
driver_is_what_was_asked_or_what_the_probe_allows (void)
{
  struct lhb_engine_options uring = make_options (1, 1, LHB_DRIVER_URING);
  int probed = lhb_probe_uring ();
  lhb_engine *engine;

  engine = open_engine (LHB_DRIVER_POOL);
  CHECK_EQUAL (lhb_engine_driver (engine), LHB_DRIVER_POOL);
  lhb_engine_close (engine);

  engine = open_engine (LHB_DRIVER_AUTO);
  CHECK_EQUAL (lhb_engine_driver (engine),
               probed == 0 ? LHB_DRIVER_URING : LHB_DRIVER_POOL);
  lhb_engine_close (engine);

  CHECK_EQUAL (lhb_engine_open (&uring, &engine), probed);
  if (probed == 0)
    {
      CHECK_EQUAL (lhb_engine_driver (engine), LHB_DRIVER_URING);
      lhb_engine_close (engine);
    }
}

static void
ids_are_unique_and_never_zero (void)
{
  lhb_engine *engine = open_engine (LHB_DRIVER_POOL);
  uint64_t first = lhb_engine_new_id (engine);

  CHECK (first != 0);
  CHECK (lhb_engine_new_id (engine) > first);
  lhb_engine_close (engine);
}

static struct lhb_event
make_event (uint64_t number)
{
  return (struct lhb_event) {
    .type = LHB_EVENT_STORE_FAILED, .error = EIO, .volume_id = 3,
    .subject_id = number, .offset_bytes = number * 2, .length_bytes = 1,
  };
}

static void
event_makes_the_fd_readable_and_comes_out_whole (void)
{
  lhb_engine *engine = open_engine (LHB_DRIVER_POOL);
  int fd = lhb_engine_event_fd (engine);
  struct lhb_event event = make_event (7), got;
  eventfd_t value;

  CHECK (fcntl (fd, F_GETFD) & FD_CLOEXEC);
  CHECK_EQUAL (lhb_engine_next_event (engine, &got), 0);
  CHECK_EQUAL (eventfd_read (fd, &value), -1);
  CHECK_EQUAL (errno, EAGAIN);
  lhb_engine_post_event (engine, &event);
  CHECK_EQUAL (eventfd_read (fd, &value), 0);
  CHECK_EQUAL (lhb_engine_next_event (engine, &got), 1);
  CHECK_EQUAL (got.type, LHB_EVENT_STORE_FAILED);
  CHECK_EQUAL (got.error, EIO);
  CHECK_EQUAL (got.volume_id, 3);
  CHECK_EQUAL (got.subject_id, 7);
  CHECK_EQUAL (got.offset_bytes, 14);
  CHECK_EQUAL (lhb_engine_next_event (engine, &got), 0);
  lhb_engine_close (engine);
}

/* Three rings and a bit, so the ring is full for most of it. */
#define EVENTS (3 * LHB_EVENTS_MAX + 5)

static void *
post_many (void *argument)
{
  for (uint64_t i = 0; i < EVENTS; i++)
    {
      struct lhb_event event = make_event (i);

      lhb_engine_post_event (argument, &event);
    }
  return NULL;
}

static void
full_ring_holds_the_producer_and_loses_nothing (void)
{
  lhb_engine *engine = open_engine (LHB_DRIVER_POOL);
  int fd = lhb_engine_event_fd (engine);
  pthread_t thread;
  uint64_t seen = 0;

  CHECK_EQUAL (fcntl (fd, F_SETFL, 0), 0);         /* now reading waits */
     CHECK_EQUAL (pthread_create (&thread, NULL, post_many, engine), 0);
  while (seen < EVENTS)
    {
      struct lhb_event got;
      eventfd_t value;

      CHECK_EQUAL (eventfd_read (fd, &value), 0);
      while (lhb_engine_next_event (engine, &got) == 1)
        CHECK_EQUAL (got.subject_id, seen++);
    }
  CHECK_EQUAL (pthread_join (thread, NULL), 0);
  lhb_engine_close (engine);
}

struct posting_job {
  struct lhb_job job;                   /* first */
  lhb_engine *engine;
  sem_t started;
};

static void
posting_run (struct lhb_job *job)
{
  struct posting_job *posting = (struct posting_job *) job;

  sem_post (&posting->started);
  post_many (posting->engine);
}

static void
posting_done (struct lhb_message *message)
{
  (void) message;
}

/* Nobody drains, and the worker posts more than there is room for. */
static void
close_lets_go_a_producer_that_waits_for_room (void)
{
  lhb_engine *engine = open_engine (LHB_DRIVER_POOL);
  struct posting_job posting = { .engine = engine };

  posting.job.run = posting_run;
  posting.job.done.handle = posting_done;
  CHECK_EQUAL (sem_init (&posting.started, 0, 0), 0);
  lhb_pool_submit (engine->pool, &posting.job);
  CHECK_EQUAL (sem_wait (&posting.started), 0);
  lhb_engine_close (engine);
  sem_destroy (&posting.started);
}

static const struct lhb_test tests[] = {
  LHB_TEST (wrong_options_are_refused),
  LHB_TEST (largest_engine_opens_and_closes),
  LHB_TEST (driver_is_what_was_asked_or_what_the_probe_allows),
  LHB_TEST (ids_are_unique_and_never_zero),
  LHB_TEST (event_makes_the_fd_readable_and_comes_out_whole),
  LHB_TEST (full_ring_holds_the_producer_and_loses_nothing),
  LHB_TEST (close_lets_go_a_producer_that_waits_for_room),
};

LHB_TEST_MAIN (tests)
