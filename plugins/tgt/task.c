/* SCSI commands as NBD requests. */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lhb_bytes.h"
#include "lhb_tgt.h"

#define ASC_SPACE_ALLOCATION_FAILED 0x2707
#define UNMAP_HEADER_BYTES 8
#define UNMAP_DESCRIPTOR_BYTES 16
#define CDB_FUA 0x08
#define CDB_LBDATA_PBDATA 0x06          /* of WRITE SAME; obsolete */
#define CDB_UNMAP 0x08                  /* of WRITE SAME */
#define CDB_NDOB 0x01                   /* of WRITE SAME(16) */

/* ---- Ends. */

static void
finish (struct lhb_task *task, int result)
{
  struct lhb_link *link = task->link;
  struct scsi_cmd *cmd = task->cmd;

  free (task->scratch);
  task->scratch = NULL;
  task->cmd = NULL;
  task->next = link->free;
  link->free = task;
  link->in_flight--;
  if (task->exclusive)
    link->exclusive = false;
  if (link->waiting_count)
    tgt_add_sched_event (&link->turn);
  target_cmd_io_done (cmd, result);
}

static void
finish_good (struct lhb_task *task)
{
  switch (task->cmd->scb[0])
    {
    case UNMAP:
      /* tgtd has prepared for a failure before it knew. */
      task->cmd->sense_len = 0;
      scsi_set_out_resid_by_actual (task->cmd,
                                    scsi_get_out_length (task->cmd));
      break;
    }
  finish (task, SAM_STAT_GOOD);
}

static void
fail (struct lhb_task *task, uint8_t key, uint16_t code)
{
  sense_data_build (task->cmd, key, code);
  finish (task, SAM_STAT_CHECK_CONDITION);
}

void
lhb_task_busy (struct lhb_task *task)
{
  finish (task, SAM_STAT_BUSY);
}

static void
fail_nbd (struct lhb_task *task, uint32_t error)
{
  switch (error)
    {
    case NBD_EPERM:
      fail (task, DATA_PROTECT, ASC_WRITE_PROTECT);
      return;
    case NBD_ENOSPC:
      fail (task, DATA_PROTECT, ASC_SPACE_ALLOCATION_FAILED);
      return;
    case NBD_EINVAL:
      fail (task, ILLEGAL_REQUEST, ASC_LBA_OUT_OF_RANGE);
      return;
    case NBD_ENOMEM:
      lhb_task_busy (task);
      return;
    case NBD_EIO:
      fail (task, MEDIUM_ERROR,
            task->type == NBD_CMD_READ ? ASC_READ_ERROR : ASC_WRITE_ERROR);
      return;
    default:
      fail (task, HARDWARE_ERROR, ASC_INTERNAL_TGT_FAILURE);
    }
}

void
lhb_task_replied (struct lhb_task *task, uint32_t error)
{
  if (error)
    {
      fail_nbd (task, error);
      return;
    }
  task->offset += task->length;
  task->left -= task->length;
  if (task->buffer)
    task->buffer += task->length;
  if (task->left)
    lhb_link_issue (task);
  else
    task->step (task);
}

/* ---- What every command is made of. */

static void
request (struct lhb_task *task, uint16_t type, uint16_t flags, uint64_t offset,
         uint64_t left, char *buffer, lhb_step *step)
{
  task->type = type;
  task->flags = flags;
  task->offset = offset;
  task->left = left;
  task->buffer = buffer;
  task->step = step;
  lhb_link_issue (task);
}

/* Whether what is written has to be durable before the answer: the command
 * says so, or the initiator has switched the write cache off. */
static uint16_t
write_flags (const struct scsi_cmd *cmd, bool has_fua_bit)
{
  const struct mode_pg *caching = find_mode_page (cmd->dev, 0x08, 0);

  if (has_fua_bit && (cmd->scb[1] & CDB_FUA))
    return NBD_CMD_FLAG_FUA;
  if (caching && !(caching->mode_data[0] & 0x04))
    return NBD_CMD_FLAG_FUA;
  return 0;
}

static uint64_t
cap (const struct scsi_cmd *cmd, uint32_t length)
{
  return length < cmd->tl ? length : cmd->tl;
}

/* Memory that lives as long as the task; NULL: the task has failed. */
static char *
take_scratch (struct lhb_task *task, size_t bytes)
{
  task->scratch = malloc (bytes ? bytes : 1);
  if (task->scratch == NULL)
    fail (task, HARDWARE_ERROR, ASC_INTERNAL_TGT_FAILURE);
  return task->scratch;
}

/* ---- READ, with the write cache emptied first if it asks for the medium. */

static void
read_medium (struct lhb_task *task)
{
  struct scsi_cmd *cmd = task->cmd;

  request (task, NBD_CMD_READ, 0, cmd->offset,
           cap (cmd, scsi_get_in_length (cmd)), scsi_get_in_buffer (cmd),
           finish_good);
}

static void
start_read (struct lhb_task *task)
{
  if (task->cmd->scb[0] != READ_6 && (task->cmd->scb[1] & CDB_FUA))
    request (task, NBD_CMD_FLUSH, 0, 0, 0, NULL, read_medium);
  else
    read_medium (task);
}

/* ---- WRITE, VERIFY, and both. */

static void
compare_verified (struct lhb_task *task)
{
  struct scsi_cmd *cmd = task->cmd;

  if (memcmp (task->scratch, scsi_get_out_buffer (cmd),
              scsi_get_out_length (cmd)))
    fail (task, MISCOMPARE, ASC_MISCOMPARE_DURING_VERIFY_OPERATION);
  else
    finish_good (task);
}

static void
start_verify (struct lhb_task *task)
{
  struct scsi_cmd *cmd = task->cmd;
  uint32_t length = scsi_get_out_length (cmd);

  if (length == 0)
    finish_good (task);
  else if (take_scratch (task, length))
    request (task, NBD_CMD_READ, 0, cmd->offset, length, task->scratch,
             compare_verified);
}

static void
start_write (struct lhb_task *task, uint16_t flags, lhb_step *step)
{
  struct scsi_cmd *cmd = task->cmd;

  request (task, NBD_CMD_WRITE, flags, cmd->offset,
           cap (cmd, scsi_get_out_length (cmd)), scsi_get_out_buffer (cmd),
           step);
}

/* ---- COMPARE AND WRITE, ORWRITE: alone, so nothing comes in between. */

static void
write_if_equal (struct lhb_task *task)
{
  struct scsi_cmd *cmd = task->cmd;
  const char *wanted = scsi_get_out_buffer (cmd);
  uint32_t at = 0;

  while (at < cmd->tl && wanted[at] == task->scratch[at])
    at++;
  if (at == cmd->tl)
    {
      request (task, NBD_CMD_WRITE, write_flags (cmd, true), cmd->offset,
               cmd->tl, (char *) scsi_get_out_buffer (cmd) + cmd->tl,
               finish_good);
      return;
    }
  sense_data_build_with_info (cmd, MISCOMPARE,
                              ASC_MISCOMPARE_DURING_VERIFY_OPERATION, at);
  finish (task, SAM_STAT_CHECK_CONDITION);
}

static void
write_or (struct lhb_task *task)
{
  struct scsi_cmd *cmd = task->cmd;
  char *data = scsi_get_out_buffer (cmd);
  uint64_t length = cap (cmd, scsi_get_out_length (cmd));

  for (uint64_t i = 0; i < length; i++)
    data[i] = (char) (data[i] | task->scratch[i]);
  start_write (task, write_flags (cmd, true), finish_good);
}

static void
start_read_then (struct lhb_task *task, uint64_t length, lhb_step *step)
{
  if (take_scratch (task, length))
    request (task, NBD_CMD_READ, 0, task->cmd->offset, length, task->scratch,
             step);
}

static void
start_compare_and_write (struct lhb_task *task)
{
  struct scsi_cmd *cmd = task->cmd;

  if (scsi_get_out_length (cmd) / 2 != cmd->tl)
    fail (task, ILLEGAL_REQUEST, ASC_INVALID_FIELD_IN_CDB);
  else if (cmd->tl == 0)
    finish_good (task);
  else
    start_read_then (task, cmd->tl, write_if_equal);
}

/* ---- UNMAP: every descriptor is looked at before the first is obeyed.
 *
 * What is unmapped reads as zeros, as we say it does, so it is WRITE_ZEROES:
 * the engine frees whole blocks all the same, and NBD_CMD_TRIM leaves parts of
 * blocks alone. */

static uint32_t
unmap_end (struct scsi_cmd *cmd)
{
  uint32_t end = scsi_get_out_length (cmd);

  if (end < UNMAP_HEADER_BYTES)
    return 0;
  end -= UNMAP_HEADER_BYTES;
  return UNMAP_HEADER_BYTES + end / UNMAP_DESCRIPTOR_BYTES
         * UNMAP_DESCRIPTOR_BYTES;
}

static bool
unmap_fits (struct scsi_cmd *cmd)
{
  const uint8_t *list = scsi_get_out_buffer (cmd);
  uint64_t blocks = cmd->dev->size >> cmd->dev->blk_shift;
  uint32_t end = unmap_end (cmd);

  for (uint32_t at = UNMAP_HEADER_BYTES; at < end;
       at += UNMAP_DESCRIPTOR_BYTES)
    {
      uint64_t first = lhb_get_be64 (list + at);
      uint32_t count = lhb_get_be32 (list + at + 8);

      if (first > blocks || count > blocks - first)
        return false;
    }
  return true;
}

static void
unmap_next (struct lhb_task *task)
{
  struct scsi_cmd *cmd = task->cmd;
  const uint8_t *list = scsi_get_out_buffer (cmd);
  unsigned shift = cmd->dev->blk_shift;

  while (task->position < unmap_end (cmd))
    {
      const uint8_t *descriptor = list + task->position;
      uint64_t first = lhb_get_be64 (descriptor);
      uint64_t count = lhb_get_be32 (descriptor + 8);

      task->position += UNMAP_DESCRIPTOR_BYTES;
      if (count)
        {
          request (task, NBD_CMD_WRITE_ZEROES, write_flags (cmd, false),
                   first << shift, count << shift, NULL, unmap_next);
          return;
        }
    }
  finish_good (task);
}

static void
start_unmap (struct lhb_task *task)
{
  if (!unmap_fits (task->cmd))
    {
      fail (task, ILLEGAL_REQUEST, ASC_LBA_OUT_OF_RANGE);
      return;
    }
  task->position = UNMAP_HEADER_BYTES;
  unmap_next (task);
}

/* ---- WRITE SAME: zeros travel as a range, anything else as data.
 *
 * With the UNMAP bit the data does not count, as for stock tgtd and the target
 * of the Linux kernel, although SBC-3 would have data that is not zero
 * written; libiscsi's tests want it so. */

/* Bytes that it covers.  tgtd keeps 32 bits of that number, too few. */
static uint64_t
same_bytes (const struct scsi_cmd *cmd)
{
  unsigned shift = cmd->dev->blk_shift;
  uint64_t count = scsi_rw_count (cmd->scb);

  if (count == 0)               /* to the end */
    return cmd->dev->size - cmd->offset;
  return count << shift;
}

static bool
is_zero (const char *data, uint32_t bytes)
{
  for (uint32_t i = 0; i < bytes; i++)
    if (data[i])
      return false;
  return true;
}

/* One piece of the pattern is on its way at a time. */
static void
same_next (struct lhb_task *task)
{
  struct scsi_cmd *cmd = task->cmd;
  uint64_t end = cmd->offset + same_bytes (cmd);
  uint64_t rest = end - task->offset;

  if (rest == 0)
    finish_good (task);
  else
    request (task, NBD_CMD_WRITE, write_flags (cmd, false), task->offset,
             rest < LHB_TGT_PATTERN_BYTES ? rest : LHB_TGT_PATTERN_BYTES,
             task->scratch, same_next);
}

static void
start_write_same (struct lhb_task *task)
{
  struct scsi_cmd *cmd = task->cmd;
  uint32_t block = 1u << cmd->dev->blk_shift;
  uint32_t sent = scsi_get_out_length (cmd);
  const char *pattern = scsi_get_out_buffer (cmd);
  bool no_data = cmd->scb[0] == WRITE_SAME_16 && (cmd->scb[1] & CDB_NDOB);
  bool unmap = cmd->scb[1] & CDB_UNMAP;

  if ((cmd->scb[1] & CDB_LBDATA_PBDATA) || (!no_data && sent != block))
    {
      fail (task, ILLEGAL_REQUEST, ASC_INVALID_FIELD_IN_CDB);
      return;
    }
  if (unmap || no_data || is_zero (pattern, block))
    {
      request (task, NBD_CMD_WRITE_ZEROES, write_flags (cmd, false),
               cmd->offset, same_bytes (cmd), NULL, finish_good);
      return;
    }
  if (take_scratch (task, LHB_TGT_PATTERN_BYTES) == NULL)
    return;
  for (uint32_t at = 0; at < LHB_TGT_PATTERN_BYTES; at += block)
    memcpy (task->scratch + at, pattern, block);
  task->offset = cmd->offset;
  same_next (task);
}

/* ---- Which is which. */

bool
lhb_task_wanted (struct scsi_cmd *cmd)
{
  switch (cmd->scb[0])
    {
    case READ_6:
    case READ_10:
    case READ_12:
    case READ_16:
      return cmd->tl && scsi_get_in_length (cmd);
    case WRITE_6:
    case WRITE_10:
    case WRITE_12:
    case WRITE_16:
    case WRITE_VERIFY:
    case WRITE_VERIFY_12:
    case WRITE_VERIFY_16:
    case ORWRITE_16:
      return cmd->tl && scsi_get_out_length (cmd);
    case PRE_FETCH_10:
    case PRE_FETCH_16:
      return cmd->tl;
    case COMPARE_AND_WRITE:
    case SYNCHRONIZE_CACHE:
    case SYNCHRONIZE_CACHE_16:
    case UNMAP:
    case VERIFY_10:
    case VERIFY_12:
    case VERIFY_16:
    case WRITE_SAME:
    case WRITE_SAME_16:
      return true;
    default:
      return false;
    }
}

bool
lhb_task_is_exclusive (const struct scsi_cmd *cmd)
{
  return cmd->scb[0] == COMPARE_AND_WRITE || cmd->scb[0] == ORWRITE_16;
}

void
lhb_task_start (struct lhb_task *task)
{
  struct scsi_cmd *cmd = task->cmd;

  switch (cmd->scb[0])
    {
    case READ_6:
    case READ_10:
    case READ_12:
    case READ_16:
      start_read (task);
      return;
    case WRITE_6:
    case WRITE_10:
    case WRITE_12:
    case WRITE_16:
      start_write (task, write_flags (cmd, cmd->scb[0] != WRITE_6),
                   finish_good);
      return;
    case WRITE_VERIFY:
    case WRITE_VERIFY_12:
    case WRITE_VERIFY_16:
      start_write (task, NBD_CMD_FLAG_FUA, start_verify);
      return;
    case VERIFY_10:
    case VERIFY_12:
    case VERIFY_16:
      start_verify (task);
      return;
    case ORWRITE_16:
      start_read_then (task, cap (cmd, scsi_get_out_length (cmd)), write_or);
      return;
    case COMPARE_AND_WRITE:
      start_compare_and_write (task);
      return;
    case SYNCHRONIZE_CACHE:
    case SYNCHRONIZE_CACHE_16:
      request (task, NBD_CMD_FLUSH, 0, 0, 0, NULL, finish_good);
      return;
    case PRE_FETCH_10:
    case PRE_FETCH_16:
      request (task, NBD_CMD_CACHE, 0, cmd->offset, cmd->tl, NULL,
               finish_good);
      return;
    case UNMAP:
      start_unmap (task);
      return;
    case WRITE_SAME:
    case WRITE_SAME_16:
      start_write_same (task);
      return;
    default:
      fail (task, HARDWARE_ERROR, ASC_INTERNAL_TGT_FAILURE);
    }
}
