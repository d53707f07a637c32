/* The template that tgtd knows, and what a logical unit says of itself.
 *
 * tgtadm --op new --mode logicalunit --bstype lhblock \
 *   --backing-store /path/of/nbd.sock --bsopts 'export=NAME;away=20;id=HEX'
 *
 * tgtd loads this file from its module directory, or it is preloaded; both
 * at once are harmless.
 */

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lhb_bytes.h"
#include "lhb_tgt.h"

#define ASC_CAPACITY_DATA_HAS_CHANGED 0x2a09
#define LIMITS_UNMAP_GRANULARITY 24     /* in the page, without its header */

void register_bs_module (void);

/* Take one 'name=value' of the options.  -EINVAL: a value is impossible. */
static int
take_option (struct lhb_link *link, const char *option)
{
  char *end;

  if (strncmp (option, "export=", 7) == 0)
    {
      if (strlen (option + 7) > LHB_TGT_NAME_BYTES_MAX)
        return -EINVAL;
      strcpy (link->export, option + 7);
      return 0;
    }
  if (strncmp (option, "away=", 5) == 0)
    {
      unsigned long seconds = strtoul (option + 5, &end, 10);

      if (*end || seconds < 1 || seconds > LHB_TGT_AWAY_S_MAX)
        return -EINVAL;
      link->away_ns = seconds * 1000000000ull;
      return 0;
    }
  if (strncmp (option, "id=", 3) == 0)
    {
      struct scsi_lu *lu = link->lu;
      uint64_t id = strtoull (option + 3, &end, 16);

      if (*end)
        return -EINVAL;
      lu->attrs.numeric_id = id;
      lu->attrs.lu_vpd[PCODE_OFFSET (0x83)]->vpd_update (lu,
                                                         lu->attrs.scsi_id);
      return 0;
    }
  return -EINVAL;
}

static tgtadm_err
unit_init (struct scsi_lu *lu, char *options)
{
  struct lhb_link **place = (void *) ((char *) lu + sizeof *lu);
  struct lhb_link *link = lhb_link_new (lu);
  char *copy, *rest, *option;
  int err = 0;

  *place = link;
  if (link == NULL)
    return TGTADM_NOMEM;
  copy = rest = strdup (options ? options : "");
  if (copy == NULL)
    err = -ENOMEM;
  while (err == 0 && (option = strsep (&rest, ";")) != NULL)
    if (*option)
      err = take_option (link, option);
  free (copy);
  if (err == 0)
    return TGTADM_SUCCESS;
  eprintf ("lhblock: impossible options %s\n", options ? options : "");
  lhb_link_free (link);
  return TGTADM_INVALID_REQUEST;
}

static void
unit_exit (struct scsi_lu *lu)
{
  lhb_link_free (lhb_link_of (lu));
}

/* What is true of every volume: thin, blocks of 4096 bytes. */
static void
describe (struct scsi_lu *lu)
{
  struct vpd *limits = lu->attrs.lu_vpd[PCODE_OFFSET (0xb0)];
  unsigned ratio_shift = 0;

  while (lu->blk_shift + ratio_shift < 12)
    ratio_shift++;
  if (!lu->attrs.no_auto_lbppbe)
    lu->attrs.lbppbe = (unsigned char) ratio_shift;
  if (lu->attrs.readonly)
    return;
  lu->attrs.thinprovisioning = 1;
  limits->vpd_update (lu, NULL);
  lhb_put_be32 (limits->data + LIMITS_UNMAP_GRANULARITY, 1u << ratio_shift);
  lu->attrs.lu_vpd[PCODE_OFFSET (0xb2)]->vpd_update (lu, NULL);
}

static int
unit_open (struct scsi_lu *lu, char *path, int *fd, uint64_t *size)
{
  struct lhb_link *link = lhb_link_of (lu);
  int err = lhb_link_open (link, path);

  if (err)
    {
      eprintf ("lhblock: %s of %s: %s\n", link->export, path, strerror (-err));
      return -1;
    }
  *fd = -1;                     /* tgtd asks it for holes, and finds none */
  *size = link->size;
  if (link->nbd_flags & NBD_FLAG_READ_ONLY)
    lu->attrs.readonly = 1;
  describe (lu);
  return 0;
}

static void
unit_close (struct scsi_lu *lu)
{
  lhb_link_close (lhb_link_of (lu));
}

void
lhb_unit_resized (struct lhb_link *link)
{
  struct scsi_lu *lu = link->lu;
  uint64_t blocks = link->size >> lu->blk_shift;

  lu->size = link->size;
  lhb_put_be32 (lu->mode_block_descriptor,
                blocks >> 32 ? UINT32_MAX : (uint32_t) blocks);
  ua_sense_add_other_it_nexus (UINT64_MAX, lu, ASC_CAPACITY_DATA_HAS_CHANGED);
}

static int
submit (struct scsi_cmd *cmd)
{
  struct lhb_link *link = lhb_link_of (cmd->dev);

  if (!lhb_task_wanted (cmd))
    return 0;
  set_cmd_async (cmd);
  list_add_tail (&cmd->bs_list, &link->waiting);
  link->waiting_count++;
  tgt_add_sched_event (&link->turn);
  return 0;
}

static struct backingstore_template template = {
  .bs_name = "lhblock",
  .bs_datasize = sizeof (struct lhb_link *),
  .bs_init = unit_init,
  .bs_exit = unit_exit,
  .bs_open = unit_open,
  .bs_close = unit_close,
  .bs_cmd_submit = submit,
};

static unsigned char opcodes[] = {
  ALLOW_MEDIUM_REMOVAL, COMPARE_AND_WRITE, FORMAT_UNIT, INQUIRY,
  MAINT_PROTOCOL_IN, MODE_SELECT, MODE_SELECT_10, MODE_SENSE, MODE_SENSE_10,
  ORWRITE_16, PERSISTENT_RESERVE_IN, PERSISTENT_RESERVE_OUT, PRE_FETCH_10,
  PRE_FETCH_16, READ_10, READ_12, READ_16, READ_6, READ_CAPACITY, RELEASE,
  REPORT_LUNS, REQUEST_SENSE, RESERVE, SEND_DIAGNOSTIC, SERVICE_ACTION_IN,
  START_STOP, SYNCHRONIZE_CACHE, SYNCHRONIZE_CACHE_16, TEST_UNIT_READY, UNMAP,
  VERIFY_10, VERIFY_12, VERIFY_16, WRITE_10, WRITE_12, WRITE_16, WRITE_6,
  WRITE_SAME, WRITE_SAME_16, WRITE_VERIFY, WRITE_VERIFY_12, WRITE_VERIFY_16,
};

/* What tgtd calls after it has loaded the module; the other way in is for
 * LD_PRELOAD. */
__attribute__ ((constructor, visibility ("default"))) void
register_bs_module (void)
{
  if (get_backingstore_template (template.bs_name))
    return;
  bs_create_opcode_map (&template, opcodes, (int) sizeof opcodes);
  register_backingstore_template (&template);
}
