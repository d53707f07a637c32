/* Frames between an engine and a replica.
 *
 * Source: Longhorn's data protocol; a frame is a packed little-endian header
 * of 26 bytes and 'payload' bytes:
 *
 *   0  u16  magic     0x1b01
 *   2  u32  sequence  echoed in the reply
 *   6  u32  type
 *   10 i64  offset    bytes; echoed
 *   18 u32  size      bytes asked for, or done
 *   22 u32  payload   bytes that follow
 *
 * Types from LHB_FRAME_OURS on are lhblock's own.  An engine sends them only
 * to a replica that has said that it is lhblock.
 *
 * The 'size' of an Error reply to a change (WRITE, UNMAP, TRIM, ZERO) is how
 * many bytes of it were done, from its first whole block on, or
 * LHB_FRAME_UNSURE.  Longhorn sends the length of the text there, and no
 * client of Longhorn's looks at it.
 */
#ifndef LHB_REPLICA_WIRE_H
#define LHB_REPLICA_WIRE_H

#include <stddef.h>
#include <stdint.h>

#define LHB_FRAME_MAGIC 0x1b01
#define LHB_FRAME_BYTES 26
#define LHB_FRAME_UNSURE 0xffffffffu    /* it is not known which part */

enum {
  LHB_FRAME_READ = 0,
  LHB_FRAME_WRITE = 1,
  LHB_FRAME_RESPONSE = 2,
  LHB_FRAME_ERROR = 3,          /* the payload is a text */
  LHB_FRAME_EOF = 4,
  LHB_FRAME_CLOSE = 5,
  LHB_FRAME_PING = 6,
  LHB_FRAME_UNMAP = 7,          /* rounded inwards to whole blocks */

  LHB_FRAME_OURS = 0x4c00,
  LHB_FRAME_FLUSH = 0x4c00,     /* all completed writes are durable */
  LHB_FRAME_WRITE_FUA = 0x4c01,
  LHB_FRAME_TRIM = 0x4c02,      /* reads as zeros afterwards, to the byte */
  LHB_FRAME_ZERO = 0x4c03,
  LHB_FRAME_ZERO_NO_HOLE = 0x4c04,
  /* Opens a data connection: u64 epoch, 16 bytes id of the engine, u32 view: 0
   * is the volume, another number a snapshot that was opened to be read, all
   * ones a connection for units of layers, which has frames of its own.
   * Answered before the core gets the socket; the core does not know it. */
  LHB_FRAME_HELLO = 0x4c05,
  /* Only on a connection for units (lhblock/engine/_unit_connection.py). */
  LHB_FRAME_UNIT_READ = 0x4c10,
  LHB_FRAME_UNIT_WRITE = 0x4c11,
  /* Refused with "operation not supported" where zeros would be written. */
  LHB_FRAME_ZERO_FAST = 0x4c06,
  LHB_FRAME_ZERO_FAST_NO_HOLE = 0x4c07,
  /* The payload is pages of the activity log, each of which says where it
   * belongs.  They are durable when it is answered. */
  LHB_FRAME_ACTIVITY = 0x4c08,
};

/* The text of an Error reply for an errno, and the errno of a text: Longhorn's
 * engines and replicas tell errors apart by words in it. */
const char *lhb_frame_error_text (uint32_t error);
int lhb_frame_error_of (const char *text, size_t length_bytes);

#endif
