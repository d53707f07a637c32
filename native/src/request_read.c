/* READ: the page cache, else the driver; another replica after an error. */

#include <errno.h>
#include <string.h>

#include "lhb_queue.h"
#include "lhb_request_steps.h"
#include "lhb_util.h"

/* The replica with the least reads outstanding at its disk, a peer being some
 * way behind those of this host; among equals the one that the region belongs
 * to, so that the page cache of each file holds a different part of the
 * volume. */
int
lhb_request_choose_source (const struct lhb_request *request)
{
  const struct lhb_volume *volume = request->volume;
  uint32_t count = volume->store_count;
  uint32_t preferred
      = (uint32_t) ((request->first_block >> LHB_RANGE_REGION_SHIFT) % count);
  uint64_t least = UINT64_MAX;
  int best = -1;

  for (uint32_t i = 0; i < count; i++)
    {
      uint32_t index = (preferred + i) % count;
      uint64_t outstanding;

      if (request->tried_mask & (1u << index)
          || !lhb_request_is_rw (volume, index))
        continue;
      outstanding = atomic_load_explicit (
          &volume->stores[index]->outstanding_bytes, memory_order_relaxed);
      if (volume->stores[index]->peer != NULL)
        outstanding += LHB_PEER_FARTHER_BYTES;
      if (outstanding < least)
        {
          least = outstanding;
          best = (int) index;
        }
    }
  return best;
}

void
lhb_request_end_read (struct lhb_request *request, int error)
{
  struct lhb_volume *volume = request->volume;

  if (error == 0)
    {
      /* Another replica had the data: those that failed are bad.  If none
       * has, none is dropped, and the client gets the error. */
      for (uint32_t i = 0; i < volume->store_count; i++)
        if (request->tried_mask & (1u << i) && i != request->source)
          lhb_volume_fail_store (volume, i, EIO, request->offset_bytes,
                                 request->length_bytes);
      request->error = 0;
      lhb_request_finish (request);
      return;
    }
  request->error = error;
  lhb_request_read (request);
}

static void
run_read (struct lhb_job *job)
{
  struct lhb_request *request
      = lhb_container_of (job, struct lhb_request, job);
  struct lhb_store *store = request->volume->stores[request->source];

  request->legs[0].error = lhb_store_read (
      store, request->first_block, request->block_count, request->buffer);
}

static void
handle_read_job (struct lhb_message *message)
{
  struct lhb_request *request
      = lhb_container_of (message, struct lhb_request, job.done);
  struct lhb_store *store = request->volume->stores[request->source];

  atomic_fetch_sub (&store->outstanding_bytes, request->length_bytes);
  lhb_request_end_read (request, request->legs[0].error);
}

static void
read_io_done (struct lhb_io *io)
{
  struct lhb_leg *leg = lhb_container_of (io, struct lhb_leg, io);
  struct lhb_request *request = leg->request;
  struct lhb_store *store = request->volume->stores[request->source];
  int error = 0;

  if (io->result < 0)
    leg->error = io->result;
  else if ((uint32_t) io->result != io->length_bytes)
    leg->error = -EIO;          /* the layer was cut behind our back */
  if (--request->pending > 0)
    return;
  atomic_fetch_sub (&store->outstanding_bytes, request->length_bytes);
  for (uint32_t i = 0; i < LHB_REQUEST_IOS_MAX; i++)
    if (request->legs[i].used && request->legs[i].error)
      error = request->legs[i].error;
  lhb_request_end_read (request, error);
}

/* One io for each run that has data.  False: too many runs, nothing done. */
static bool
plan_read_ios (struct lhb_request *request, struct lhb_store *store)
{
  uint64_t block = request->first_block;
  uint32_t left = request->block_count;
  char *at = request->buffer;
  uint32_t used = 0;

  for (uint32_t i = 0; i < LHB_REQUEST_IOS_MAX; i++)
    request->legs[i].used = false;
  while (left > 0)
    {
      struct lhb_run run = lhb_map_lookup (store->map, block, left);
      size_t length = (size_t) run.blocks << LHB_BLOCK_SHIFT;

      if (run.layer == LHB_MAP_ZERO)
        memset (at, 0, length);
      else
        {
          struct lhb_leg *leg;

          if (used == LHB_REQUEST_IOS_MAX)
            return false;
          leg = &request->legs[used++];
          leg->request = request;
          leg->used = true;
          leg->error = 0;
          leg->io.queue = request->queue;
          leg->io.done = read_io_done;
          leg->io.buffer = at;
          leg->io.offset_bytes = block << LHB_BLOCK_SHIFT;
          leg->io.length_bytes = (uint32_t) length;
          leg->io.fd = lhb_store_run_fd (store, run.layer);
          leg->io.op = LHB_IO_PREAD;
          leg->io.rw_flags = 0;
        }
      at += length;
      block += run.blocks;
      left -= run.blocks;
    }
  request->pending = used;
  return true;
}

/* The page cache did not have it: read without holding up the queue. */
static void
read_at_driver (struct lhb_request *request, struct lhb_store *store)
{
  lhb_count (&request->volume->counters.driver_reads, 1);
  atomic_fetch_add (&store->outstanding_bytes, request->length_bytes);
  if (!plan_read_ios (request, store))
    {
      lhb_request_submit_job (request, run_read, handle_read_job);
      return;
    }
  if (request->pending == 0)
    {
      atomic_fetch_sub (&store->outstanding_bytes, request->length_bytes);
      lhb_request_end_read (request, 0);
      return;
    }
  for (uint32_t i = 0, count = request->pending; i < count; i++)
    lhb_io_start (&request->legs[i].io);
}

void
lhb_request_read (struct lhb_request *request)
{
  int source = lhb_request_choose_source (request);
  struct lhb_store *store;
  int err = -EAGAIN;

  if (source < 0)
    {
      if (request->error == 0)
        request->error = -EIO;
      lhb_request_finish (request);
      return;
    }
  request->source = (uint32_t) source;
  request->tried_mask |= 1u << source;
  store = request->volume->stores[source];
  if (store->peer != NULL)
    {
      lhb_count (&request->volume->counters.driver_reads, 1);
      lhb_request_read_peer (request);
      return;
    }
  if (request->length_bytes <= LHB_INLINE_BYTES_MAX)
    err = lhb_store_try_read (store, request->first_block,
                              request->block_count, request->buffer);
  if (err == -EAGAIN)
    {
      read_at_driver (request, store);
      return;
    }
  lhb_count (&request->volume->counters.inline_reads, 1);
  lhb_request_end_read (request, err);
}
