/* The backing store `lhblock` of tgtd: a logical unit is an NBD export of a
 * running engine, reached over its Unix socket.
 *
 * Everything runs on the one thread of tgtd, in its event loop, so nothing
 * here is locked.  A command is a task: one NBD request after another until
 * it is done, many commands at a time.
 */
#ifndef LHB_TGT_H
#define LHB_TGT_H

#include <stdbool.h>
#include <stdint.h>

#include "list.h"
#include "util.h"
#include "tgtd.h"
#include "scsi.h"
#include "spc.h"

#include "lhb_nbd.h"

#define LHB_TGT_TASKS 128               /* requests in flight of a unit */
#define LHB_TGT_RECEIVE_BYTES (256u << 10)
#define LHB_TGT_IOV_MAX 64
#define LHB_TGT_RECEIVES_MAX 8          /* of a unit before others get a turn */
/* What a server has to take, by the NBD specification. */
#define LHB_TGT_PAYLOAD_BYTES_MAX (32u << 20)
#define LHB_TGT_ZERO_BYTES_MAX (1u << 30)
#define LHB_TGT_PATTERN_BYTES (1u << 20)        /* of WRITE SAME, at a time */
#define LHB_TGT_NAME_BYTES_MAX 256
#define LHB_TGT_OPTION_BYTES_MAX 4096           /* of a reply to an option */
#define LHB_TGT_BLOCK_BYTES 4096                /* of the engine */
#define LHB_TGT_HANDSHAKE_NS 5000000000ull
#define LHB_TGT_RETRY_NS 100000000ull
#define LHB_TGT_RETRY_FIRST_NS 1000000ull
/* How long commands wait for an engine that is away before they are answered
 * BUSY.  Initiators give a command 30 s, and then abort it. */
#define LHB_TGT_AWAY_S 20
#define LHB_TGT_AWAY_S_MAX 3600

struct lhb_link;
struct lhb_task;

typedef void lhb_step (struct lhb_task *task);

/* A SCSI command, and the NBD request it waits for. */
struct lhb_task {
  struct lhb_link *link;
  struct scsi_cmd *cmd;         /* NULL: free */
  struct lhb_task *next;        /* list of free tasks, or of those to send */
  lhb_step *step;               /* what follows when nothing is left */
  uint64_t offset, left;        /* bytes, with the request under way */
  char *buffer;                 /* of those bytes; NULL if they do not travel */
  uint32_t length;              /* bytes of the request under way */
  uint16_t type, flags;
  uint32_t position;            /* UNMAP: of the next descriptor */
  char *scratch;                /* freed with the task */
  uint32_t sent;                /* bytes that have left, header included */
  bool exclusive;               /* nothing else is under way meanwhile */
  uint8_t header[NBD_REQUEST_BYTES];
};

enum lhb_link_state {
  LHB_LINK_DOWN,
  LHB_LINK_GREETING,            /* what the server says first is awaited */
  LHB_LINK_OPTION,              /* the reply to NBD_OPT_GO */
  LHB_LINK_READY,
};

/* One logical unit. */
struct lhb_link {
  struct scsi_lu *lu;
  enum lhb_link_state state;
  int fd;                       /* -1: none */
  int timer_fd;
  char *path;                   /* of the socket */
  char export[LHB_TGT_NAME_BYTES_MAX + 1];
  uint64_t away_ns;
  uint64_t down_since_ns, began_ns;
  bool known;                   /* size and flags have been told once */
  bool away;                    /* for too long: commands are answered BUSY */
  bool can_write;               /* epoll is not asked about it */
  bool exclusive;
  uint64_t size;
  uint16_t nbd_flags;

  struct list_head waiting;     /* commands without a task */
  unsigned waiting_count;
  struct event_data turn;       /* starts and sends them */
  struct lhb_task tasks[LHB_TGT_TASKS];
  struct lhb_task *free;
  unsigned in_flight;
  struct lhb_task *to_send, **to_send_end;

  char greeting[64 + LHB_TGT_NAME_BYTES_MAX];
  uint32_t greeting_bytes, greeting_sent;

  struct lhb_task *reading;     /* its payload is coming in */
  uint32_t reading_got;
  uint32_t head, tail;          /* of what was received */
  uint8_t received[LHB_TGT_RECEIVE_BYTES];
};

/* ---- link.c */

/* Make a link that connects to nothing yet; NULL: no memory. */
struct lhb_link *lhb_link_new (struct scsi_lu *lu);
void lhb_link_free (struct lhb_link *link);

/* Connect, and wait until the server has told the size.  0 or -errno. */
int lhb_link_open (struct lhb_link *link, const char *path);
void lhb_link_close (struct lhb_link *link);

/* Send a task's request; called with type, flags, offset, left and buffer. */
void lhb_link_issue (struct lhb_task *task);

/* Take the tasks there are, and send what they want, before tgtd sleeps. */
void lhb_link_turn (struct lhb_link *link);

/* The size of the unit has changed: tell tgtd. */
void lhb_unit_resized (struct lhb_link *link);

/* ---- task.c */

/* Whether the command has something to do; the caller queues it then. */
bool lhb_task_wanted (struct scsi_cmd *cmd);

/* Whether it must be alone, because it reads what it then writes. */
bool lhb_task_is_exclusive (const struct scsi_cmd *cmd);

/* Start it: its first request is issued, or it has ended. */
void lhb_task_start (struct lhb_task *task);

/* A request ended with an NBD error, 0 for none. */
void lhb_task_replied (struct lhb_task *task, uint32_t error);

/* End it with BUSY: the initiator shall try again. */
void lhb_task_busy (struct lhb_task *task);

static inline struct lhb_link *
lhb_link_of (struct scsi_lu *lu)
{
  return *(struct lhb_link **) (void *) ((char *) lu + sizeof *lu);
}

#endif
