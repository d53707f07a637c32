/* Sending to a peer: the frames of a turn in one sendmsg, their payload
 * straight from the requests' slabs. */

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "lhb_fault.h"
#include "lhb_peer_parts.h"

static unsigned
gather (const struct lhb_peer_connection *connection, struct iovec *iov)
{
  size_t skip = connection->sent_bytes;
  unsigned count = 0;

  for (struct lhb_peer_call *call = connection->send;
       call != NULL && count + 2 <= LHB_PEER_SEND_IOV_MAX;
       call = call->next_send)
    {
      if (skip < LHB_FRAME_BYTES)
        iov[count++]
            = (struct iovec){ call->frame + skip, LHB_FRAME_BYTES - skip };
      skip = skip > LHB_FRAME_BYTES ? skip - LHB_FRAME_BYTES : 0;
      if (call->payload_bytes > 0)
        iov[count++]
            = (struct iovec){ (char *) (uintptr_t) call->payload + skip,
                              call->payload_bytes - skip };
      skip = 0;
    }
  return count;
}

static void
retire_sent (struct lhb_peer_connection *connection, size_t sent_bytes)
{
  struct lhb_peer_counters *counters = &connection->owner->counters;

  lhb_peer_count (&counters->bytes_sent, sent_bytes);
  while (sent_bytes > 0)
    {
      struct lhb_peer_call *call = connection->send;
      size_t left = LHB_FRAME_BYTES + (size_t) call->payload_bytes
                    - connection->sent_bytes;

      if (sent_bytes < left)
        {
          connection->sent_bytes += sent_bytes;
          return;
        }
      sent_bytes -= left;
      connection->sent_bytes = 0;
      connection->send = call->next_send;
      if (connection->send == NULL)
        connection->send_tail = &connection->send;
      lhb_peer_count (&counters->frames_sent, 1);
      lhb_peer_sent (call);
    }
}

void
lhb_peer_send (struct lhb_peer_connection *connection)
{
  struct lhb_peer *peer = connection->owner->peer;

  while (connection->send != NULL && connection->writable
         && !lhb_peer_has_ended (peer))
    {
      struct iovec iov[LHB_PEER_SEND_IOV_MAX];
      struct msghdr message = { .msg_iov = iov };
      ssize_t sent;
      int err = lhb_fault (LHB_FAULT_PEER_SEND, peer->store->id);

      message.msg_iovlen = gather (connection, iov);
      sent = err ? -1
                 : sendmsg (connection->socket.fd, &message,
                            MSG_NOSIGNAL | MSG_DONTWAIT);
      if (sent >= 0)
        retire_sent (connection, (size_t) sent);
      else if (err)
        lhb_peer_end (peer, -err, LHB_PEER_END_SOCKET_ERROR);
      else if (errno == EAGAIN || errno == EWOULDBLOCK)
        connection->writable = false;
      else if (errno != EINTR)
        lhb_peer_end (peer, errno, LHB_PEER_END_SOCKET_ERROR);
    }
}
