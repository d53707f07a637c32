/* Errors of the data protocol: texts on the wire, errno values here. */

#include <errno.h>
#include <string.h>

#include "lhb_replica_wire.h"

/* Longhorn's words first: what contains them is that error.  EOVERFLOW stands
 * for a range beyond the end. */
static const struct {
  int error;
  const char *text;
} table[] = {
  { ENOSPC, "no space left on device" },
  { EOVERFLOW, "unexpected EOF" },
  { EMSGSIZE, "request is too large" },
  { EROFS, "read-only file system" },
  { EOPNOTSUPP, "operation not supported" },
  { ENOMEM, "cannot allocate memory" },
  { EIO, "input/output error" },
};

enum { COUNT = sizeof table / sizeof table[0] };

const char *
lhb_frame_error_text (uint32_t error)
{
  if (error == EDQUOT || error == EFBIG)
    error = ENOSPC;
  for (size_t i = 0; i < COUNT; i++)
    if ((uint32_t) table[i].error == error)
      return table[i].text;
  return table[COUNT - 1].text;
}

int
lhb_frame_error_of (const char *text, size_t length_bytes)
{
  for (size_t i = 0; i < COUNT; i++)
    if (memmem (text, length_bytes, table[i].text, strlen (table[i].text))
        != NULL)
      return table[i].error;
  return EIO;
}
