/* A connection to the engine, until requests flow: the NBD handshake, done
 * with blocking calls, each of which waits for LHB_SESSION_S at most.
 */
#ifndef LHB_SESSION_H
#define LHB_SESSION_H

#include <stdbool.h>
#include <stdint.h>

#include "lhb_nbd.h"

#define LHB_SESSION_S 10
#define LHB_SESSION_NAME_BYTES_MAX 4096 /* of NBD strings */
#define LHB_SESSION_REPLIES_MAX 32768   /* to one option */
#define LHB_SESSION_SAID_BYTES 256

/* What the server tells of an export. */
struct lhb_export {
  uint64_t size;
  uint16_t flags;
  bool has_extents;
  uint32_t extents_id;          /* of base:allocation */
  uint32_t block_min, block_preferred, block_max;
  char description[LHB_SESSION_NAME_BYTES_MAX + 1];
  char said[LHB_SESSION_SAID_BYTES];    /* why it refused; else empty */
};

/* Called with each export that there is; the strings are the caller's.  Not 0
 * ends the list. */
typedef int lhb_listed (void *data, const char *name, const char *description);

/* Connect to a Unix socket and choose an export.  Returns a socket without
 * time limits that requests may be sent to, or -errno: -ENOENT is no such
 * export, -EPROTO a server that is none. */
int lhb_session_open (const char *path, const char *name,
                      struct lhb_export *told);

/* Ask for the names of all exports.  0, what 'listed' returned, or -errno. */
int lhb_session_list (const char *path, lhb_listed *listed, void *data);

#endif
