/* Requests to peers: what a leg asks for, reads, and the edges of writes. */

#include <errno.h>

#include "lhb_request_steps.h"

void
lhb_leg_start_call (struct lhb_leg *leg, uint32_t index, uint32_t op,
                    void (*done) (struct lhb_peer_call *call))
{
  struct lhb_request *request = leg->request;
  struct lhb_peer_call *call = &leg->call;

  call->done = done;
  call->op = op;
  call->flags = request->flags;
  call->buffer = request->buffer;
  if (op == LHB_OP_WRITE)       /* widened: whole blocks */
    {
      call->offset_bytes = request->first_block << LHB_BLOCK_SHIFT;
      call->length_bytes = (uint64_t) request->block_count << LHB_BLOCK_SHIFT;
    }
  else
    {
      call->offset_bytes = request->offset_bytes;
      call->length_bytes = request->length_bytes;
      if (op == LHB_OP_READ)
        call->buffer += request->offset_bytes % LHB_BLOCK_BYTES;
    }
  if (op == LHB_OP_TRIM || op == LHB_OP_ZERO)
    {
      call->offset_bytes = request->zero_offset_bytes;
      call->length_bytes = request->zero_length_bytes;
    }
  lhb_peer_start (request->volume->stores[index], request->queue, call);
}

/* ---- Reads. */

static void
read_done (struct lhb_peer_call *call)
{
  struct lhb_request *request = lhb_leg_of_call (call)->request;
  struct lhb_store *store = request->volume->stores[request->source];

  atomic_fetch_sub (&store->outstanding_bytes, request->length_bytes);
  lhb_request_end_read (request, call->error);
}

void
lhb_request_read_peer (struct lhb_request *request)
{
  struct lhb_store *store = request->volume->stores[request->source];

  atomic_fetch_add (&store->outstanding_bytes, request->length_bytes);
  request->legs[0].request = request;
  lhb_leg_start_call (&request->legs[0], request->source, LHB_OP_READ,
                      read_done);
}

/* ---- Edges: the first and the last block, in the first two legs. */

static void
edge_done (struct lhb_peer_call *call)
{
  struct lhb_leg *leg = lhb_leg_of_call (call);
  struct lhb_request *request = leg->request;

  if (leg->error)
    request->error = leg->error;
  if (--request->pending > 0)
    return;
  if (request->error)
    lhb_request_read_peer_edges (request);      /* from another one */
  else
    lhb_request_edges_read (request);
}

static void
start_edge (struct lhb_request *request, uint32_t index, uint64_t block)
{
  struct lhb_leg *leg = &request->legs[index];

  leg->request = request;
  leg->call.done = edge_done;
  leg->call.op = LHB_OP_READ;
  leg->call.flags = 0;
  leg->call.offset_bytes = block << LHB_BLOCK_SHIFT;
  leg->call.length_bytes = LHB_BLOCK_BYTES;
  leg->call.buffer = request->edges + (size_t) index * LHB_BLOCK_BYTES;
  lhb_peer_start (request->volume->stores[request->source], request->queue,
                  &leg->call);
}

/* A replica that cannot be read is not dropped for this: if it is bad, its
 * write or a client's read will tell. */
void
lhb_request_read_peer_edges (struct lhb_request *request)
{
  int source = lhb_request_choose_source (request);

  if (source < 0)
    {
      if (request->error == 0)
        request->error = -EIO;
      lhb_request_finish (request);
      return;
    }
  request->source = (uint32_t) source;
  request->tried_mask |= 1u << source;
  request->error = 0;
  request->pending = 2;
  start_edge (request, 0, request->first_block);
  start_edge (request, 1, request->claim.last_block);
}
