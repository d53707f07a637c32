/* Requests from a thread that waits for them: the control path and tests. */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lhb_queue.h"
#include "lhb_util.h"
#include "lhb_volume.h"

enum { PIECE_BYTES = 4 << 20 }; /* one request; keeps its claim narrow-ish */

struct call {
  struct lhb_request request;
  pthread_mutex_t lock;
  pthread_cond_t done_cond;
  bool done;
};

static void
call_done (struct lhb_request *request)
{
  struct call *call = lhb_container_of (request, struct call, request);

  pthread_mutex_lock (&call->lock);
  call->done = true;
  pthread_cond_signal (&call->done_cond);
  pthread_mutex_unlock (&call->lock);
}

static void
start_call (struct lhb_message *message)
{
  lhb_request_start (
      lhb_container_of (message, struct lhb_request, message));
}

static int
wait_call (struct call *call)
{
  call->request.complete = call_done;
  call->request.message.handle = start_call;
  lhb_queue_post (call->request.queue, &call->request.message);
  pthread_mutex_lock (&call->lock);
  while (!call->done)
    pthread_cond_wait (&call->done_cond, &call->lock);
  pthread_mutex_unlock (&call->lock);
  call->done = false;
  return call->request.error;
}

/* READ or WRITE of one piece through block-aligned memory. */
static int
transfer (struct call *call, char *data)
{
  struct lhb_request *request = &call->request;
  uint64_t start = request->offset_bytes % LHB_BLOCK_BYTES;
  uint64_t span = (start + request->length_bytes + LHB_BLOCK_BYTES - 1)
                  / LHB_BLOCK_BYTES * LHB_BLOCK_BYTES;
  bool is_write = request->op == LHB_OP_WRITE;
  char *memory = aligned_alloc (LHB_BLOCK_BYTES, span + 2 * LHB_BLOCK_BYTES);
  int err;

  if (memory == NULL)
    return -ENOMEM;
  request->buffer = memory;
  request->edges = is_write
                           && lhb_request_is_partial (request->offset_bytes,
                                                      request->length_bytes)
                       ? memory + span
                       : NULL;
  if (is_write)
    memcpy (memory + start, data, request->length_bytes);
  err = wait_call (call);
  if (err == 0 && !is_write)
    memcpy (data, memory + start, request->length_bytes);
  free (memory);
  return err;
}

/* TRIM or ZERO. */
static int
zero (struct call *call)
{
  struct lhb_request *request = &call->request;
  int err;

  request->edges = NULL;
  if (lhb_request_is_partial (request->offset_bytes, request->length_bytes))
    {
      request->edges
          = aligned_alloc (LHB_BLOCK_BYTES, 2 * LHB_BLOCK_BYTES);
      if (request->edges == NULL)
        return -ENOMEM;
    }
  err = wait_call (call);
  free (request->edges);
  return err;
}

static int
check_call (const lhb_volume *volume, uint32_t op, uint64_t offset_bytes,
            uint64_t length_bytes)
{
  uint64_t size = atomic_load (&volume->size_bytes);

  if (op > LHB_OP_ZERO)
    return -EINVAL;
  if (op != LHB_OP_READ && volume->flags & LHB_VOLUME_READ_ONLY)
    return op == LHB_OP_FLUSH ? 0 : -EROFS;
  if (offset_bytes > size || length_bytes > size - offset_bytes)
    return -EINVAL;
  return 0;
}

int
lhb_volume_io (lhb_volume *volume, uint32_t op, uint32_t flags,
               uint64_t offset_bytes, uint64_t length_bytes, void *data)
{
  struct lhb_engine *engine = volume->engine;
  struct call *call;
  char *at = data;
  int err = check_call (volume, op, offset_bytes, length_bytes);

  if (err || (op != LHB_OP_FLUSH && length_bytes == 0))
    return err;
  call = calloc (1, sizeof *call);
  if (call == NULL)
    return -ENOMEM;
  lhb_mutex_init (&call->lock);
  if (pthread_cond_init (&call->done_cond, NULL) != 0)
    abort ();
  call->request.volume = volume;
  call->request.queue = engine->queues[volume->id % engine->queue_count];
  call->request.op = op;
  call->request.flags = flags;
  if (op == LHB_OP_FLUSH)
    err = wait_call (call);
  while (err == 0 && op != LHB_OP_FLUSH && length_bytes > 0)
    {
      bool moves = op == LHB_OP_READ || op == LHB_OP_WRITE;
      uint64_t piece = moves && length_bytes > PIECE_BYTES ? PIECE_BYTES
                                                           : length_bytes;

      call->request.offset_bytes = offset_bytes;
      call->request.length_bytes = piece;
      err = moves ? transfer (call, at) : zero (call);
      offset_bytes += piece;
      length_bytes -= piece;
      at += moves ? piece : 0;
    }
  pthread_cond_destroy (&call->done_cond);
  pthread_mutex_destroy (&call->lock);
  free (call);
  return err;
}
