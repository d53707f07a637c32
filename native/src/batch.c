/* Write batches; see lhb_batch.h. */

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "lhb_batch.h"
#include "lhb_queue.h"
#include "lhb_request.h"
#include "lhb_util.h"

enum {
  LEGS_MAX = 512,               /* of one batch */
  BATCHES = 4,                  /* of one queue, under way at one time */
  HELPERS_MAX = 3,              /* workers of one batch */
  LEGS_PER_HELPER = 12,         /* a worker is woken for at least so many */
};

struct helper {
  struct lhb_job job;
  struct batch *batch;
};

struct batch {
  struct lhb_batches *owner;
  struct batch *next_free;
  struct lhb_leg *legs[LEGS_MAX];
  uint32_t count;
  _Atomic uint32_t next;        /* the next leg to take */
  _Atomic uint32_t left;        /* legs not done yet */
  _Atomic uint32_t users;       /* threads that may still look at this, and
                                   the message 'finished' */
  struct lhb_message finished;  /* all legs are done */
  struct lhb_message unused;    /* no thread looks at it any more */
  struct helper helpers[HELPERS_MAX];
};

struct lhb_batches {
  struct lhb_queue *queue;
  uint32_t helpers_max;
  struct batch *gathering;      /* NULL: none was free */
  struct batch *free;
  struct batch batches[BATCHES];
};

static void
handle_unused (struct lhb_message *message)
{
  struct batch *batch = lhb_container_of (message, struct batch, unused);

  batch->next_free = batch->owner->free;
  batch->owner->free = batch;
}

static void
leave (struct batch *batch)
{
  if (atomic_fetch_sub (&batch->users, 1) == 1)
    lhb_queue_post (batch->owner->queue, &batch->unused);
}

static void
handle_finished (struct lhb_message *message)
{
  struct batch *batch = lhb_container_of (message, struct batch, finished);

  for (uint32_t i = 0; i < batch->count; i++)
    lhb_leg_done (batch->legs[i]);
  leave (batch);
}

/* Take legs until none is left.  The thread that does the last one tells the
 * queue. */
static void
work (struct batch *batch)
{
  struct lhb_queue *queue = batch->owner->queue;
  uint32_t index;

  while ((index = atomic_fetch_add (&batch->next, 1)) < batch->count)
    {
      lhb_leg_write (batch->legs[index]);
      if (atomic_fetch_sub (&batch->left, 1) == 1)
        lhb_queue_post (queue, &batch->finished);
    }
  leave (batch);
}

static void
run_helper (struct lhb_job *job)
{
  /* Nothing: the work is in the completion, after which the pool no longer
   * looks at the job and the batch may be used again. */
  (void) job;
}

static void
help (struct lhb_message *message)
{
  work (lhb_container_of (message, struct helper, job.done)->batch);
}

int
lhb_batches_open (struct lhb_queue *queue, struct lhb_batches **out)
{
  struct lhb_batches *batches = calloc (1, sizeof *batches);
  long cpus = sysconf (_SC_NPROCESSORS_ONLN);

  if (batches == NULL)
    return -ENOMEM;
  batches->queue = queue;
  batches->helpers_max = cpus > HELPERS_MAX ? HELPERS_MAX
                         : cpus > 1         ? (uint32_t) cpus - 1
                                            : 0;
  for (int i = 0; i < BATCHES; i++)
    {
      struct batch *batch = &batches->batches[i];

      batch->owner = batches;
      batch->finished.handle = handle_finished;
      batch->unused.handle = handle_unused;
      for (int h = 0; h < HELPERS_MAX; h++)
        {
          batch->helpers[h].batch = batch;
          batch->helpers[h].job.run = run_helper;
          batch->helpers[h].job.done.handle = help;
        }
      handle_unused (&batch->unused);
    }
  *out = batches;
  return 0;
}

void
lhb_batches_close (struct lhb_batches *batches)
{
  assert (batches == NULL || !lhb_batches_pending (batches));
  free (batches);
}

bool
lhb_batches_pending (const struct lhb_batches *batches)
{
  return batches->gathering != NULL && batches->gathering->count > 0;
}

bool
lhb_batches_add (struct lhb_batches *batches, struct lhb_leg *leg)
{
  struct batch *batch = batches->gathering;

  if (batch == NULL)
    {
      batch = batches->free;
      if (batch == NULL)
        return false;
      batches->free = batch->next_free;
      batch->count = 0;
      batches->gathering = batch;
    }
  if (batch->count == LEGS_MAX)
    return false;
  batch->legs[batch->count++] = leg;
  return true;
}

void
lhb_batches_run (struct lhb_batches *batches)
{
  struct batch *batch = batches->gathering;
  uint32_t helpers;

  if (!lhb_batches_pending (batches))
    return;
  batches->gathering = NULL;
  helpers = batch->count / LEGS_PER_HELPER;
  if (helpers > batches->helpers_max)
    helpers = batches->helpers_max;
  atomic_store (&batch->next, 0);
  atomic_store (&batch->left, batch->count);
  atomic_store (&batch->users, helpers + 2);
  for (uint32_t i = 0; i < helpers; i++)
    lhb_pool_submit (lhb_queue_engine (batches->queue)->pool,
                     &batch->helpers[i].job);
  work (batch);
}
