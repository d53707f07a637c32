/* Blocking I/O on the files of frozen layers, for merges and comparisons. */
#ifndef LHB_LAYER_IO_H
#define LHB_LAYER_IO_H

#include <stdbool.h>
#include <stdint.h>

#include "lhb_contract.h"

#define LHB_SLICE_BLOCKS 256            /* copied or compared at one go */
#define LHB_EXTENTS_BATCH 64            /* extents asked for at one go */

/* Which extents of a file are asked for. */
enum lhb_extent_kind {
  LHB_EXTENTS_ANY,
  LHB_EXTENTS_WRITTEN,
  LHB_EXTENTS_UNWRITTEN,        /* space that was never written */
  LHB_EXTENTS_UNWRITTEN_WHOLE   /* the blocks that are nothing else */
};

/* lhb_file_extents of one kind. */
int lhb_file_extents_of (int fd, enum lhb_extent_kind kind,
                         uint64_t offset_bytes,
                         struct lhb_extent *extents_out, uint32_t max);

typedef int64_t (*lhb_extent_visitor) (void *context, uint64_t block,
                                       uint64_t blocks);

/* Call 'visit' for the extents of a file within a range.  Returns the sum of
 * what it returned, or the first error. */
int64_t lhb_layer_for_each_extent (int fd, enum lhb_extent_kind kind,
                                   uint64_t block, uint64_t end,
                                   lhb_extent_visitor visit, void *context);
/* The same for what lies between the extents of a range. */
int64_t lhb_layer_for_each_gap (int fd, enum lhb_extent_kind kind,
                                uint64_t block, uint64_t end,
                                lhb_extent_visitor visit, void *context);
/* Read or write whole blocks completely.  The end of the file is -EIO. */
int lhb_layer_transfer (int fd, char *buffer, uint64_t block, uint64_t blocks,
                        bool writes);
int lhb_layer_punch (int fd, uint64_t block, uint64_t blocks);

#endif
