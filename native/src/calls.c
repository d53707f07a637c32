/* Requests of a thread that does not wait for them: a front end whose requests
 * come through Python, where a thread for each would cost more than the
 * request itself. */

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "lhb_queue.h"
#include "lhb_util.h"
#include "lhb_volume.h"

struct call {
  struct lhb_request request;
  struct lhb_calls *calls;
  struct call *next;            /* free, or ended and not taken */
  uint64_t tag;
  char *data;                   /* a READ through 'memory' ends here */
  char *memory;                 /* block-aligned copy, or NULL */
  bool awaited;                 /* lhb_calls_start is waiting for it */
  bool ended;
};

struct lhb_calls {
  pthread_mutex_t lock;         /* everything below, and the last two above */
  pthread_cond_t ended_cond;    /* an awaited call */
  struct call *free;
  struct call *first, **last;   /* ended, oldest first */
  int fd;                       /* eventfd: 'first' was NULL and is not */
  uint32_t in_flight;
  uint32_t calls_max;
  struct call slots[];
};

int
lhb_calls_open (uint32_t calls_max, lhb_calls **calls_out)
{
  struct lhb_calls *calls;
  pthread_condattr_t attributes;

  if (calls_max < 1 || calls_max > LHB_CALLS_MAX)
    return -EINVAL;
  calls = calloc (1, sizeof *calls + calls_max * sizeof calls->slots[0]);
  if (calls == NULL)
    return -ENOMEM;
  calls->fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (calls->fd == -1)
    {
      free (calls);
      return -errno;
    }
  lhb_mutex_init (&calls->lock);
  if (pthread_condattr_init (&attributes) != 0
      || pthread_condattr_setclock (&attributes, CLOCK_MONOTONIC) != 0
      || pthread_cond_init (&calls->ended_cond, &attributes) != 0)
    abort ();
  pthread_condattr_destroy (&attributes);
  calls->last = &calls->first;
  calls->calls_max = calls_max;
  for (uint32_t i = 0; i < calls_max; i++)
    {
      calls->slots[i].calls = calls;
      calls->slots[i].next = calls->free;
      calls->free = &calls->slots[i];
    }
  *calls_out = calls;
  return 0;
}

void
lhb_calls_close (lhb_calls *calls)
{
  /* Whoever ended the last one may still be about to drop the lock. */
  pthread_mutex_lock (&calls->lock);
  assert (calls->in_flight == 0);
  pthread_mutex_unlock (&calls->lock);
  close (calls->fd);
  pthread_cond_destroy (&calls->ended_cond);
  pthread_mutex_destroy (&calls->lock);
  free (calls);
}

int
lhb_calls_fd (const lhb_calls *calls)
{
  return calls->fd;
}

/* ---- The end of a call. */

/* Called with the lock held: the slot is free again. */
static int
take_result (struct call *call)
{
  struct lhb_calls *calls = call->calls;
  int error = call->request.error;

  call->next = calls->free;
  calls->free = call;
  calls->in_flight--;
  return error;
}

static void
call_done (struct lhb_request *request)
{
  struct call *call = lhb_container_of (request, struct call, request);
  struct lhb_calls *calls = call->calls;

  if (call->memory != NULL)
    {
      if (request->op == LHB_OP_READ && request->error == 0)
        memcpy (call->data,
                call->memory + request->offset_bytes % LHB_BLOCK_BYTES,
                request->length_bytes);
      free (call->memory);
      call->memory = NULL;
    }
  pthread_mutex_lock (&calls->lock);
  call->ended = true;
  if (call->awaited)
    pthread_cond_signal (&calls->ended_cond);
  else
    {
      if (calls->first == NULL)
        eventfd_write (calls->fd, 1);
      call->next = NULL;
      *calls->last = call;
      calls->last = &call->next;
    }
  pthread_mutex_unlock (&calls->lock);
}

int
lhb_calls_next (lhb_calls *calls, struct lhb_call_result *result_out)
{
  struct call *call;

  pthread_mutex_lock (&calls->lock);
  call = calls->first;
  if (call != NULL)
    {
      calls->first = call->next;
      if (calls->first == NULL)
        calls->last = &calls->first;
      result_out->tag = call->tag;
      result_out->error = take_result (call);
    }
  pthread_mutex_unlock (&calls->lock);
  return call != NULL;
}

/* ---- The beginning. */

static void
start_call (struct lhb_message *message)
{
  lhb_request_start (
      lhb_container_of (message, struct lhb_request, message));
}

/* Whole blocks of block-aligned memory, which the request wants. */
static int
prepare_memory (struct call *call, uint32_t flags)
{
  struct lhb_request *request = &call->request;
  uint64_t start = request->offset_bytes % LHB_BLOCK_BYTES;
  uint64_t span;
  bool is_partial;

  if (request->op != LHB_OP_READ && request->op != LHB_OP_WRITE)
    return 0;
  is_partial = lhb_request_is_partial (request->offset_bytes,
                                       request->length_bytes);
  if (!is_partial && flags & LHB_CALL_IN_PLACE)
    {
      request->buffer = call->data;
      return 0;
    }
  span = (start + request->length_bytes + LHB_BLOCK_BYTES - 1)
         / LHB_BLOCK_BYTES * LHB_BLOCK_BYTES;
  call->memory = aligned_alloc (LHB_BLOCK_BYTES, span + 2 * LHB_BLOCK_BYTES);
  if (call->memory == NULL)
    return -ENOMEM;
  request->buffer = call->memory;
  if (request->op == LHB_OP_WRITE)
    {
      request->edges = is_partial ? call->memory + span : NULL;
      memcpy (call->memory + start, call->data, request->length_bytes);
    }
  return 0;
}

/* Called with the lock held, which is dropped meanwhile. */
static bool
wait_call (struct call *call, uint64_t wait_ns)
{
  struct lhb_calls *calls = call->calls;
  uint64_t until_ns = lhb_now_ns () + wait_ns;
  struct timespec until = { .tv_sec = (time_t) (until_ns / 1000000000u),
                            .tv_nsec = (long) (until_ns % 1000000000u) };
  int err = 0;

  while (!call->ended && err == 0)
    err = pthread_cond_timedwait (&calls->ended_cond, &calls->lock, &until);
  call->awaited = false;
  return call->ended;
}

static int
check_call (const lhb_volume *volume, uint32_t op, uint64_t offset_bytes,
            uint64_t length_bytes)
{
  uint64_t size = atomic_load (&volume->size_bytes);
  bool moves = op == LHB_OP_READ || op == LHB_OP_WRITE;

  if (op > LHB_OP_ZERO || (moves && length_bytes > LHB_CALL_BYTES_MAX))
    return -EINVAL;
  if (op != LHB_OP_READ && volume->flags & LHB_VOLUME_READ_ONLY)
    return op == LHB_OP_FLUSH ? 0 : -EROFS;
  if (offset_bytes > size || length_bytes > size - offset_bytes)
    return -EINVAL;
  return 0;
}

static struct call *
take_slot (struct lhb_calls *calls)
{
  struct call *call;

  pthread_mutex_lock (&calls->lock);
  call = calls->free;
  if (call != NULL)
    {
      calls->free = call->next;
      calls->in_flight++;
    }
  pthread_mutex_unlock (&calls->lock);
  return call;
}

int
lhb_calls_start (lhb_calls *calls, lhb_volume *volume, uint32_t op,
                 uint32_t flags, uint64_t offset_bytes, uint64_t length_bytes,
                 void *data, uint64_t tag, uint64_t wait_ns)
{
  struct lhb_engine *engine = volume->engine;
  struct call *call;
  bool ended;
  int err = check_call (volume, op, offset_bytes, length_bytes);

  if (err || (op != LHB_OP_FLUSH && length_bytes == 0))
    return err ? err : 1;
  call = take_slot (calls);
  if (call == NULL)
    return -EAGAIN;
  memset (&call->request, 0, sizeof call->request);
  call->request.volume = volume;
  call->request.queue
      = engine->queues[(uintptr_t) (call - calls->slots) % engine->queue_count];
  call->request.op = op;
  call->request.flags = flags & ~(uint32_t) LHB_CALL_IN_PLACE;
  call->request.offset_bytes = offset_bytes;
  call->request.length_bytes = length_bytes;
  call->request.complete = call_done;
  call->request.message.handle = start_call;
  call->tag = tag;
  call->data = data;
  call->ended = false;
  call->awaited = wait_ns > 0;
  err = prepare_memory (call, flags);
  if (err == 0)
    lhb_queue_post (call->request.queue, &call->request.message);
  if (err == 0 && wait_ns == 0)
    return 0;
  pthread_mutex_lock (&calls->lock);
  ended = err != 0 || wait_call (call, wait_ns);
  if (ended)
    {
      if (err != 0)
        call->request.error = err;
      err = take_result (call);
    }
  pthread_mutex_unlock (&calls->lock);
  return err ? err : ended;
}
