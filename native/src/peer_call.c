/* Calls of a peer: which frames they are, and what replies mean for them.
 *
 * A frame is put on a connection with a free slot, or waits for one.  From
 * then on its time counts.  A call that has been answered goes on with its
 * next frame, behind those that wait.
 */

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "lhb_bytes.h"
#include "lhb_peer_parts.h"
#include "lhb_request.h"
#include "lhb_util.h"

/* What a peer that knows only READ and WRITE gets for a TRIM or ZERO. */
static const char zeros[LHB_PEER_ZERO_BYTES];

/* ---- The two rings. */

static void
ring_append (struct lhb_peer_call *ring, struct lhb_peer_call *call)
{
  call->next = ring;
  call->prev = ring->prev;
  ring->prev->next = call;
  ring->prev = call;
}

static void
ring_remove (struct lhb_peer_call *call)
{
  call->prev->next = call->next;
  call->next->prev = call->prev;
}

/* ---- Frames. */

/* A piece of a TRIM or ZERO.  A plain peer gets zeros written: its own Unmap
 * would show what older layers hold. */
static void
set_zero_frame (const struct lhb_peer *peer, struct lhb_peer_call *call,
                uint64_t offset_bytes, uint64_t size_bytes)
{
  static const uint16_t zero_types[] = {
    LHB_FRAME_ZERO,
    LHB_FRAME_ZERO_NO_HOLE,
    LHB_FRAME_ZERO_FAST,
    LHB_FRAME_ZERO_FAST_NO_HOLE,
  };

  call->size_bytes = (uint32_t) size_bytes;
  lhb_put_le64 (call->frame + 10, offset_bytes);
  if (!lhb_peer_is_ours (peer))
    {
      call->type = LHB_FRAME_WRITE;
      call->payload = zeros;
      call->payload_bytes = call->size_bytes;
    }
  else if (call->op == LHB_OP_TRIM)
    call->type = LHB_FRAME_TRIM;
  else
    call->type = zero_types[(call->flags & LHB_IO_NO_HOLE ? 1 : 0)
                            + (call->flags & LHB_IO_FAST_ZERO ? 2 : 0)];
}

/* Whole blocks in steps, then the edges, then the sync: the order in which a
 * local store does it, so that equal counts mean equal content. */
static bool
plan_zero (const struct lhb_peer *peer, struct lhb_peer_call *call)
{
  const uint64_t mask = LHB_BLOCK_BYTES - 1;
  const uint64_t most
      = lhb_peer_is_ours (peer) ? LHB_ZERO_STEP_BYTES : LHB_PEER_ZERO_BYTES;
  uint64_t end = call->offset_bytes + call->length_bytes;
  uint64_t first = (call->offset_bytes + mask) & ~mask, last = end & ~mask;
  uint64_t at = first + call->done_bytes;

  if (call->stage == LHB_PEER_BODY && at < last)
    {
      call->counts = true;
      set_zero_frame (peer, call, at, last - at < most ? last - at : most);
      return true;
    }
  call->counts = false;
  if (call->stage <= LHB_PEER_HEAD && call->offset_bytes < first)
    {
      call->stage = LHB_PEER_TAIL;
      set_zero_frame (peer, call, call->offset_bytes,
                      (first < end ? first : end) - call->offset_bytes);
      return true;
    }
  /* Inside one block there is no tail. */
  if (call->stage <= LHB_PEER_TAIL && last < end && first <= last)
    {
      call->stage = LHB_PEER_SYNC;
      set_zero_frame (peer, call, last, end - last);
      return true;
    }
  if (call->stage <= LHB_PEER_SYNC && call->flags & LHB_IO_FUA
      && lhb_peer_is_ours (peer))
    {
      call->stage = LHB_PEER_OVER;
      call->type = LHB_FRAME_FLUSH;
      lhb_put_le64 (call->frame + 10, 0);
      return true;
    }
  return false;
}

static bool
plan_single (const struct lhb_peer *peer, struct lhb_peer_call *call)
{
  if (call->stage == LHB_PEER_OVER)
    return false;
  call->stage = LHB_PEER_OVER;
  if (call->op == LHB_OP_FLUSH)
    {
      call->type = LHB_FRAME_FLUSH;
      lhb_put_le64 (call->frame + 10, 0);
      return lhb_peer_is_ours (peer);
    }
  call->size_bytes = (uint32_t) call->length_bytes;
  lhb_put_le64 (call->frame + 10, call->offset_bytes);
  if (call->op == LHB_OP_READ)
    call->type = LHB_FRAME_READ;
  else if (call->op == LHB_OP_ACTIVITY)
    {
      call->type = LHB_FRAME_ACTIVITY;
      call->payload = call->buffer;
      call->payload_bytes = call->size_bytes;
      return lhb_peer_is_ours (peer);
    }
  else
    {
      call->type = call->flags & LHB_IO_FUA && lhb_peer_is_ours (peer)
                       ? LHB_FRAME_WRITE_FUA
                       : LHB_FRAME_WRITE;
      call->counts = true;
      call->payload = call->buffer;
      call->payload_bytes = call->size_bytes;
    }
  return true;
}

/* The next frame of a call; false: it was the last one. */
static bool
plan_frame (const struct lhb_peer *peer, struct lhb_peer_call *call)
{
  bool more;

  call->size_bytes = call->payload_bytes = 0;
  call->payload = NULL;
  more = call->op == LHB_OP_TRIM || call->op == LHB_OP_ZERO
             ? plan_zero (peer, call)
             : plan_single (peer, call);
  if (more)
    {
      lhb_put_le16 (call->frame, LHB_FRAME_MAGIC);
      lhb_put_le32 (call->frame + 6, call->type);
      lhb_put_le32 (call->frame + 18, call->size_bytes);
      lhb_put_le32 (call->frame + 22, call->payload_bytes);
    }
  return more;
}

/* ---- From call to connection. */

/* The connection that has the least to carry; NULL: all are full. */
static struct lhb_peer_connection *
choose_connection (struct lhb_peer_queue *owner)
{
  struct lhb_peer_connection *best = NULL;

  for (uint32_t i = 0; i < owner->connection_count; i++)
    {
      struct lhb_peer_connection *connection = owner->connections[i];

      if (connection->free_count > 0
          && (best == NULL
              || connection->outstanding_bytes < best->outstanding_bytes))
        best = connection;
    }
  return best;
}

static void
put_on_connection (struct lhb_peer_connection *connection,
                   struct lhb_peer_call *call)
{
  struct lhb_peer_queue *owner = connection->owner;
  uint32_t slot = connection->free_slots[--connection->free_count];

  assert (connection->calls[slot] == NULL);
  connection->calls[slot] = call;
  connection->outstanding_bytes += LHB_FRAME_BYTES + call->size_bytes;
  call->connection = connection;
  call->sequence = connection->next_number++ << 8 | slot;
  call->sent = call->replied = false;
  call->since_ns = lhb_now_ns ();
  lhb_put_le32 (call->frame + 2, call->sequence);
  ring_append (&owner->in_flight, call);
  lhb_peer_count (&owner->counters.in_flight, 1);
  lhb_queue_arm (owner->queue, &owner->timer,
                 call->since_ns + owner->peer->reply_timeout_ns);
  call->next_send = NULL;
  *connection->send_tail = call;
  connection->send_tail = &call->next_send;
  lhb_queue_at_turn_end (owner->queue, &connection->turn_end);
}

static void
take_off_connection (struct lhb_peer_call *call)
{
  struct lhb_peer_connection *connection = call->connection;
  uint32_t slot = call->sequence & 0xff;

  assert (connection->calls[slot] == call);
  connection->calls[slot] = NULL;
  connection->free_slots[connection->free_count++] = (uint8_t) slot;
  connection->outstanding_bytes -= LHB_FRAME_BYTES + call->size_bytes;
  ring_remove (call);
  lhb_peer_count (&connection->owner->counters.in_flight, (uint64_t) -1);
  call->connection = NULL;
}

static void
submit (struct lhb_peer_queue *owner, struct lhb_peer_call *call)
{
  struct lhb_peer_connection *connection
      = owner->waiting.next == &owner->waiting ? choose_connection (owner)
                                               : NULL;

  if (connection != NULL)
    {
      put_on_connection (connection, call);
      return;
    }
  ring_append (&owner->waiting, call);
  lhb_peer_count (&owner->counters.waiting, 1);
}

static void
submit_waiting (struct lhb_peer_queue *owner)
{
  struct lhb_peer_connection *connection;

  while (owner->waiting.next != &owner->waiting
         && (connection = choose_connection (owner)) != NULL)
    {
      struct lhb_peer_call *call = owner->waiting.next;

      ring_remove (call);
      lhb_peer_count (&owner->counters.waiting, (uint64_t) -1);
      put_on_connection (connection, call);
    }
}

/* ---- Beginning and end. */

void
lhb_peer_start (struct lhb_store *store, struct lhb_queue *queue,
                struct lhb_peer_call *call)
{
  struct lhb_peer *peer = store->peer;

  assert (call->op <= LHB_OP_ZERO || call->op == LHB_OP_ACTIVITY);
  call->error = 0;
  call->done_bytes = 0;
  call->unsure = false;
  call->connection = NULL;
  call->stage = LHB_PEER_BODY;
  call->counts = false;
  if (lhb_peer_has_ended (peer))
    call->error = -atomic_load (&peer->ended);
  else if (call->flags & LHB_IO_FAST_ZERO && call->op == LHB_OP_ZERO
           && !lhb_peer_is_ours (peer))
    call->error = -EOPNOTSUPP;
  if (call->error == 0 && plan_frame (peer, call))
    submit (&peer->queues[lhb_queue_index (queue)], call);
  else
    call->done (call);
}

/* What an error leaves behind.  A peer of ours says it. */
static void
note_error (const struct lhb_peer *peer, struct lhb_peer_call *call, int error,
            uint32_t size_bytes)
{
  call->error = error;
  if (call->type == LHB_FRAME_READ)
    return;
  if (!lhb_peer_is_ours (peer) || call->type == LHB_FRAME_FLUSH
      || size_bytes > call->size_bytes)
    call->unsure = true;
  else if (call->counts)
    call->done_bytes += size_bytes;
}

/* The frame was sent and answered: the next one, or the end. */
static void
advance (struct lhb_peer_call *call)
{
  struct lhb_peer_queue *owner = call->connection->owner;
  bool more;

  take_off_connection (call);
  more = call->error == 0 && plan_frame (owner->peer, call);
  if (more)
    submit (owner, call);
  submit_waiting (owner);
  if (!more)
    call->done (call);
}

void
lhb_peer_sent (struct lhb_peer_call *call)
{
  call->sent = true;
  if (call->replied)
    advance (call);
}

void
lhb_peer_replied (struct lhb_peer_call *call, int error, uint32_t size_bytes)
{
  struct lhb_peer_queue *owner = call->connection->owner;

  if (error)
    {
      lhb_peer_count (&owner->counters.errors, 1);
      note_error (owner->peer, call, error, size_bytes);
    }
  else if (call->counts)
    call->done_bytes += call->size_bytes;
  if (call->sent)
    advance (call);
  else
    call->replied = true;       /* its buffer is still being read */
}

static void
drop_ring (struct lhb_peer_call *ring, _Atomic uint64_t *counter, int error)
{
  struct lhb_peer_call *call;

  while ((call = ring->next) != ring)
    {
      ring_remove (call);
      lhb_peer_count (counter, (uint64_t) -1);
      call->unsure = true;
      call->error = error;
      call->done (call);
    }
}

void
lhb_peer_drop_calls (struct lhb_peer_queue *owner, int error)
{
  drop_ring (&owner->in_flight, &owner->counters.in_flight, error);
  drop_ring (&owner->waiting, &owner->counters.waiting, error);
}

void
lhb_peer_timer_fired (struct lhb_timer *timer)
{
  struct lhb_peer_queue *owner
      = lhb_container_of (timer, struct lhb_peer_queue, timer);
  struct lhb_peer *peer = owner->peer;
  struct lhb_peer_call *oldest = owner->in_flight.next;

  if (oldest == &owner->in_flight)
    return;                     /* armed again by the next frame */
  if (lhb_now_ns () - oldest->since_ns >= peer->reply_timeout_ns)
    {
      lhb_peer_count (&owner->counters.timeouts, 1);
      lhb_peer_end (peer, ETIMEDOUT, LHB_PEER_END_TIMEOUT);
    }
  else
    lhb_queue_arm (owner->queue, timer,
                   oldest->since_ns + peer->reply_timeout_ns);
}
