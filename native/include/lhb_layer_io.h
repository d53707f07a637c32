/* Blocking I/O on the files of frozen layers, for merges and comparisons. */
#ifndef LHB_LAYER_IO_H
#define LHB_LAYER_IO_H

#include <stdbool.h>
#include <stdint.h>

#define LHB_SLICE_BLOCKS 256            /* copied or compared at one go */
#define LHB_EXTENTS_BATCH 64            /* extents asked for at one go */

typedef int64_t (*lhb_extent_visitor) (void *context, uint64_t block,
                                       uint64_t blocks);

/* Call 'visit' for the data of a file within a range.  Returns the sum of what
 * it returned, or the first error. */
int64_t lhb_layer_for_each_extent (int fd, uint64_t block, uint64_t end,
                                   lhb_extent_visitor visit, void *context);
/* Read or write whole blocks completely.  The end of the file is -EIO. */
int lhb_layer_transfer (int fd, char *buffer, uint64_t block, uint64_t blocks,
                        bool writes);
int lhb_layer_punch (int fd, uint64_t block, uint64_t blocks);

#endif
